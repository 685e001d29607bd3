"""Unit 16, fewer numbers than rank one: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, not_a_tensor, off_by, where_right
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.unit_16.implementations import SOUND
from lora_from_scratch.checks.verdict import describe

NOT_KEPT = (
    "Your code changes the state of PyTorch's global generator. All random numbers have to come from a generator that "
    "your code makes."
)
NOT_AGAIN = (
    "another result in another call",
    "The first result is right. A second call with the same arguments gives another one, after the global generator "
    "was seeded with another number in between.",
)


def explain_projections(case: Case, seen: Seen, expected: Seen) -> Explanation:
    one: Any = seen.value
    other: Any = expected.value
    result, wanted = one["result"], other["result"]
    if not isinstance(result, list) or len(result) != 2:
        return "not two tensors", f"The result should be A and B, two tensors, but yours is {describe(result)}."
    for name, axes, part, want in zip("AB", ("(r, in)", "(out, r)"), result, wanted, strict=True):
        if isinstance(part, Tensor) and part.shape != want.shape:
            shapes = f"here {tuple(want.shape)}, but yours has the shape {tuple(part.shape)}"
            return f"the axes of {name}", f"{name} is {axes}, {shapes}."
        if found := not_a_tensor(part, want.shape, name):
            return found
    for name, part, want in zip("AB", result, wanted, strict=True):
        if not same(part, want):
            return _not_drawn(name, part, want)
    return _drawn_otherwise(one, other) or _dtypes(one["dtypes"], other["dtypes"])


def _not_drawn(name: str, part: Tensor, want: Tensor) -> Explanation:
    bound = math.sqrt(6 / want.shape[1])
    ratio = _one_ratio(part, want)
    if ratio is not None:
        return (
            f"the bound of {name}",
            f"{name} is the right one multiplied by {ratio:.3g}: its bound should be another.",
        )
    if float(part.abs().max()) > bound:
        return f"beyond the bound of {name}", f"{name} has entries beyond the bound that the statement gives."
    order = " A is right, so the numbers of B come from another place of the sequence." if name == "B" else ""
    return f"other numbers in {name}", (
        f"{name} has the right shape, but other numbers than `torch.Generator().manual_seed(seed)` gives for uniform "
        f"entries, drawn row by row.{order}"
    )


def explain_change(case: Case, seen: Seen, expected: Seen) -> Explanation:
    one: Any = seen.value
    other: Any = expected.value
    change, wanted = one["change"], other["change"]
    if found := not_a_tensor(change, wanted.shape, "the change"):
        return found
    if not same(change, wanted):
        given: Any = case.inputs
        d, b = given["lambda_d"], given["lambda_b"]
        A, B = given["A"][:, : given["in_features"]], given["B"][: len(b)]
        for name, value in {
            "without lambda_d": b[:, None] * (B @ A),
            "without lambda_b": (B * d) @ A,
            "without both vectors": B @ A,
        }.items():
            if same(change, value):
                return name, f"This is the change {name}."
        return where_right(change, wanted, ("output", "input")) or (
            "another product",
            "No output and no input is right. Write the two diagonal matrices out for the first case and multiply all "
            "four matrices by hand.",
        )
    return "the gradients", (
        "The change is right, but the gradients of lambda_d and lambda_b are not. Use operations of PyTorch that "
        "record a graph, without `detach`, `no_grad`, `.data` or NumPy."
    )


def explain_tied(case: Case, seen: Seen, expected: Seen) -> Explanation:
    sizes: Any = case.inputs["sizes"]
    rank: Any = case.inputs["rank"]
    count, wanted = seen.value, expected.value
    if count is None:
        return not_a_tensor(None, (), "the result")
    if isinstance(count, bool) or not isinstance(count, int) or not isinstance(wanted, int):
        return "no whole number", f"The result should be a whole number, but yours is {describe(count)}."
    first = next(iter(sizes.values()))
    parts = {
        "r for each matrix": rank * len(sizes),
        "all the v": sum(outputs for _, outputs in sizes.values()),
        "all the u and v": sum(rank + outputs for _, outputs in sizes.values()),
        "one A and B of the first kind": rank * sum(first),
        "one A of the first kind": rank * first[0],
        "one B of the first kind": rank * first[1],
    }
    return off_by(count, wanted, parts, of="Your count")


def explain_combination(case: Case, seen: Seen, expected: Seen) -> Explanation:
    one: Any = seen.value
    other: Any = expected.value
    result, wanted = one["result"], other["result"]
    if found := not_a_tensor(result, wanted.shape, "the result"):
        return found
    if not same(result, wanted):
        return _scaled(result, wanted) or (
            "another sum",
            "The shape is right, but the numbers are not. Check in the case with k = 1 that R is "
            "`torch.rand(1, *shape)` from a new generator with this seed.",
        )
    return _drawn_otherwise(one, other) or _dtypes([one["dtype"]], [other["dtype"]])


def explain_gradient(case: Case, seen: Seen, expected: Seen) -> Explanation:
    one: Any = seen.value
    other: Any = expected.value
    result, wanted = one["result"], other["result"]
    if found := not_a_tensor(result, wanted.shape, "the result"):
        return found
    if not same(result, wanted):
        return _scaled(result, wanted) or (
            "another gradient",
            "The shape is right, but the numbers are not. In the case with k = 1, where one entry of G is 1, the "
            "result is the entry of U_1 at that place.",
        )
    return _drawn_otherwise(one, other) or _dtypes([one["dtype"]], [other["dtype"]])


def explain_test(case: Case, seen: Seen, expected: Seen) -> Explanation:
    name = case.inputs["implementation"]
    if name in SOUND:
        return "refuses a sound one", (
            f"Your test fails with a sound implementation: {name}. Test only what the statement promises, and compare "
            "the implementation with itself: another one may draw other numbers."
        )
    return "passes a faulty one", f"Your test passes a faulty implementation: {name}."


def _scaled(result: Tensor, wanted: Tensor) -> Explanation:
    ratio = _one_ratio(result, wanted)
    if ratio is None:
        return None
    return "another factor", f"Your result is the right one multiplied by {ratio:.3g}, in every entry."


def _one_ratio(result: Tensor, wanted: Tensor) -> float | None:
    """The number by which every entry of the right result is multiplied, if there is one that is not 1."""
    if not isinstance(result, Tensor) or result.numel() < 2 or not bool((wanted != 0).all()):
        return None
    ratios = result.double() / wanted.double()
    ratio = float(ratios.flatten()[0])
    return ratio if ratio != 1 and torch.allclose(ratios, torch.full_like(ratios, ratio), rtol=1e-3) else None


def _drawn_otherwise(one: dict[str, Any], other: dict[str, Any]) -> Explanation:
    """What is wrong where the first result is right."""
    state = one["the state of the global generator"]
    if state != other["the state of the global generator"]:
        return "the global generator", f"{NOT_KEPT} Afterwards its state is {state}."
    return None if same(one["another call"], other["another call"]) else NOT_AGAIN


def _dtypes(found: list[str], wanted: list[str]) -> Explanation:
    for dtype, want in zip(found, wanted, strict=False):
        if dtype != want:
            return "dtype", f"The values are right, but the dtype should be {want}, and your code returns {dtype}."
    return None
