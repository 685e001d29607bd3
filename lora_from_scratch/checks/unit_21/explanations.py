"""Unit 21, editing representations: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, not_a_tensor, where_right
from lora_from_scratch.checks.new_tensor import not_new
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.trial import explain_trial
from lora_from_scratch.checks.verdict import describe


def explain_rows(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether the rows are orthonormal, and whether they span the subspace."""
    wanted: Any = expected.value
    if seen.changed:
        return None
    if (found := not_new(seen.value)) is not None:
        return found
    if (found := not_a_tensor(seen.value, wanted.shape, "the result")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    result: Any = seen.value
    if result.dtype != wanted.dtype:
        return "another dtype", f"R has the dtype {wanted.dtype}, and your result {result.dtype}."
    if not result.isfinite().all():
        return "no finite numbers", "Your result contains NaN or infinity."
    Q, R = result.double(), case.inputs["R"].double()  # type: ignore[union-attr]
    if not torch.allclose(Q @ Q.T, torch.eye(len(Q), dtype=torch.float64), atol=1e-2):
        return (
            "not orthonormal",
            "The rows of your result are not orthonormal: its product with its transpose is not I.",
        )
    if not torch.allclose(R @ Q.T @ Q, R, atol=1e-2 * float(R.abs().max())):
        return "another subspace", "The rows of your result are orthonormal, but they span another subspace than R's."
    far, near = (float((one - R).norm()) for one in (Q, wanted.double()))
    return "not the nearest", (
        f"The rows of your result are orthonormal and span the right subspace, but its distance from R is {far:.3f}, "
        f"and that of the nearest such matrix {near:.3f}."
    )


def explain_change(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which part of the formula is missing, or at which positions the change is wrong."""
    one: Any = seen.value
    other: Any = expected.value
    if seen.changed:
        return None
    change, wanted = one["change"], other["change"]
    if (found := not_a_tensor(change, wanted.shape, "the change")) is not None:
        return ("another shape", found[1]) if found[0] == "shape" else found
    if same(change, wanted):
        missing = [name for name, value in other["gradients"].items() if not same(one["gradients"][name], value)]
        return "gradients", f"The change is right, but the gradient of {missing[0]} is not that of the formula."
    where: Any = case.inputs["where"]
    if where is not None:
        outside = change[~where[..., 0]]
        if outside.numel() and outside.abs().max() > 0:
            return "changed elsewhere", "Your change is not zero at positions that `where` does not mark."
    if (found := where_right(change, wanted, ("text", "token"))) is not None:
        return found
    return "another change", "Your change is another one than the formula's. Work it out for r = 1 and d = 2 on paper."


def explain_positions(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first token that is wrong, with what it is."""
    one: Any = seen.value
    masks: Any = expected.value
    if seen.changed:
        return None
    if not isinstance(one, list) or len(one) != 2:
        return "no pair", f"Return two masks. Yours is {describe(one)}."
    given: Any = case.inputs
    for name, mask, wanted in zip(("first", "last"), one, masks, strict=True):
        if (found := not_a_tensor(mask, wanted.shape, f"the mask of the {name} tokens")) is not None:
            return ("another shape", found[1]) if found[0] == "shape" else found
        if mask.dtype != torch.bool:
            return "no booleans", f"The mask of the {name} tokens should be boolean, but its dtype is {mask.dtype}."
        if torch.equal(mask, wanted):
            continue
        text, token = (int(index) for index in (mask != wanted).nonzero()[0])
        place = int(given["place"][text, token])
        what = "padding" if place < 0 else f"at place {place} of its text"
        should = "is missing from" if wanted[text, token] else "should not be in"
        return f"a wrong token in the mask of the {name} ones", (
            f"Token {token} of text {text} (counted from 0), which is {what}, {should} your mask of the {name} tokens."
        )
    return None


explain_test = explain_trial("edit", "In which mode, and with which W and b, would that show?")


def explain_search(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What was returned, then how often the loss was computed, then where P went."""
    one: Any = seen.value
    other: Any = expected.value
    if seen.changed:
        return None
    if "result" in one:
        return "no pair", f"Return the ids of the tokens and the loss. Yours is {describe(one['result'])}."
    tokens = one["tokens"]
    if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens):
        tokens = torch.tensor(tokens)
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.shape != other["tokens"].shape:
        return "no ids", f"The first result should be the ids (p,) of tokens. Yours is {describe(one['tokens'])}."
    if one["calls"] != other["calls"]:
        return "number of calls", (
            f"You compute the loss {one['calls']} times in {case.inputs['steps']} steps; it is computed once in each."
        )
    if not same(one["P"], other["P"]):
        return "another P", (
            "After the last step P is elsewhere. Which embeddings is the gradient computed at, and what is it used on?"
        )
    if not same(one["tokens"], other["tokens"]):
        return (
            "other tokens",
            "P is right in every step, but you return another prompt than the one with the lowest loss.",
        )
    return "another loss", "The tokens are the best ones, but the second result is not their loss."
