"""Unit 17, higher rank at the same price: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, first_difference, not_a_tensor, where_right
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.trial import explain_trial
from lora_from_scratch.checks.verdict import describe
from lora_from_scratch.methods.mora import fill_up

START = {  # what the messages say of each entry of the record
    "shapes": "W, A or B has another shape than it should: (out, in), (r, in) and (out, r).",
    "y": "A new layer does not compute W x. The product B A has to be zero at the start, and W the given weight.",
    "a gradient": "At the start neither A nor B gets a gradient that is not zero. The gradient of each contains the "
    "other one as a factor.",
    "trained": "The trained parameters of the layer should be A and B, and nothing else.",
    "saved": "The `state_dict` of the layer should contain W, A and B, and nothing else. A plain attribute is not "
    "saved; `register_buffer` makes a tensor part of the layer.",
    "the same seed": "Two layers that are made after the same `torch.manual_seed` differ. The random numbers should "
    "come from PyTorch's own generator.",
    "another layer": "Two layers, one made after the other, start with the same numbers. They should be drawn anew.",
    "scaling": "The attribute `scaling` of a new layer is not the s that was given.",
}
RESTART = {
    "W": "After a restart W is not W + s B A, with the A and B from before the restart.",
    "a graph": "After a restart W belongs to a graph of gradients: merging should not be recorded.",
    "a gradient": "After a restart neither A nor B gets a gradient that is not zero: the next cycle cannot learn.",
    "as before": "The layer computes something else after a restart than before. W has taken up the update, so B A "
    "has to be zero again.",
    "old numbers": "After a restart A or B is still what it was. Both start again.",
    "in place": "W, A or B is another tensor after a restart. An optimiser still holds the old one: change the values "
    "in place.",
}
_start, _restart = first_difference(START), first_difference(RESTART)


def explain_layer(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first part of the start or of the first faulty restart that differs."""
    if case.inputs["what"] == "start":
        return _start(case, seen, expected)
    one: Any = seen.value
    other: Any = expected.value
    for name in ("first", "second"):
        if (found := _restart(case, Seen(one[name]), Seen(other[name]))) is not None:
            return found
    return "the same numbers", "Two restarts, one after the other, draw the same random numbers."


explain_test = explain_trial("layer", "Which line of the statement is it for, and what would you have to compare?")


def explain_compressed(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Shapes; which entries are right; or the gradient."""
    x, q = case.inputs["x"], case.inputs["q"]
    assert isinstance(x, Tensor)
    assert isinstance(q, int)
    pieces = fill_up(x, q).unflatten(-1, (-1, q))
    likely = {
        "neighbours": (fill_up(x, q).unflatten(-1, (q, -1)).sum(-1), "You add up neighbours, in q groups."),
        "one piece": (pieces[..., 0, :], "Your result is the first q entries. Where do the others go?"),
        "mean": (pieces.mean(-2), "Your result is a mean. The entries are added up."),
    }
    return _explain(seen, expected, "(..., q)", likely, "x")


def explain_decompressed(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Shapes; which entries are right; or the gradient."""
    z, outputs = case.inputs["z"], case.inputs["outputs"]
    assert isinstance(z, Tensor)
    assert isinstance(outputs, int)
    each = -(-outputs // z.shape[-1])
    likely = {
        "each by itself": (
            z.repeat_interleave(each, -1)[..., :outputs],
            "You repeat each number by itself. They are repeated as a whole, one after the other.",
        )
    }
    return _explain(seen, expected, "(..., out)", likely, "z")


def explain_scaled(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Shapes; which columns are right; or the gradients."""
    B, scales = case.inputs["B"], case.inputs["scales"]
    assert isinstance(B, Tensor)
    assert isinstance(scales, Tensor)
    rank = B.shape[1] // len(scales)
    likely = {
        "another order": (
            B * scales.T.repeat(1, rank),
            "Neighbouring columns get the scales of different LoRAs. The first r columns all belong to LoRA 0.",
        ),
        "unscaled": (B, "Your result is B itself, without the scales."),
        "one scale each": (
            B * scales.mean(1).repeat_interleave(rank),
            "You multiply a LoRA by one number. Its c_i has one number for each output, that is for each row of B.",
        ),
    }
    return _explain(seen, expected, "(out, n r)", likely, "B and the scales", ("output", "column"))


def explain_terms(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What is no pair; else the weight, the bias or the gradients, and which terms there are."""
    one: Any = seen.value
    other: Any = expected.value
    given = case.inputs
    if seen.changed:
        return None
    if "result" in one:
        return "no pair", f"Return two things, the weight and the bias. Yours is {describe(one['result'])}."
    terms = [t for t in "ABCDE" if given.get(t) is not None]
    of = f"Given here: W, {'' if given['b'] is None else 'b, '}{', '.join(terms) or 'and no term'}."
    for name in ("weight", "bias"):
        if other[name] is None and one[name] is not None:
            return "a bias from nowhere", "The layer has no bias, so there is no new one: the second result is None."
        if other[name] is None:
            continue
        if (found := not_a_tensor(one[name], other[name].shape, f"the {name}")) is not None:
            return found
        if not same(one[name], other[name]):
            right = f"{'W + W * A + B' if name == 'weight' else 'b + b * D + E + W C'}"
            return f"another {name}", f"The {name} is not {right}, where a term is left out if it is None. {of}"
    return "gradients", f"The values are right, but not every term gets the gradient that it should. {of}"


def _explain(
    seen: Seen, expected: Seen, shape: str, likely: dict[str, tuple[Tensor, str]], of: str, axes: Any = ("entry",)
) -> Explanation:
    """What is wrong with the result or the gradients of a record of `run_with_gradients`."""
    one: Any = seen.value
    other: Any = expected.value
    result, wanted = one["result"], other["result"]
    if seen.changed:
        return None
    if isinstance(result, Tensor) and result.shape != wanted.shape:
        return _shape(tuple(result.shape), tuple(wanted.shape), shape)
    if (found := not_a_tensor(result, wanted.shape, "the result")) is not None:
        return found
    if same(result, wanted):
        return "gradients", f"The values are right, but {of} should get a gradient, and what it gets is not right."
    for name, (value, message) in likely.items():
        if value.shape == result.shape and same(result, value):
            return name, message
    if len(axes) == 1:  # the entries of the last axis
        result, wanted = result.movedim(-1, 0), wanted.movedim(-1, 0)
    return where_right(result, wanted, axes) or (
        "all wrong",
        "No entry is right. Work out the first one by hand, with the example in the notebook.",
    )


def _shape(yours: tuple[int, ...], right: tuple[int, ...], axes: str) -> tuple[str, str]:
    """Which axis is wrong."""
    end = f"The shape should be {axes}, here {right}, but yours is {yours}."
    if len(yours) != len(right):
        return "number of axes", f"Your result has too {'many' if len(yours) > len(right) else 'few'} axes. {end}"
    if yours[-1] != right[-1]:
        return "last axis", f"The last axis of your result is too {'long' if yours[-1] > right[-1] else 'short'}. {end}"
    return "leading axes", f"The leading axes of your result are not those of the input. {end}"
