"""Unit 25, not only language: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, not_a_tensor, where_right
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.verdict import describe


def explain_patches(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first patch that is wrong: other pixels, or the right ones in another order."""
    wanted: Any = expected.value
    if seen.changed or expected.raised or not isinstance(wanted, Tensor):
        return None
    if (found := not_a_tensor(seen.value, wanted.shape, "the result")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    result: Any = seen.value
    for number, (one, other) in enumerate(zip(result[0], wanted[0], strict=True)):
        if not same(one, other):
            if same(one.sort().values, other.sort().values):
                return "another order", f"Patch {number} has the right pixels, but in another order than row by row."
            if any(same(one.sort().values, patch.sort().values) for patch in wanted[0]):
                return "another patch", f"Where patch {number} should be you have another patch. Which comes first?"
            return "other pixels", f"The pixels of your patch {number}, counted from 0, do not form a square."
    return None


def explain_norms(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first part whose number is wrong."""
    one, other = seen.value, expected.value
    if seen.changed or expected.raised or not isinstance(other, dict):
        return None
    if not isinstance(one, dict):
        return "no dictionary", f"Return a dictionary, part -> number. Yours is {describe(one)}."
    if set(one) != set(other):
        return "other parts", f"Your dictionary has the keys {', '.join(one)} instead of {', '.join(other)}."
    for part, number in other.items():
        mine = one[part]
        if not isinstance(mine, int | float) and not (isinstance(mine, Tensor) and mine.ndim == 0):
            return "no number", f"The value of {part} should be a number, but yours is {describe(mine)}."
        if not same(float(mine), number):
            return "another number", f"For the part {part} you have {float(mine):.4g} instead of {number:.4g}."
    return None


def explain_forgotten(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first class whose share is wrong, with its pictures."""
    wanted: Any = expected.value
    if seen.changed:
        return None
    if (found := not_a_tensor(seen.value, wanted.shape, "the result")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    given: Any = case.inputs
    for number, (one, other) in enumerate(zip(seen.value, wanted, strict=True)):  # type: ignore[arg-type]
        if not same(one, other):
            mine = given["labels"] == number
            known = mine & (given["before"] == number)
            lost = int((known & (given["after"] != number)).sum())
            return "another share", (
                f"Class {number} has {int(mine.sum())} pictures, of which {int(known.sum())} were known and {lost} of "
                f"these are wrong now. Your share is {float(one):.4g}."
            )
    return None


def explain_noisy(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """For which pictures it is right, or the factors of the picture and the noise."""
    wanted: Any = expected.value
    if seen.changed:
        return None
    if (found := not_a_tensor(seen.value, wanted.shape, "the result")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    result: Any = seen.value
    if (where := where_right(result, wanted, ("picture",))) is not None:
        return where
    if not result.isfinite().all():
        return "no finite number", "Your result contains NaN or infinity. Of which number do you take the root?"
    given: Any = case.inputs
    both = torch.stack([given["x"][0].flatten(), given["noise"][0].flatten()], dim=1)
    mine, right = (
        torch.linalg.lstsq(both, y[0].flatten()[:, None].float()).solution.flatten().tolist() for y in (result, wanted)
    )
    return "other factors", (
        f"At step {int(given['t'][0])} your result is about {mine[0]:.3f} times the picture plus {mine[1]:.3f} times "
        f"the noise; it should be {right[0]:.3f} and {right[1]:.3f}."
    )


def explain_step(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether the noise, or the rest, has the wrong factor."""
    wanted: Any = expected.value
    if seen.changed:
        return None
    if (found := not_a_tensor(seen.value, wanted.shape, "the result")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    result: Any = seen.value
    given: Any = case.inputs
    if not result.isfinite().all():
        return "no finite number", (
            "Your result contains NaN or infinity. Is something that you divide by 0, or is your variance negative? "
            "alpha_t is at most 1."
        )
    error, noise = (result - wanted).flatten(), given["noise"].flatten()
    factor = float((error @ noise) / (noise @ noise))
    if same(error, factor * noise, 1e-2):
        return (
            "noise",
            f"At t = {given['t']} the mean is right, but not the factor of the noise: it is off by {factor:.3g}.",
        )
    hint = (
        "are all its pixels between -1 and 1?"
        if "clipped" in case.name and "nothing" not in case.name
        else ("then look which factor belongs to x_0 and which to x_t.")
    )
    return "mean", f"At t = {given['t']} your result is wrong apart from the noise. Print x_0 first: {hint}"
