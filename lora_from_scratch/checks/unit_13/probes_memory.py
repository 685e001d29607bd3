"""Unit 13, recomputing and memory by pages: the inputs of the cases, and the probes."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lora_from_scratch.checks.exercise import Case, Draw
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_13.probes import DTYPES

# --- CheckpointFunction ------------------------------------------------------------------------------


def checkpoint_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, rows: int, width: int, *sentences: str, **more: Data) -> Case:
        given: dict[str, Data] = {
            "W": draw.normal(width, width),
            "x": draw.normal(rows, width),
            "grad_y": draw.normal(rows, width),
        }
        return Case(name, given | more, part, sentences)

    gradients, again = "the gradients", "It computes `function(x)` again"
    first = ("keeping only x", "`forward`: returns", "no activation is kept", again, "grad_y = dL/dy", "Returns None")
    yield case("a function with two layers", gradients, 2, 3, *first)
    detached = ("x may be part of a larger graph", "from a detached copy")
    yield case("x is the result of another operation", gradients, 3, 4, *detached, "Returns None", inside=True)
    yield case("the parameters already have a gradient", gradients, 2, 3, "This is where the parameters", before=True)
    yield case("two functions in sequence", gradients, 2, 4, again, *detached, times=2, inside=True)
    same = ("the same random numbers both times", "leaves that state unchanged")
    yield case("a function with dropout, and random numbers drawn after it", "randomness", 6, 8, *same, dropout=0.5)


def run_checkpoint(
    answer: Any,
    W: Tensor,
    x: Tensor,
    grad_y: Tensor,
    inside: bool = False,
    before: bool = False,
    times: int = 1,
    dropout: float = 0.0,
) -> Any:
    """y, all gradients, which activations are kept, how often the function runs, and the random numbers."""
    W.requires_grad_(True)
    W.grad = torch.ones_like(W) if before else None
    x.requires_grad_(True)
    runs: list[bool] = []
    activations: list[weakref.ref[torch.UntypedStorage]] = []

    def function(x: Tensor) -> Tensor:
        h = torch.tanh(x @ W)
        runs.append(torch.is_grad_enabled())
        activations.append(weakref.ref(h.untyped_storage()))
        return F.dropout(h, dropout) @ W

    y = 2 * x if inside else x
    other = 0
    for _ in range(times):
        given, y = y, answer.apply(function, y)
        held = [t for t in tree_leaves(getattr(y.grad_fn, "__dict__", {})) if isinstance(t, Tensor)]
        held += [t for t in getattr(y.grad_fn, "saved_tensors", ()) if isinstance(t, Tensor)]
        other += sum(t.is_floating_point() and t.data_ptr() != given.data_ptr() for t in held)
    kept = sum(activation() is not None for activation in activations)
    first_runs = list(runs)
    torch.rand(5)
    state = torch.get_rng_state()
    (y * grad_y).sum().backward()
    return {
        "y": y,
        "gradient of x": x.grad,
        "gradient of W": W.grad,
        "activations that are kept": kept,
        "tensors kept besides x": other,
        "runs at first": len(first_runs),
        "runs in all": len(runs),
        "random numbers go on as if nothing had happened": torch.equal(state, torch.get_rng_state()),
    }


# --- Pages -------------------------------------------------------------------------------------------


def pages_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, shape: tuple[int, ...], *sentences: str, **more: Data) -> Case:
        n = math.prod(shape)
        given: dict[str, Data] = {"shape": list(shape), "dtype": "float32", "start": 0}
        given |= {"m": draw.integers(1, 99, n), "v": draw.integers(100, 199, n)} | more
        return Case(name, given, part, sentences)

    both, whole, shares = "m and v", "whole pages", "tensors that share the file's"
    follows, stays, room = "v follows it immediately", "what was written stays", "with room for"
    yield case("a matrix of 2 x 3 at the start of the file", both, (2, 3), follows, shares, "The m and v of one", stays)
    yield case("a vector on the third page", both, (5,), follows, "start: a multiple of", start=2)
    name = "float64, on the second page"
    yield case(name, both, (2, 2, 3), "like: a tensor of any shape", follows, start=1, dtype="float64")
    yield case("a single number in float16", both, (), "like: a tensor of any shape", dtype="float16")
    values = "Its values do not matter"
    yield case("a parameter that requires gradients and is not contiguous", both, (3, 2), values, parameter=True)
    length, call = "`length` is the number", "This is `mapping.madvise"
    yield case("m fits on one page, m and v together do not", whole, (7, 100), length, call, "releases these `length`")
    name = "more than two pages, on the second page"
    yield case(name, whole, (1100,), length, call, "releases these `length`", room, start=1)
    yield case("m and v fill one page exactly", whole, (512,), length, call)
    yield case("a system without MADV_DONTNEED", whole, (2,), "On Windows", windows=True)


def run_pages(
    answer: Any,
    shape: list[int],
    dtype: str,
    start: int,
    m: Tensor,
    v: Tensor,
    parameter: bool = False,
    windows: bool = False,
) -> Any:
    """Where m and v are in the file, what the tensors contain when the file is written, and what is released."""
    released: list[list[Any]] = []

    class Watched(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = -1) -> None:
            released.append([option == getattr(mmap, "MADV_DONTNEED", option), start, length])

    mapping = Watched(-1, (start + 6) * mmap.PAGESIZE)
    like = torch.zeros(shape, dtype=DTYPES[dtype])
    if parameter:
        like = nn.Parameter(torch.full(shape[::-1], torch.nan).T)
    pages = answer(mapping, start * mmap.PAGESIZE, like)
    seen: dict[str, Any] = {"shapes": [list(pages.m.shape), list(pages.v.shape)]}
    seen |= {"dtypes": [str(pages.m.dtype), str(pages.v.dtype)], "length": pages.length}
    pages.m.copy_(m.view(shape))
    pages.v.copy_(v.view(shape))
    seen["in the file"] = torch.frombuffer(bytearray(mapping[:]), dtype=like.dtype)
    seen["in the tensors"] = [pages.m.clone(), pages.v.clone()]
    mapping[:] = bytes(len(mapping))
    seen["after the file is emptied"] = [pages.m.clone(), pages.v.clone()]
    with _without_madvise() if windows else contextlib.nullcontext():
        pages.release()
    return seen | {"released": released}


@contextlib.contextmanager
def _without_madvise() -> Iterator[None]:
    """As on Windows, where the module `mmap` has no MADV_DONTNEED."""
    had = getattr(mmap, "MADV_DONTNEED", None)
    if had is not None:
        del mmap.MADV_DONTNEED
    try:
        yield
    finally:
        if had is not None:
            mmap.MADV_DONTNEED = had  # type: ignore[misc]
