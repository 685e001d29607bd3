"""Unit 06, prefix tuning: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, not_a_tensor, off_by, where_right
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.gpt2.model import causal_attention

AXES = ("text", "head", "token")
GRADIENTS = (
    "another gradient",
    "The result is right, but the gradients of what is trained are not. Is a part of the calculation outside the graph "
    "(`detach`, `.data`, `no_grad`)?",
)


def explain_attention(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The shape, the gradients, where the result is right, or whether it can be a mean of the values."""
    y, wanted, given = _results(case, seen, expected, "y")
    if (found := not_a_tensor(y, wanted.shape, "the result")) or same(y, wanted):
        return found or _gradients(seen, expected)
    values = torch.cat([given["prefix_v"].expand(len(y), -1, -1, -1), given["v"]], dim=2)
    low, high = values.amin(dim=2, keepdim=True) - 1e-4, values.amax(dim=2, keepdim=True) + 1e-4
    if bool(((y < low) | (y > high)).any()):
        return "not a mean of the values", (
            "The output of attention is a weighted mean of the values, of the prefix and of the text: none of its "
            "numbers can be larger than the largest of them or smaller than the smallest. Some of yours are. Do the "
            "weights come from one softmax, and are they applied to the values?"
        )
    return where_right(y, wanted, AXES) or (
        "other weights",
        "Your numbers lie between the smallest and the largest value, as those of a weighted mean do, but the weights "
        "are wrong, or they belong to other values. For the last token, write down which keys it is compared with, and "
        "which values belong to them.",
    )


def explain_share(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The shape, the range, or for which texts, heads or tokens it is right."""
    y, wanted, _ = _results(case, seen, expected, "share")
    if (found := not_a_tensor(y, wanted.shape, "the result")) or same(y, wanted):
        return found
    if not bool(y.isfinite().all()):
        return "no finite share", (
            "Some shares are NaN or infinite. Is a whole row of scores hidden by the mask, or does an `exp` overflow?"
        )
    if bool(((y < -1e-6) | (y > 1 + 1e-6)).any()):
        return "no share", "A share lies between 0 and 1, but some of your numbers do not. Which numbers do you add?"
    if bool((y == 1).all()) or bool((y == 0).all()):
        return "all or nothing", f"All your shares are {y.flatten()[0]:g}: which of the columns do you add up?"
    return where_right(y, wanted, AXES) or (
        "other weights",
        "Your numbers lie between 0 and 1, but they are other shares. The first token sees the prefix and itself: "
        "compute its P + 1 scores by hand, and their softmax.",
    )


def explain_split(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """How many pairs, which of them is wrong, or the gradient."""
    assert isinstance(seen.value, dict)
    assert isinstance(expected.value, dict)
    pairs, wanted = seen.value["pairs"], expected.value["pairs"]
    assert isinstance(wanted, list)
    if not isinstance(pairs, list):
        return not_a_tensor(None, (), "") if pairs is None else ("another type", "Return a list of pairs (K, V).")
    if len(pairs) != len(wanted):
        return "number of pairs", f"There should be one pair per layer, {len(wanted)}, but you return {len(pairs)}."
    for layer, (pair, right) in enumerate(zip(pairs, wanted, strict=True)):
        if not isinstance(pair, list) or len(pair) != 2:
            return "no pair", f"What you return for layer {layer} is not a pair (K, V)."
        assert isinstance(right, list)
        for kind, one, other in zip("KV", pair, right, strict=True):
            assert isinstance(other, Tensor)
            if found := not_a_tensor(one, other.shape, f"{kind} of layer {layer}"):
                return ("another shape", found[1]) if found[0] == "shape" else found
            if not same(one, other):
                return "another part of the row", _place(one, other, f"{kind} of layer {layer}")
    if same(seen.value["gradient"], expected.value["gradient"]):
        return None  # the dtype
    return "another gradient", "The numbers are right, but the gradient that reaches the prefix through them is not."


def explain_count(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What is missing, or too much."""
    given, wanted = case.inputs, expected.value
    n_layer, d, length, m = (given.get(name) for name in ("n_layer", "n_embd", "length", "hidden"))
    if not isinstance(seen.value, int) or not isinstance(wanted, int) or isinstance(seen.value, bool):
        return None
    assert isinstance(n_layer, int)
    assert isinstance(d, int)
    assert isinstance(length, int)
    row = 2 * n_layer * d
    parts = {"what a prefix of P rows has": length * row}
    if isinstance(m, int):
        first, second = {"the first linear layer's weight": d * m}, {"the second linear layer's weight": m * row}
        parts = {"what P embeddings have": length * d} | first | second
    return off_by(seen.value, wanted, parts, of="Your count")


def explain_gated(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The shape, the gradients, where the result is right, or by how much it differs from attention to the text."""
    y, wanted, given = _results(case, seen, expected, "y")
    if (found := not_a_tensor(y, wanted.shape, "the result")) or same(y, wanted):
        return found or _gradients(seen, expected)
    text, gate = causal_attention(given["q"], given["k"], given["v"]), torch.tanh(given["gate"])
    if same(y, text):
        return "no prompt", "Your result is the attention to the text alone. The prompt's part is missing."
    if same(y, wanted - text):
        return "no text", "Your result is the prompt's part alone. The attention to the text is missing."
    if same(y - text, text - wanted):
        return "subtracted", "You subtract the prompt's part. It is added."
    if found := where_right(y, wanted, AXES):
        return found
    most = gate.abs() * given["prompt_v"].abs().amax(dim=2, keepdim=True)
    if bool(((y - text).abs() > most + 1e-4).any()):
        return "more than a prompt can add", (
            "The prompt's part is tanh(g) times a weighted mean of the prompt's values, so it cannot be larger than "
            "tanh(g) times the largest of them. Your result differs from the attention to the text by more than that. "
            "Print both parts by themselves."
        )
    return "another prompt's part", (
        "What you add to the attention to the text is not too large, but it is not tanh(g) times the attention to the "
        "prompt. Which queries, keys and values does that part use?"
    )


def _gradients(seen: Seen, expected: Seen) -> Explanation:
    assert isinstance(seen.value, dict)
    assert isinstance(expected.value, dict)
    return None if same(seen.value["gradients"], expected.value["gradients"]) else GRADIENTS


def _results(case: Case, seen: Seen, expected: Seen, name: str) -> tuple[Any, Tensor, dict[str, Any]]:
    assert isinstance(seen.value, dict)
    assert isinstance(expected.value, dict)
    wanted = expected.value[name]
    assert isinstance(wanted, Tensor)
    return seen.value[name], wanted, dict(case.inputs)


def _place(one: Any, other: Tensor, of: str) -> str:
    """What is wrong with numbers of the right shape."""
    if same(one.sort().values, other.sort().values) or same(one.flatten().sort().values, other.flatten().sort().values):
        return f"{of} has the right numbers, but at the wrong places: which axis is which?"
    return f"{of} has numbers that belong elsewhere in the row. Write down which columns it has."
