"""Unit 05, prompts: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.comparing import as_tensor, is_number, same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, first_difference
from lora_from_scratch.checks.observation import Data, Seen

INITIAL = {  # what the messages say of each entry of the record
    "shape": "The shape of the initial prompt is not (P, d): P rows, each as wide as the table's.",
    "in the graph": "The prompt is still attached to the table's graph. Detach it.",
    "shares memory with the table": "The prompt shares its memory with the table. Copy the rows (`.clone()`).",
    "the same again": "The same state of the generator does not give the same prompt. Which draw does not use it?",
    "another seed differs": "Another seed should give another prompt where something is drawn, and the same one where "
    "nothing is.",
    "without a generator": "Without a generator PyTorch's own is used: its seed decides, and the next prompt differs, "
    "where something is drawn.",
    "the next differs": "Two prompts that are made one after the other with the same generator should differ where "
    "something is drawn, and be equal where nothing is.",
    "E": "The rows are not those of the text's tokens, in their order, from the beginning again if there are too few.",
    "mean": "The mean of the random numbers is not 0.",
    "standard deviation": "The standard deviation of the random numbers is not 1.",
    "some beyond two": "None of the random numbers is large. Of 3,600 numbers from N(0, 1) about a hundred "
    "lie beyond 2.2.",
    "different rows": "Several rows of the random prompt are equal. Each is drawn by itself.",
    "rows of the table": "The prompt has rows that are not rows of the table.",
    "among the common tokens": "The prompt has rows of tokens that are not among the common ones, the lowest ids.",
    "the most often that one token comes": "Some tokens occur too often. Draw without replacement; if there are fewer "
    "tokens than rows, use all of them once before any comes again.",
    "in order": "The tokens come in the order of their ids. Draw them in random order.",
}
_initial = first_difference(INITIAL)
RETURNED = (
    "the embeddings, (B, P + T, d): the prompt before every row of the text",
    "the mask as it came in",
    "the positions, (B, P + T): 0 to P - 1 and then those of the text; None if they were None",
    "the cache as it came in",
)


def explain_prepend(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The shape, which of the two parts is wrong, or the gradients."""
    if not isinstance(seen.value, dict) or not isinstance(expected.value, dict):
        return None
    whole, right = seen.value["whole"], expected.value["whole"]
    E, X = case.inputs["embeddings"], case.inputs["inputs"]
    assert isinstance(right, Tensor)
    assert isinstance(E, Tensor)
    assert isinstance(X, Tensor)
    if not isinstance(whole, Tensor):
        return "no tensor", f"Return one tensor of shape {tuple(right.shape)}, the prompt and the text in one."
    sizes = f"B = {len(X)} rows, P = {len(E)}, T = {X.shape[1]}, d = {X.shape[2]}"
    if whole.shape != right.shape:
        return "other axes", (
            f"With {sizes} the result should have the shape (B, P + T, d) = {tuple(right.shape)}; yours has "
            f"{tuple(whole.shape)}. Along which axis do you join the two, and does every row get the prompt?"
        )
    if same(whole, right):
        return "another gradient", "The values are right, but the gradients that reach the prompt or the text are not."
    front, back = same(whole[:, : len(E)], right[:, : len(E)]), same(whole[:, len(E) :], right[:, len(E) :])
    if front or back:
        good, bad = ("prompt", "text") if front else ("text", "prompt")
        return f"another {bad}", f"With {sizes} the part of the {good} is right, but the part of the {bad} is not."
    return "both parts", f"With {sizes} the first P columns should be the prompt and the others the text; neither is."


def explain_labels(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The shape, or the first label that is wrong."""
    if not isinstance(seen.value, list) or not isinstance(expected.value, list):
        return None
    labels, right, length = seen.value[0], expected.value[0], case.inputs["num_virtual_tokens"]
    assert isinstance(right, Tensor)
    assert isinstance(length, int)
    if not isinstance(labels, Tensor):
        return "no tensor", f"Return a tensor of labels of shape {tuple(right.shape)}."
    if labels.shape != right.shape:
        return "other axes", (
            f"{len(right)} rows of {right.shape[1] - length} labels and {length} virtual tokens give labels of shape "
            f"(B, P + T) = {tuple(right.shape)}; yours have {tuple(labels.shape)}."
        )
    wrong = (labels != right).nonzero()
    if not len(wrong):
        return None  # the dtype, or a changed input
    row, place = map(int, wrong[0])
    of = "a virtual token" if place < length else f"the text's token {place - length}"
    return "another label", (
        f"Counted from 0, position {place} of row {row} belongs to {of}. Its label should be "
        f"{int(right[row, place])}, but is {labels[row, place].item()}."
    )


def explain_initial(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """How many rows there are, tokens that are drawn twice, or the first part of the record that differs."""
    if not isinstance(seen.value, dict) or not isinstance(expected.value, dict):
        return None
    shape, asked = seen.value["shape"], expected.value["shape"]
    assert isinstance(asked, list)
    if isinstance(shape, list) and shape and shape[0] != asked[0]:
        return "number of rows", (
            f"{asked[0]} rows were asked for and {shape[0]} came back: if P is larger than the number of available "
            "tokens, they have to be repeated."
        )
    return _initial(case, seen, expected)


def explain_soft(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which of the four results of `enter` is wrong, or which part of what is trained; or that the logits are."""
    one, right, what = seen.value, expected.value, case.inputs["what"]
    if what == "enter" and isinstance(one, list) and isinstance(right, list):
        if len(one) != len(right):
            return "number of results", f"`enter` returns four things, in this order: {_list(RETURNED)}."
        wrong = [place for place in range(4) if not same(one[place], right[place])]
        listed = _list([f"{place + 1}: {RETURNED[place]}" for place in wrong])
        return (
            ("what enter returns", f"Of the four things that `enter` returns, these are not right: {listed}.")
            if wrong
            else None
        )
    if what == "training" and isinstance(one, dict) and isinstance(right, dict):
        return first_difference(
            {
                "trained": "In a model, other parameters are trained than `embeddings`, or none at all, or they have "
                "another shape.",
                "a parameter": "`self.embeddings` is not an `nn.Parameter`.",
                "length": "`VirtualTokens.__init__` got another length than P, the number of rows.",
                "values": "`embeddings` does not have the values that were given.",
                "gradients": "The loss gives `embeddings` another gradient than it should.",
            }
        )(case, seen, expected)
    pairs: list[tuple[Data, Data]] = [(one, right)] if isinstance(right, Tensor) else []
    if isinstance(one, list) and isinstance(right, list) and len(one) == len(right):
        pairs = list(zip(one, right, strict=True))
    for piece, (given, wanted) in enumerate(pairs):
        if not same(given, wanted):
            where = f"piece {piece + 1} of the text" if len(pairs) > 1 else "the text"
            return "other logits", (
                f"A model with your soft prompt gives other logits for {where} than it should. Compare what `enter` "
                f"returns with the docstring: {_list(RETURNED)}."
            )
    return None


def explain_nearest(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The shape, or the cosines of the first row whose token is wrong."""
    prompt, table, right = case.inputs["prompt"], case.inputs["table"], expected.value
    assert isinstance(prompt, Tensor)
    assert isinstance(table, Tensor)
    assert isinstance(right, Tensor)
    tokens = _numbers(seen.value)
    if tokens is None:
        return None
    if tokens.shape != right.shape:
        return "other axes", (
            f"The prompt has {len(prompt)} rows, so the result should be {len(prompt)} token ids, of shape "
            f"{tuple(right.shape)}; yours has the shape {tuple(tokens.shape)}."
        )
    wrong = (tokens != right).nonzero()
    if not len(wrong):
        return None
    row = int(wrong[0])
    cosines = F.normalize(prompt, dim=-1)[row] @ F.normalize(table, dim=-1).T
    given, best = float(tokens[row]), int(right[row])
    if given != int(given) or not 0 <= given < len(table):
        return (
            "no token id",
            f"For row {row} your result has {given:.4g}, which is not one of the ids 0 to {len(table) - 1}.",
        )
    return "another token", (
        f"For row {row} of the prompt you name token {int(given)}, whose cosine is {cosines[int(given)]:.4f}; that of "
        f"token {best} is {cosines[best]:.4f}, the largest of all."
    )


def _numbers(value: Data) -> Tensor | None:
    if isinstance(value, list) and value and all(isinstance(one, int | float) for one in value):
        return torch.tensor(value)
    return as_tensor(value) if is_number(value) else None


def _list(items: list[str] | tuple[str, ...]) -> str:
    return "; ".join(items)
