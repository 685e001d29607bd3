"""Unit 26, a real model: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, first_difference, not_a_tensor
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.verdict import describe
from lora_from_scratch.gpt2.model import IGNORE_INDEX

explain_add_lora = first_difference(
    {
        "error": "A name that matches no linear layer should raise a ValueError, and nothing else should.",
        "replaced": "Other layers are replaced than should be, or none. Compare the names in the case with your rule.",
        "calls": "`make_layer` is called another number of times than there are chosen layers.",
        "contains": "A new module does not contain the layer in whose place it is.",
        "others": "A module that was not chosen is no longer the object that it was.",
        "old parameters trained": "`requires_grad` is wrong for parameters that the model had before: nothing of them "
        "is trained, and after an error they are as before.",
        "new parameters trained": "What `make_layer` has added is not trained.",
        "returned": "The returned names are not those of the chosen layers, in the order of `named_modules()`.",
    }
)


def explain_matrices(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first matrix that is missing or has another shape."""
    one: Any = seen.value
    wanted: Any = expected.value
    if not isinstance(one, dict):
        return "no dictionary", f"Return a dictionary of seven names. Yours is {describe(one)}."
    if lost := [name for name in wanted if name not in one]:
        return "a matrix is missing", f"Your dictionary has no {lost[0]!r}."
    if extra := [name for name in one if name not in wanted]:
        return "another matrix", f"Your dictionary has {extra[0]!r}, which is not one of the seven."
    for name, pair in wanted.items():
        if one[name] != pair:
            if isinstance(one[name], list) and one[name][::-1] == pair:
                return "turned", f"{name} should be given as (in, out), and yours is (out, in)."
            return f"another {name}", f"The shape of {name} is wrong here: {describe(one[name])}. What goes in and out?"
    return None


def explain_weights(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which weights of the first block are right."""
    wanted: Any = expected.value
    if seen.changed or expected.raised:
        return None
    if (found := not_a_tensor(seen.value, wanted.shape, "the result")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    result: Any = seen.value
    if result.dtype != wanted.dtype:
        return "dtype", f"The result should be float32, and yours is {str(result.dtype).removeprefix('torch.')}."
    right = (result - wanted).abs() <= 1e-4 * wanted.abs().max()
    if right.all():
        return None
    place = int((~right[0]).nonzero()[0]) if not right[0].all() else 0
    row = 0 if not right[0].all() else int((~right.all(dim=1)).nonzero()[0])
    return "a wrong weight", (
        f"Weight {place} of row {row} should be {float(wanted[row, place]):.4g}, and yours is "
        f"{float(result[row, place]):.4g}. Which four bits are its code, and which bytes its scale and minimum?"
    )


def explain_labels(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first label that is wrong, and its place."""
    wanted: Any = expected.value
    if seen.changed:
        return None
    if (found := not_a_tensor(seen.value, wanted.shape, "the result")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    labels: Any = seen.value
    row, place = map(int, (labels != wanted).nonzero()[0])
    ids: Any = case.inputs["input_ids"]
    should = "should not be learned" if int(wanted[row, place]) == IGNORE_INDEX else "should be learned"
    return "a wrong label", (
        f"In row {row}, {ids[row].tolist()}, the token in place {place} {should}, and your label there is "
        f"{int(labels[row, place])}."
    )


def explain_batch(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Too many or too few."""
    one: Any = seen.value
    if isinstance(one, bool) or not isinstance(one, int | float):
        return "no number", f"Return a whole number. Yours is {describe(one)}."
    if one != int(one):
        return "not whole", f"Your result is {one}. Only whole texts can be in a batch."
    if expected.raised:
        return "no error", "Here the weights, gradients and optimiser alone take more than the memory."
    wanted: Any = expected.value
    kind = "too many" if one > wanted else "too few"
    return kind, f"Your batch has {int(one)} texts here, {kind}. Which part of the memory do you count differently?"
