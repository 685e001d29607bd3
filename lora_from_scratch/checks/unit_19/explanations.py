"""Unit 19, merging into four bits: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

import torch

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, not_a_tensor
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.trial import explain_trial
from lora_from_scratch.checks.verdict import describe


def explain_quantized(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first of the three tensors that is wrong: zeros, scales, codes."""
    one: Any = seen.value
    other: Any = expected.value
    if seen.changed:
        return None
    if "result" in one:
        return "not three tensors", f"Return codes, scales and zeros. Yours is {describe(one['result'])}."
    for name, what in (("zero", "the zeros"), ("scale", "the scales"), ("codes", "the codes")):
        if (found := not_a_tensor(one[name], other[name].shape, what)) is not None:
            return f"{found[0]} of {what}", found[1]
    if not same(one["zero"], other["zero"]):
        return "the zeros", "The zero of at least one group is not its smallest weight."
    if not same(one["scale"], other["scale"]):
        return (
            "the scales",
            "The zeros are right, but not the scales. How many steps lie between the two ends of a group?",
        )
    wrong = (one["codes"] - other["codes"]).abs()
    place = [int(index) for index in (wrong > 0).nonzero()[0]]
    return "the codes", (
        f"Zeros and scales are right, but the code at {place} is {float(one['codes'][tuple(place)]):g} instead of "
        f"{float(other['codes'][tuple(place)]):g}. Which of the levels scale * code + zero is nearest to the weight?"
    )


def explain_sums(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The shape; else whether each sum is off by the size of its group; else dtype and gradient."""
    one: Any = seen.value
    other: Any = expected.value
    if seen.changed:
        return None
    if "result" in one:
        return "no tensor", f"Return a tensor of sums. Yours is {describe(one['result'])}."
    if (found := not_a_tensor(one["sums"], other["sums"].shape, "the result")) is not None:
        return "another shape", f"{found[1]} The last axis should have one number for each group, the others stay."
    if not same(one["sums"], other["sums"]):
        return "other sums", (
            "The result has the right shape but other numbers than the sums. Work out the first case on paper: which "
            "numbers belong to the first group, and is anything divided?"
        )
    if one["dtype"] != other["dtype"]:
        return (
            "another dtype",
            f"The sums are right, but in {one['dtype']} instead of {other['dtype']}, the dtype of x.",
        )
    return "no gradient", "The sums are right, but the gradient that flows back to x is not."


def explain_merged(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether what is added to the zeros is off by a factor, or has the opposite sign."""
    other: Any = expected.value
    given: Any = case.inputs
    if seen.changed:
        return None
    if (found := not_a_tensor(seen.value, other.shape, "the result")) is not None:
        return found
    result: Any = seen.value
    if same(result, other):
        return "another dtype", f"The numbers are right, but in {str(result.dtype)[6:]} instead of float32."
    added, wanted = result.float() - given["zero"], other - given["zero"]
    if same(result.float(), given["zero"]):
        return "unchanged", "The zeros are unchanged."
    if bool(wanted.any()):
        factor = float((added * wanted).sum() / wanted.square().sum())
        if factor and same(added, factor * wanted, 1e-3):
            return "another factor", f"You add {factor:.3g} times what has to be added to the zeros."
    return "another change", "What you add to the zeros is not the change of the weight that A and B make. Work it out."


def explain_split(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether it stops too early or too late, or returns another iteration."""
    one: Any = seen.value
    other: Any = expected.value
    if seen.changed:
        return None
    if "result" in one:
        return "not three results", f"Return Q, A and B. Yours is {describe(one['result'])}."
    if one["B A"] is None or one["shapes"] != other["shapes"]:
        return "shapes", (
            f"A and B have the shapes {one['shapes'][0]} and {one['shapes'][1]}; they should have "
            f"{other['shapes'][0]} and {other['shapes'][1]}."
        )
    if one["calls"] != other["calls"]:
        kind = "too many" if one["calls"] > other["calls"] else "too few"
        return f"{kind} iterations", (
            f"You call `quantize` {one['calls']} times here, {kind}: {other['calls']} iterations are right. After "
            "which iteration does it stop?"
        )
    if one["iteration"] != other["iteration"]:
        return "another iteration", (
            f"The Q that you return is of iteration {one['iteration']}; the best is iteration {other['iteration']}."
        )
    if one["a gradient"]:
        return "a gradient", "A and B are right, but they are part of a graph: W should get no gradient."
    return "another B A", "Q is of the right iteration, but B A is not what it was in that iteration."


explain_test = explain_trial("function", "With which `quantize` would that show?")


def explain_allocation(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether the choices fit, and the first matrix whose choice is another one."""
    wanted: Any = expected.value
    given: Any = case.inputs
    if seen.changed:
        return None
    chosen: Any = seen.value
    whole = isinstance(chosen, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in chosen)
    if not whole or len(chosen) != len(wanted):
        return (
            "no list of choices",
            f"Return one index for each of the {len(wanted)} matrices. Yours is {describe(chosen)}.",
        )
    if not all(0 <= choice < given["sizes"].shape[1] for choice in chosen):
        return "no choices", f"Return indices of choices, from 0 to {given['sizes'].shape[1] - 1}. Yours are {chosen}."
    size = float(given["sizes"][torch.arange(len(chosen)), chosen].sum())
    if size > given["budget"]:
        return "over the budget", f"Your choices take {size:g}, more than the budget of {given['budget']:g}."
    return "other choices", (
        f"You choose {chosen}, which takes {size:g} of {given['budget']:g}. Follow the rule by hand: which change has "
        "the largest value at the start, which one then, and what still fits?"
    )
