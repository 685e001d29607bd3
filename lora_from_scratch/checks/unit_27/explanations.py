"""Unit 27, rewards instead of references: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, not_a_tensor, where_right
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.shown_rows import first_wrong
from lora_from_scratch.checks.verdict import describe


def explain_reward(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What was counted, next to the words of the text."""
    value: Any = seen.value
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "no number", f"Return a number. Yours is {describe(seen.value)}."
    if not 0 <= value <= 1:
        return "no share", f"A share is from 0 to 1, but yours is {value:.4g}. Divide the count by the number of words."
    words = re.findall(r"[A-Za-z]+", str(case.inputs["text"]))
    if not words:
        return "no words", f"The text {case.inputs['text']!r} has no words, so its reward is 0. Yours is {value:.4g}."
    return "another share", (
        f"The words are {', '.join(words)}, and {round(float(str(expected.value)) * len(words))} of {len(words)} do "
        f"not contain the letter {case.inputs.get('letter', 'e')}. Your share is {value:.4g}."
    )


def explain_advantages(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which groups are right; else whether the mean or the scale is off."""
    wanted: Any = expected.value
    if seen.changed:
        return None
    if (found := not_a_tensor(seen.value, wanted.shape, "the result")) is not None:
        return found
    result: Any = seen.value
    if not result.isfinite().all():
        return "no finite number", "Your result contains NaN or infinity: where do you divide by 0?"
    rewards: Any = case.inputs["rewards"]
    equal = rewards.double().std(dim=1, correction=0) < 1e-6
    if equal.any() and float(result[equal].abs().max()) > 1e-3:
        return "equal rewards", (
            "The rewards of a group are equal, up to rounding, but its advantages are up to "
            f"{float(result[equal].abs().max()):.2g}. They should be 0. Do you compare the standard deviation with "
            "exactly 0? Rounding can leave a little of it: compare with 1e-6."
        )
    if float(result.mean(dim=1).abs().max()) > 1e-3 * float(1 + result.abs().max()):
        return "another baseline", (
            "The advantages of a group should add up to 0. Yours do not: the baseline is the mean of the group itself."
        )
    numbers = first_wrong(result, wanted, "group")
    if (found := where_right(result, wanted, ("group",))) is not None:
        return found[0], found[1] + numbers
    return "another scale", f"Your advantages add up to 0 in each group, but they are too large or too small.{numbers}"


def explain_tokens(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether the shape, the places or the values are wrong."""
    one: Any = seen.value
    other: Any = expected.value
    if seen.changed:
        return None
    if (found := not_a_tensor(one["values"], other["values"].shape, "the result")) is not None:
        return found
    values, wanted = one["values"], other["values"]
    if not values.isfinite().all():
        return "no finite number", (
            "Your result contains NaN or infinity. A probability that is too small for a float has the logarithm minus "
            "infinity: which function gives log-probabilities directly?"
        )
    if not torch.equal(values != 0, wanted != 0):
        return "other places", (
            "Your result is not 0 at the places where it should be, or is 0 elsewhere. Only the tokens from `begin` to "
            "`end` belong to the text, and column 0 of the result is the token at place 1."
        )
    if not same(values, wanted):
        found = where_right(values, wanted, ("text", "column")) or (
            "other values",
            "The right places are filled, but with other numbers than the log-probabilities of the tokens there.",
        )
        return found[0], found[1] + first_wrong(values, wanted, "text")
    if one["gradient"] is None:
        return "no gradient", "The values are right, but no gradient flows back into the logits."
    return "another gradient", "The values are right, but the gradient with respect to the logits is not."


def explain_loss(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether it is a number, has a gradient, and whether one flows into the advantages."""
    one: Any = seen.value
    other: Any = expected.value
    if seen.changed:
        return None
    loss = one["loss"]
    if (found := not_a_tensor(loss, (), "the loss")) is not None:
        return found
    if one["gradient"] is None:
        return (
            "no gradient",
            "No gradient flows from your loss into the log-probabilities, so nothing would be learned.",
        )
    if not loss.isfinite():
        return "no finite number", "Your loss is NaN or infinite: is a text empty?"
    if one["gradient of the advantages"]:
        return "advantages get a gradient", "A gradient flows into the advantages. They are constants: detach them."
    if not same(loss, other["loss"]):
        return "another loss", f"Your loss is {float(loss):.4g} here, and it should be {float(other['loss']):.4g}."
    return "another gradient", "The loss is right, but its gradient is not."


def explain_divergence(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether it is negative, or off by a factor."""
    wanted: Any = expected.value
    if seen.changed:
        return None
    if (found := not_a_tensor(seen.value, (), "the result")) is not None:
        return found
    result: Any = seen.value
    if not result.isfinite():
        return "no finite number", "Your result is NaN or infinite. Do you divide by the length of a single text?"
    if float(result) < 0:
        return "negative", f"Your result is {float(result):.4g}, but the mean of k3 is never negative."
    return "another number", (
        f"Your result is {float(result):.4g} here, and it should be {float(wanted):.4g}. Compute k3 of each token on "
        "paper, and divide their sum by the number of tokens."
    )
