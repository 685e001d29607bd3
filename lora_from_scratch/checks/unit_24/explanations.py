"""Unit 24, when adapters meet: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, first_difference, not_a_tensor
from lora_from_scratch.checks.new_tensor import not_new
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.trial import explain_trial
from lora_from_scratch.checks.verdict import describe

DROPPED = {  # what the messages say of each entry of the record
    "a new tensor": "Your result is the update itself, or shares its memory. It should be a new tensor.",
    "always as many": "The same number of entries is dropped in every draw. Each entry is dropped by itself, so that "
    "the number varies.",
    "the share that is dropped": "Another share of the entries becomes zero than `drop_rate`.",
    "one factor": "The kept entries are not all multiplied by the same factor.",
    "the factor of what is kept": "The kept entries are multiplied by another factor than 1 / (1 - drop_rate).",
    "whole rows or columns": "Whole rows or columns are dropped together. Each entry is dropped by itself.",
    "the same seed": "Two generators with the same seed give different results. Which draw does not use the generator?",
    "another seed": "Two generators with different seeds give the same result.",
    "PyTorch's, the same seed": "Without a generator the numbers should come from PyTorch's own, which "
    "`torch.manual_seed` sets. After the same seed yours are not the same.",
    "PyTorch's, another seed": "Without a generator your result is the same whatever `torch.manual_seed` was given.",
}
_dropped = first_difference(DROPPED)


def explain_sum(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What is no pair of matrices; else whether there are cross terms, or another weight."""
    one: Any = seen.value
    other: Any = expected.value
    given: Any = case.inputs
    if seen.changed:
        names = "weights" if seen.changed == ("weights",) else "pairs"
        return "changes its input", (
            f"Your code modifies {names} in place. The caller may still need the original, so work on a copy "
            "(`.clone()`)."
        )
    if "result" in one:
        return "no pair", f"Return two tensors, A and B. Yours is {describe(one['result'])}."
    if one["update"] is None:
        return "do not fit", f"A has the shape {one['shapes'][0]} and B {one['shapes'][1]}: B A cannot be formed."
    if not isinstance(one["update"], Tensor) or one["update"].shape != other["update"].shape:
        return "shape of the update", "Your B A has another shape than the update of one LoRA, (out, in)."
    if same(one["update"], other["update"]):
        return "shapes", (
            f"B A is right, but A and B have the shapes {one['shapes'][0]} and {one['shapes'][1]}. The inner axis "
            "should be as long as all ranks together."
        )
    rest = one["update"] - other["update"]
    for i, A in enumerate(given["As"]):
        for j, B in enumerate(given["Bs"]):
            if i != j and A.shape[0] == B.shape[1] and float(_share(rest, B, A)) > 0.9:
                return "cross terms", "Your update contains a product of one LoRA's B with the A of another."
    return "another sum", "Your B A is not the sum of w_i B_i A_i. Work it out for two LoRAs of rank 1 on paper."


def _share(rest: Tensor, B: Tensor, A: Tensor) -> float:
    """The cosine between two matrices."""
    product = B @ A
    return float((rest * product).sum().abs() / (rest.norm() * product.norm() + 1e-12))


explain_test = explain_trial("function", "With which LoRAs and weights would that show?")


def explain_trimmed(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """How many are kept, and which."""
    wanted: Any = expected.value
    if seen.changed:
        return None
    if (found := not_new(seen.value)) is not None:
        return found
    if (found := not_a_tensor(seen.value, wanted.shape, "the result")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    result: Any = seen.value
    update: Any = case.inputs["update"]
    kept, should = int((result != 0).sum()), int((wanted != 0).sum())
    if kept != should:
        return (
            "number",
            f"Your result has {kept} entries that are not zero. Here {should} of {update.numel()} are kept.",
        )
    if not torch.equal((result != 0), (wanted != 0)):
        return "other places", "As many entries are kept as should be, but not those with the largest magnitudes."
    return "other values", "The right entries are kept, but they do not keep their values."


def explain_agreeing(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first entry that is wrong, with the values that meet there."""
    wanted: Any = expected.value
    if (found := not_a_tensor(seen.value, wanted.shape, "the result")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    result: Any = seen.value
    updates: Any = case.inputs["updates"]
    if seen.changed or not result.isfinite().all():
        return None if seen.changed else ("no finite number", "Your result contains NaN or infinity: a division by 0?")
    wrong = ((result - wanted).abs() > 1e-4).flatten().nonzero().flatten()
    place = int(wrong[0])
    values = ", ".join(f"{float(value):.3g}" for value in updates.flatten(1)[:, place])
    return "a wrong entry", (
        f"Where the updates have the values {values}, your result is {float(result.flatten()[place]):.3g}. Which sign "
        "has their sum, and what is the mean of those that have it?"
    )


def explain_dropped(case: Case, seen: Seen, expected: Seen) -> Explanation:
    one: Any = seen.value
    if "result" in one:
        return "no such tensor", f"Return a tensor of the shape of the update. Yours is {describe(one['result'])}."
    return None if seen.changed else _dropped(case, seen, expected)


def explain_intruders(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Too many or too few."""
    one: Any = seen.value
    other: Any = expected.value
    if isinstance(one, Tensor) and one.ndim == 0:
        one = one.item()
    if isinstance(one, bool) or not isinstance(one, int | float):
        return "no number", f"Return a whole number. Yours is {describe(seen.value)}."
    kind = "too many" if one > other else "too few"
    return kind, (
        f"You count {one} of {case.inputs['leading']} vectors, {kind}: {other} have cosines below the threshold "
        "with every left singular vector of W."
    )
