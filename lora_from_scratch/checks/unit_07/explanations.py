"""Unit 07, adapters: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, first_difference, not_a_tensor, off_by
from lora_from_scratch.checks.observation import Seen

ADAPTER = {  # what the messages say of each entry of the record
    "parameters": "The parameters of your adapter, or their names, are not those of the exercise. Print "
    "`[name for name, _ in adapter.named_parameters()]`: which are missing, and which are too many?",
    "y": "With given weights, `forward` does not return the right numbers. Do one x by hand: down, nonlinearity, up, "
    "and what comes after.",
    "gradients": "At least one parameter, or x, does not get the gradient that it should. What is multiplied by zero, "
    "and what is outside the graph?",
    "distinct": "Many of your initial weights are equal. Each is drawn by itself.",
    "repeated": "The same seed does not give the same initial numbers. Which of your draws does not use the generator?",
    "other seed": "Two different seeds give the same initial numbers.",
    "following": "Two adapters that are made one after the other with one generator start with the same numbers. Draw "
    "from the generator as it is, without going back to its seed.",
    "values": "Shape or distribution of your initial numbers is not as the exercise says. Compare the standard "
    "deviation and the largest number of each parameter.",
}
BESIDE = {
    "y": "The result is not the sum of what the base returns and of what the adapter returns. Print both.",
    "kept": "`base` and `adapter` are not the modules that were given: keep these very objects.",
    "gradients": "The result is right, but the gradients of the base, the adapter or x are not.",
}
INSERTED = {
    "unchanged": "You raise the error too late: the model has been changed already. Check everything first.",
    "returned": "Return a dictionary: the adapters, by the names of their places.",
    "found under": "The keys of your dictionary are not the names of the places. Which function lists them?",
    "in the model": "You return adapters that are not in the model.",
    "number of them": "There are too many or too few adapters, or several places share one.",
    "shapes": "Your adapters have other parameters than they should. Which variant and which width do they have?",
    "dtypes": "Model and adapters have different dtypes now.",
    "devices": "Model and adapters are on different devices now.",
    "trained": "After inserting, other parameters are trained than should be, or they have other names. Print "
    "`[(name, p.requires_grad) for name, p in model.named_parameters()]` before and after.",
    "bases": "A module of the pretrained model is missing now, or was replaced by a copy.",
    "the same again": "The same seed does not give the same adapters. Which draw does not use the generator?",
    "different starts": "Two adapters start with the same numbers. They draw from the generator one after the other.",
    "y": "The adapters are where they should be, but the model with them computes something else. What is wrapped, "
    "in which wrapper, and with which scaling?",
}
REMOVED = {
    "names": "After removal the model's modules have other names than before the adapters came.",
    "the same object": "The names are right, but some module is not the object that it was before.",
    "y": "The modules are right, but the model computes something else: their parameters have changed.",
}
explain_beside, explain_removed = first_difference(BESIDE), first_difference(REMOVED)
_adapter, _inserted = first_difference(ADAPTER), first_difference(INSERTED)


def explain_count(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What is missing, or too much."""
    d, w, adapters = case.inputs["n_embd"], case.inputs["width"], case.inputs.get("adapters", 1)
    if not isinstance(seen.value, int) or not isinstance(expected.value, int) or isinstance(seen.value, bool):
        return None
    assert isinstance(d, int)
    assert isinstance(w, int)
    assert isinstance(adapters, int)
    parts = {"one matrix of one adapter": d * w, "one matrix of each adapter": adapters * d * w}
    return off_by(seen.value, expected.value, parts, of="Your count")


def explain_adapter(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether x is missing or too much, or which part of the record is wrong."""
    assert isinstance(seen.value, dict)
    assert isinstance(expected.value, dict)
    wanted = expected.value.get("y")
    if not isinstance(wanted, Tensor) or not same(seen.value.get("parameters"), expected.value["parameters"]):
        return _adapter(case, seen, expected)
    y, x = seen.value.get("y"), case.inputs["x"]
    if found := not_a_tensor(y, wanted.shape, "the result"):
        return found
    assert isinstance(y, Tensor)
    assert isinstance(x, Tensor)
    if same(y, wanted):
        return _adapter(case, seen, expected)
    if same(y, x):
        return "nothing happens", "Your `forward` returns x, whatever the weights are."
    if same(y - x, wanted):
        return "x too much", "Your result is the right one plus x."
    if same(y + x, wanted):
        return "x is missing", "Your result is the right one without x."
    return _adapter(case, seen, expected)


def explain_inserted(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether it should have been refused, or which part of the record is wrong."""
    assert isinstance(seen.value, dict)
    assert isinstance(expected.value, dict)
    if seen.value["refused"] and not expected.value["refused"]:
        return "refuses valid input", "These arguments are valid, but your code raises a ValueError."
    if expected.value["refused"] and not seen.value["refused"]:
        return "no error", "These arguments are invalid. Your code should raise a ValueError that says why."
    return _inserted(case, seen, expected)
