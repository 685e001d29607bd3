"""Unit 03, GPT-2: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, not_a_tensor, where_right
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.unit_03.probes import DRAWS

AXES = ("text", "head", "token")


# --- Attention ---------------------------------------------------------------------------------------


def explain_heads(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which axes there are, or for which head it is right."""
    x, heads = case.inputs["x"], case.inputs["n_head"]
    y, wanted = seen.value, expected.value
    assert isinstance(x, Tensor)
    assert isinstance(heads, int)
    assert isinstance(wanted, Tensor)
    sizes = {"B": len(x), "T": x.shape[1], "H": heads, "hd": x.shape[2] // heads}
    named = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    if isinstance(y, Tensor) and y.shape != wanted.shape:
        return "other axes", (
            f"Here {named}. The result should have the axes (B, H, T, hd), so the shape {tuple(wanted.shape)}; yours "
            f"has the shape {tuple(y.shape)}. Write down which axis of yours is which."
        )
    if found := not_a_tensor(y, wanted.shape, "the result"):
        return found
    assert isinstance(y, Tensor)
    return where_right(y, wanted, AXES) or (
        "other columns",
        f"Here {named}. Head 0 of token 0 should have the numbers {_row(wanted[0, 0, 0])}, the first {sizes['hd']} "
        f"columns of that token, but has {_row(y[0, 0, 0])}; the last head of the last token should have "
        f"{_row(wanted[0, -1, -1])}, but has {_row(y[0, -1, -1])}.",
    )


def explain_mask(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The shape, or the first query whose row is wrong."""
    mask, wanted = seen.value, expected.value
    tokens, keys = case.inputs["tokens"], case.inputs["keys"]
    if not isinstance(wanted, Tensor):
        return None
    if isinstance(mask, Tensor) and mask.shape != wanted.shape:
        return "other axes", (
            f"There are {tokens} queries and {keys} keys here, so the mask should have {tokens} rows and {keys} "
            f"columns: the shape {tuple(wanted.shape)}. Yours has the shape {tuple(mask.shape)}."
        )
    if found := not_a_tensor(mask, wanted.shape, "the mask"):
        return found
    assert isinstance(mask, Tensor)
    differs = (mask != wanted).any(dim=1).nonzero()
    if not len(differs):
        return None  # the dtype
    row = int(differs[0])
    sees = [str(place) for place in mask[row].nonzero().flatten().tolist()]
    right = [str(place) for place in wanted[row].nonzero().flatten().tolist()]
    return "another row", (
        f"Counted from 0, query {row} of {tokens} should see the keys {', '.join(right)} of {keys}, but in your mask "
        f"it sees {', '.join(sees) or 'none'}."
    )


def explain_attention(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The shape, where the result is right, or whether it can be a mean of the values."""
    y, wanted, v = seen.value, expected.value, case.inputs["v"]
    assert isinstance(wanted, Tensor)
    assert isinstance(v, Tensor)
    if isinstance(y, Tensor) and y.shape != wanted.shape:
        return "other axes", (
            f"The result should be shaped like the queries, {tuple(wanted.shape)}: one weighted mean of values for "
            f"each query. Yours has the shape {tuple(y.shape)}. Is it multiplied by the values?"
        )
    if found := not_a_tensor(y, wanted.shape, "the result"):
        return found
    assert isinstance(y, Tensor)
    if not bool(y.isfinite().all()):
        return "no finite mean", (
            "Some numbers are NaN or infinite. Is a query left without any key that it may see, or is minus infinity "
            "added after the softmax?"
        )
    low, high = v.amin(dim=2, keepdim=True) - 1e-4, v.amax(dim=2, keepdim=True) + 1e-4
    if bool(((y < low) | (y > high)).any()):
        return "not a mean of the values", (
            "The output is a weighted mean of the values: none of its numbers can be larger than the largest value of "
            "its column, or smaller than the smallest. Some of yours are. Do the weights of each query sum to 1, and "
            "are they applied to the values?"
        )
    return where_right(y, wanted, AXES) or (
        "other weights",
        "Your numbers lie between the smallest and the largest value, as those of a weighted mean do, but the weights "
        "are wrong. For the last query of the first head, compute its scores with each key by hand, scale them, and "
        "take their softmax.",
    )


# --- The block ---------------------------------------------------------------------------------------


def explain_gelu(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The fraction of x that passes, and what the tanh is taken of."""
    y, wanted, x = seen.value, expected.value, case.inputs["x"]
    assert isinstance(wanted, Tensor)
    assert isinstance(x, Tensor)
    if not isinstance(y, Tensor) or y.shape != wanted.shape:
        return not_a_tensor(y, wanted.shape, "the result")
    error = (y - wanted).abs().nan_to_num(math.inf)
    if not bool(error.max() > 0):
        return None
    place = int(error.argmax())
    at, given, right = (float(one.flatten()[place]) for one in (x, y, wanted))
    message = f"At x = {at:.4g} the result should be {right:.5g}, but yours is {given:.5g}. "
    if not math.isfinite(given):
        return "no finite number", message + "Which of your operations overflows, or divides by 0?"
    if at == 0:
        return "not 0 at 0", message + "What multiplies the whole formula?"
    gate = given / at
    if not 0 < gate < 1:
        return "no fraction", message + (
            f"That is {gate:.4g} times x, but `0.5 (1 + tanh(...))` lies between 0 and 1, whatever the tanh is taken "
            "of. Check what is inside which parentheses."
        )
    inside, meant = math.atanh(2 * gate - 1), math.sqrt(2 / math.pi) * (at + 0.044715 * at**3)
    return "another argument of the tanh", message + (
        f"Your tanh would be that of {inside:.4g}; it should be taken of {meant:.4g}. Check the constants, the power "
        "and the parentheses inside it."
    )


def explain_block(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first part that reads something else than it should, or what becomes of their outputs."""
    if not isinstance(seen.value, dict) or not isinstance(expected.value, dict):
        return None
    y, wanted = seen.value["y"], expected.value["y"]
    read, right = seen.value["read"], expected.value["read"]
    assert isinstance(wanted, Tensor)
    assert isinstance(read, dict)
    assert isinstance(right, dict)
    if found := not_a_tensor(y, wanted.shape, "the result"):
        return found
    if same(y, wanted):
        return None  # the input is changed
    reads = {
        "norm_1": "`norm_1` should read x, the stream as it comes in",
        "attention": "`attention` should read what `norm_1` returns",
        "norm_2": "`norm_2` should read x plus what the attention returns",
        "mlp": "`mlp` should read what `norm_2` returns",
    }
    for name, should in reads.items():
        calls, meant = read[name], right[name]
        assert isinstance(calls, list)
        assert isinstance(meant, list)
        if not calls:
            return f"{name} is not used", f"Your block never calls `{name}`."
        if not any(same(call, meant[0]) for call in calls):
            return f"what {name} reads", f"{should}; in your block it reads something else."
        if not all(same(call, meant[0]) for call in calls):
            return f"{name} is called twice", (
                f"Your block calls `{name}` {len(calls)} times, not always with what it should read: {should}."
            )
    return "the last sum", (
        "All four parts read what they should. The result is x plus what the attention returns plus what the MLP "
        "returns; yours is not. What do you return?"
    )


# --- The loss, and drawing a token -------------------------------------------------------------------


def explain_loss(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The loss that is expected; or the gradient."""
    if not isinstance(seen.value, dict) or not isinstance(expected.value, dict):
        return None
    loss, wanted, labels = seen.value["loss"], expected.value["loss"], case.inputs["labels"]
    assert isinstance(wanted, Tensor)
    assert isinstance(labels, Tensor)
    if isinstance(loss, int | float):
        loss = torch.tensor(float(loss))
    if not isinstance(loss, Tensor) or loss.ndim:
        return not_a_tensor(loss, (), "the loss")
    if same(loss, wanted):
        return "another gradient", (
            "The loss is right, but its gradient with respect to the logits is not. Which logits does it depend on?"
        )
    counting = int((labels[:, 1:] != -100).sum())
    if not bool(loss.isfinite()):
        return "no finite loss", f"Your loss is {float(loss)}; it should be {float(wanted):.4f}. {_overflow(counting)}"
    if not counting:
        return "no label counts", f"No label counts here, so the loss should be 0; yours is {float(loss):.4g}."
    return "another loss", (
        f"Your loss is {float(loss):.4f}, but it should be {float(wanted):.4f}: the mean of {counting} cross-entropies "
        "here, one for each label after the first of its text that is not -100."
    )


def explain_top_p(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which tokens of the first wrong row are kept."""
    if not isinstance(seen.value, dict) or not isinstance(expected.value, dict):
        return None
    y, wanted, logits, p = seen.value["logits"], expected.value["logits"], case.inputs["logits"], case.inputs["p"]
    assert isinstance(wanted, Tensor)
    assert isinstance(logits, Tensor)
    if not isinstance(y, Tensor) or y.shape != wanted.shape:
        return not_a_tensor(y, wanted.shape, "the result")
    if "logits" in seen.changed:
        return None
    if not seen.value["a new tensor"]:
        return "no new tensor", "Your code returns the caller's own tensor. Return a new one (`.clone()`)."
    rows = zip(*(one.reshape(-1, one.shape[-1]) for one in (y, wanted, logits)), strict=True)
    for mine, right, row in rows:
        kept, meant = mine != -math.inf, right != -math.inf
        if bool(mine.isnan().any()):
            return "not a number", "Some logits of your result are NaN."
        if bool((mine[kept] != row[kept]).any()):
            return "other logits", (
                "The tokens that are kept have other logits than before in your result, or dropped ones have another "
                "number than minus infinity."
            )
        if not same(mine.sort().values, right.sort().values):
            ordered, probability = row.softmax(-1).sort(descending=True).indices, row.softmax(-1)
            shown = ", ".join(f"{int(token)}: {probability[token]:.3g}" for token in ordered[:6])
            return "other tokens", (
                f"For p = {p:g} {int(meant.sum())} of {len(row)} tokens should be kept: {_places(meant)}. Your code "
                f"keeps {_places(kept)}. The probabilities, from the largest: {shown}"
                f"{', ...' if len(row) > 6 else ''}."
            )
    return None


def explain_draws(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which tokens come that should not, or the other way round; or the generator."""
    if not isinstance(seen.value, dict) or not isinstance(expected.value, dict):
        return None
    tokens, wanted = seen.value["tokens that come"], expected.value["tokens that come"]
    if tokens == wanted:
        return "not the same again", (
            "The right tokens come, but the same state of the generator does not give the same tokens again."
        )
    return "other tokens", (
        f"In {DRAWS} draws the tokens {_listed(tokens)} come, but it should be {_listed(wanted)}. Compute the "
        "probabilities after the temperature and the filters by hand."
    )


def _row(numbers: Tensor) -> str:
    return "[" + ", ".join(f"{number:.4g}" for number in numbers.tolist()) + "]"


def _places(kept: Tensor) -> str:
    places = [str(place) for place in kept.nonzero().flatten().tolist()]
    return f"{'token' if len(places) == 1 else 'tokens'} {', '.join(places)}" if places else "none"


def _listed(tokens: Any) -> str:
    return ", ".join(map(str, tokens)) if isinstance(tokens, list) else str(tokens)


def _overflow(counting: int) -> str:
    if not counting:
        return "No label counts here: what do you divide by?"
    return "Is a logarithm taken of a probability that is rounded to 0?"
