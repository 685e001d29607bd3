"""Unit 18, rank where it matters: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, not_a_tensor
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.trial import explain_trial
from lora_from_scratch.checks.verdict import describe


def explain_layer(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What is no pair; else the first thing that differs."""
    one: Any = seen.value
    other: Any = expected.value
    if case.inputs["what"] == "distances":
        found = not_a_tensor(one["distances"], (2,), "the distances")
        if found is None and not same(one["distances"], other["distances"]):
            wrong = [
                name for name, s, e in zip("AB", one["distances"], other["distances"], strict=True) if not same(s, e)
            ]
            found = (
                "other distances",
                (
                    f"The distance of {' and that of '.join(wrong)} is wrong. Yours are {_numbers(one['distances'])} "
                    f"for A and B; they should be {_numbers(other['distances'])}."
                ),
            )
        return found or ("no gradient", "The distances are right, but no gradient flows from them to A and to B.")
    if "result" in one:
        return "no pair", f"`factors` returns two tensors, diag(E) A and B. Yours is {describe(one['result'])}."
    for name in ("diag(E) A", "B"):
        if (found := not_a_tensor(one[name], other[name].shape, name)) is not None:
            return found
        if not same(one[name], other[name]):
            right = same(one["y"], other["y"])
            rest = " The output of the layer is right all the same: E must not be in both." if right else ""
            return f"another {name}", f"`factors` returns another {name} than it should.{rest}"
    return "gradients", "The factors are right, but A, E or B does not get the gradient that it should."


def _numbers(values: Tensor) -> str:
    return " and ".join(f"{float(value):.3g}" for value in values)


def explain_sensitivity(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What is no pair; else which of the two is wrong."""
    one: Any = seen.value
    other: Any = expected.value
    if seen.changed:
        return None
    if not isinstance(one, list) or len(one) != 2:
        return "no pair", f"Return two tensors, the sensitivity and the uncertainty. Yours is {describe(one)}."
    for name, s, e in zip(("the new sensitivity", "the new uncertainty"), one, other, strict=True):
        if (found := not_a_tensor(s, e.shape, name)) is not None:
            return found
        if not same(s, e):
            other_right = " The other result is right." if same(one[1], other[1]) or same(one[0], other[0]) else ""
            return name.removeprefix("the new "), f"{name.capitalize()} is wrong.{other_right}"
    return None


def explain_scores(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which of the three parts is missing, or counted in another way."""
    one: Any = seen.value
    other: Any = expected.value
    if (found := not_a_tensor(one, other.shape, "the scores")) is not None:
        return found
    given: Any = case.inputs
    A, E, B = (given["sensitivity"][part] * given["uncertainty"][part] for part in ("lora_A", "lora_E", "lora_B"))
    parts = {"A": A.mean(dim=1), "E": E.flatten(), "B": B.mean(dim=0)}
    for name, part in parts.items():
        if same(one, other - part):
            return f"without {name}", f"The part of {name} is missing in your scores."
        if same(one, part):
            return f"only {name}", f"Your scores have only the part of {name}."
    return "other scores", (
        f"The first triplet has the parts {float(parts['E'][0]):.3g} (E), {float(parts['A'][0]):.3g} (A) and "
        f"{float(parts['B'][0]):.3g} (B), and its score is their sum. Yours is {float(one[0]):.3g}."
    )


def explain_budget(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """In which phase the budget is wrong, and how."""
    one: Any = seen.value
    other: Any = expected.value
    if isinstance(one, Tensor) and one.ndim == 0:
        one = one.item()
    if isinstance(one, bool) or not isinstance(one, int | float):
        return "no number", f"Return a whole number. Yours is {describe(one)}."
    step, first, last = (case.inputs[name] for name in ("step", "first", "last"))
    assert isinstance(step, int)
    assert isinstance(first, int)
    assert isinstance(last, int)
    if isinstance(one, float) and int(one) == other and one != other:
        return "not whole", f"The budget is a number of triplets, rounded down. Yours is {one:.4g}."
    phase = "before the fall" if step <= first else "after the fall" if step >= last else "during the fall"
    return phase, (
        f"Step {step} comes {phase}, which is from step {first} to step {last}. Your budget there is {one:.6g}. "
        f"It should be {other}."
    )


def explain_allocation(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Shapes, then numbers, then which triplets."""
    one: Any = seen.value
    other: Any = expected.value
    if seen.changed:
        return None
    if not isinstance(one, list) or len(one) != len(other):
        return "no masks", f"Return a list with a mask for each of the {len(other)} matrices. Yours is {describe(one)}."
    for place, (s, e) in enumerate(zip(one, other, strict=True), 1):
        if (found := not_a_tensor(s, e.shape, f"mask {place}")) is not None:
            return found
    mine, right = torch.cat([mask.double() for mask in one]), torch.cat([mask.double() for mask in other])
    if not ((mine == 0) | (mine == 1)).all():
        return "other values", "A mask has only ones and zeros."
    if mine.sum() != right.sum():
        return "number", f"You keep {int(mine.sum())} triplets. The budget is {case.inputs['budget']}."
    if (mine != right).all():
        return "the wrong way round", "You keep just the triplets that should be cut."
    scores = torch.cat([score.flatten() for score in case.inputs["scores"]])  # type: ignore[union-attr]
    if same(scores[mine > 0].sort().values, scores[right > 0].sort().values):
        return "equal scores", (
            "Among triplets with equal scores you do not keep the first ones. `topk`, or an ascending sort that is "
            "read from its end, does not promise that order."
        )
    return "other triplets", "You keep as many triplets as the budget allows, but not the best ones of all matrices."


explain_test = explain_trial("loop", "What would a function that is called at that moment see?")
