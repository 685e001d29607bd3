"""Unit 22, serving a thousand adapters: what is observed of an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_from_scratch.checks.trial import trial
from lora_from_scratch.checks.unit_15.probes import LargestNewTensor
from lora_from_scratch.checks.unit_22.prefix_keys import FUNCTIONS
from lora_from_scratch.serving.page_pool import OutOfPages, PageLayout

MATMUL = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "vdot", "inner"}
PRODUCTS = MATMUL | {"addmm", "baddbmm", "addbmm", "addmv", "einsum", "tensordot", "linear"}


class CountedProducts(TorchFunctionMode):
    """Counts the matrix products in its block."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.count += name in PRODUCTS or name.removesuffix("_") in PRODUCTS  # addmm_ too
        return func(*args, **(kwargs or {}))


def run_segments(
    answer: Callable[..., Any], x: Tensor, As: list[Tensor], Bs: list[Tensor], scalings: list[float], index: Tensor
) -> Any:
    """The result; whether there were too many matrix products; and whether a tensor of the weight's size was created.

    The last is only asked if there are fewer rows than the weight has, since otherwise x and y are as large as it.
    """
    adapters = list(zip(As, Bs, scalings, strict=True))
    occurring = len(set(index.tolist()) - {-1})
    largest, weight = LargestNewTensor(x, *As, *Bs), x.shape[1] * Bs[0].shape[0]
    with largest, CountedProducts() as products:
        result = answer(x, adapters, index)
    small = len(x) < min(x.shape[1], Bs[0].shape[0])
    return {
        "result": result,
        "too many products": products.count > 2 * occurring,
        "as large as the weight": small and largest.elements >= weight,
    }


def run_table(answer: Callable[..., Any], pages: int, steps: list[list[Any]]) -> list[Any]:
    """After each step: what it returned or raised, who has how many pages, and whether each page is in one place.

    A step is [owner, number of pages], or [owner] for a release.
    """
    table = answer(pages)
    seen: list[Any] = []
    for owner, *number in steps:
        before = {name: list(own) for name, own in table.tables.items()}
        free = sorted(table.free)
        record: dict[str, Any] = {}
        try:
            result = table.allocate(owner, *number) if number else table.release(owner)
            own = table.tables.get(owner)
            if number:
                listed = isinstance(result, list | tuple) and own is not None
                record["returned"] = len(result) if listed else result
                record["all pages in order"] = bool(listed and list(result) == list(own))
        except OutOfPages:
            record["raised"] = "OutOfPages"
            record["nothing is changed"] = dict(table.tables) == before and sorted(table.free) == free
        now = {name: list(own) for name, own in table.tables.items()}
        everything = [page for own in now.values() for page in own] + list(table.free)
        seen.append(
            record
            | {
                "each page is in one place": sorted(everything) == list(range(pages)),
                "pages": {name: len(own) for name, own in now.items()},
                "free": len(table.free),
                "earlier pages first": all(now[name][: len(own)] == own for name, own in before.items() if name in now),
            }
        )
    return seen


def run_evict(answer: Callable[..., Any], adapters: list[list[Any]], missing: int) -> Any:
    return answer([(name, pages, users) for name, pages, users in adapters], missing)


def run_joining(
    answer: Callable[..., Any],
    waiting: list[list[Any]],
    running: list[list[Any]],
    sizes: dict[str, int],
    pages: int,
    max_rows: int,
    tokens: int,
) -> Any:
    """With a layout whose pages have this number of tokens. What it does to its lists is done to the inputs."""
    requests = [[(adapter, stored, left) for adapter, stored, left in side] for side in (waiting, running)]
    result = answer(*requests, sizes, pages, max_rows, PageLayout(1, 1, tokens, (1,)))
    waiting[:], running[:] = ([list(request) for request in side] for side in requests)
    return result


def run_test(answer: Callable[..., Any], function: str) -> str:
    """Whether the learner's test lets this function pass; other errors than an AssertionError are its own."""
    return trial(answer, FUNCTIONS[function])
