"""Unit 09, LoRA: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, first_difference, not_a_tensor
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.checks.trial import explain_trial
from lora_from_scratch.checks.verdict import describe

Record = dict[str, Data]

START = {  # what the messages say of each entry of the record
    "the same seed": "Two generators with the same seed do not give the same A and B. Which of your draws does not use "
    "the generator?",
    "another seed": "Two generators with different seeds give the same A and B.",
    "the next draw": "Two calls with one generator give the same A and B. Draw from the generator as it is, without "
    "going back to its seed.",
    "PyTorch's generator, the same seed": "Without a generator the numbers should come from PyTorch's own, which "
    "`torch.manual_seed` sets. After the same seed yours are not the same.",
    "PyTorch's generator, another seed": "Without a generator your A and B are the same whatever `torch.manual_seed` "
    "was given. They should come from PyTorch's own generator.",
}
FORWARD = {
    "gradients": "The output is right, but at least one of A, B and x does not get the gradient that it should. What "
    "is outside the graph?",
    "the base as before": "The output is right, but `forward` has changed the base or its weight. Only `merge` does.",
}
DROPOUT = {
    "in training": "With dropout in training, the way through A and B is not what it should be. Only the input of A is "
    "dropped, each element by itself, and what is kept is divided by 1 - p.",
    "in evaluation": "In evaluation nothing is dropped, but then your output is not base(x) + s B A x.",
}
MERGE = {
    "W": "After `merge` the base's weight is not W0 + s B A. Work out one entry of it: which row of B and which column "
    "of A does it take?",
    "dtype": "After `merge` the base's weight has another dtype than before.",
    "y": "After `merge` the base's weight is right, but the output of the layer is not that of the base.",
    "gradient of x": "While the layer is merged, x does not get the gradient that the base alone would give it.",
    "bias as before": "`merge` has changed the bias of the base, which LoRA leaves alone.",
    "merged": "After `merge` the layer does not count as merged: `self._unmerged` has to hold W0.",
    "the same parameter": "`base.weight` is another parameter object after `merge`. Change its `.data`.",
}
RETURN = {
    "merging changes W": "At least one call of `merge` leaves the base's weight as it is.",
    "W is back but for rounding": "After `unmerge` the base's weight is not W0.",
    "every bit of W is back": "After `unmerge` the base's weight is W0 only up to rounding. Which tensor has every bit "
    "of it?",
    "the same parameter": "`base.weight` is another parameter object after `unmerge`. Change its `.data`.",
    "dtype": "After `unmerge` the base's weight has another dtype than W0.",
    "merged": "After `unmerge` the layer still counts as merged: `self._unmerged` should be None again.",
}
MOVE = {
    "dtype": "The merged layer was moved to float64. After `unmerge` the base's weight is not in float64: keep W0 in "
    "`self._unmerged`, which is a buffer and moves with the module.",
    "W is back": "The merged layer was moved to float64. After `unmerge` the base's weight is not W0.",
}
ROUNDS = {
    "W when merged again": "Merged, unmerged, trained on, and merged again: the base's weight is not the new W0 plus "
    "the change of the new A and B. Does your code keep something of the first time?",
    "the second W0 is back": "Merged and unmerged a second time, the base's weight is not what it was before that.",
}
BLOCKS = {
    "dtype": "The result has another dtype than B.",
    "device": "The result is on another device than B. New tensors should be made on B's.",
}
INJECTED = {
    "in its place": "At least one of the layers is not at its place: `model.get_submodule(name)` is another module.",
    "as before": "A module whose name was not given is another object now, or has gone.",
    "names": "The layers are in their places, but the model has other modules than it should. Print "
    "`[name for name, _ in model.named_modules()]` before and after.",
    "y": "The layers are in their places, but the model does not compute what it should.",
}
STATE = {
    "order": "The names and tensors are right, but they are not in the model's order.",
    "dtypes": "At least one tensor has another dtype than in the model.",
    "in the graph": "At least one tensor still belongs to the graph of gradients: its `requires_grad` is True.",
    "the model as before": "Your code changes which of the model's parameters are trained.",
}
LAYER = {
    "start": first_difference(FORWARD),
    "forward": first_difference(FORWARD),
    "dropout": first_difference(DROPOUT),
    "merge": first_difference(MERGE),
    "back": first_difference(RETURN),
    "move": first_difference(MOVE),
    "twice": first_difference(ROUNDS),
}
_start, _blocks, _state = first_difference(START), first_difference(BLOCKS), first_difference(STATE)
explain_injected = first_difference(INJECTED)


def explain_delta(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which shape it has instead, by what it is off, or which gradient is missing."""
    one, other, given = _records(case, seen, expected)
    change, wanted, A, B, s = one["change"], other["change"], given["A"], given["B"], given["scaling"]
    if change is None:
        return not_a_tensor(change, wanted.shape, "the result")
    if isinstance(change, Tensor) and change.shape != wanted.shape:
        names = {"B": B.shape, "A": A.shape, "(in, out)": wanted.T.shape, "(r, r)": (len(A), len(A))}
        like = next((name for name, shape in names.items() if tuple(shape) == tuple(change.shape)), None)
        if like is not None:
            of = like if "," in like else f"that of {like}"
            message = f"The shape of your result is {of}, {tuple(change.shape)}, but it should be (out, in), "
            return "another shape", f"{message}{tuple(wanted.shape)}: as many rows as B, as many columns as A."
    if (found := not_a_tensor(change, wanted.shape, "the result")) or same(change, wanted):
        return found or _gradient(one, other)
    if same(change - s, B @ A):
        return "added", "Your result is B A plus s in every entry. The product is multiplied by s."
    if s and same(change, s / (B @ A)):
        return "divided by", "You divide s by B A. The product is multiplied by s."
    return None


def explain_start(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which of the two is wrong in shape, dtype or size; or which generator is not used."""
    one, other, given = _records(case, seen, expected)
    if "A" not in one:
        return "no pair of tensors", f"Return two tensors, A and B. Yours is {describe(one['result'])}."
    for name, axes in (("A", "(r, in)"), ("B", "(out, r)")):
        if one[name].shape == other[name].T.shape != other[name].shape:
            return (
                "transposed",
                f"The shape of {name} should be {axes}, {tuple(other[name].shape)}; yours is transposed.",
            )
        if one[name].shape != other[name].shape:
            right, yours = tuple(other[name].shape), tuple(one[name].shape)
            return f"shape of {name}", f"The shape of {name} should be {axes}, {right}, but yours is {yours}."
        if one[name].dtype != other[name].dtype:
            return (
                "dtype",
                f"{name} should be in float32, but yours is in {str(one[name].dtype).removeprefix('torch.')}.",
            )
    A, B, bound = one["A"], one["B"], given["in_features"] ** -0.5
    if B.any():
        return "B is not zero", "B should be zero, so that B A is zero before the first step. Yours is not."
    if not A.isfinite().all():
        return "A is not finite", "A has entries that are NaN or infinite."
    if float(A.abs().max()) > 1.02 * bound:
        return "beyond the bound", f"A has entries beyond 1/sqrt(in) = {bound:.3g}; the largest is {A.abs().max():.3g}."
    if float(A.abs().max()) < 0.98 * bound:
        largest = f"{float(A.abs().max()):.3g}"
        return "below the bound", f"The largest entry of A is {largest}, but they should reach up to {bound:.3g}."
    if float(A.min()) > -0.98 * bound or float(A.max()) < 0.98 * bound:
        return "one side", "The entries of A should be spread evenly between -1/sqrt(in) and 1/sqrt(in), on both sides."
    return _start(case, seen, expected) or (
        "not uniform",
        "A has the right range, but its entries are not spread evenly over it, or many of them are equal. Each is "
        "drawn by itself, and each number of the range is as likely as any other.",
    )


def explain_layer(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What is wrong with the output, or which part of the record is wrong."""
    one, other, given = _records(case, seen, expected)
    y, wanted = one.get("y"), other.get("y")
    if given["what"] not in ("start", "forward"):
        return LAYER[given["what"]](case, seen, expected)
    if found := not_a_tensor(y, wanted.shape, "the output"):
        return found
    if not same(y, wanted):
        return _output(y, wanted, given)
    return LAYER[given["what"]](case, seen, expected)


def _output(y: Tensor, wanted: Tensor, given: dict[str, Any]) -> Explanation:
    base = given["x"] @ given["weight"].T + given["bias"]
    if given["what"] == "start":
        return "not the base", "Before training B is zero, so the output should be exactly that of the base. It is not."
    if same(y, base):
        return "base alone", "Your output is that of the base alone, although nothing is merged."
    if same(y + base, wanted):
        return "change alone", "Your output is the change alone: the output of the base is missing."
    if same(y, 2 * base - wanted):
        return "subtracted", "You subtract the change from the output of the base."
    return "another output", (
        "With the given A and B the output is not base(x) + s B A x. Work out one x by hand: A x has r numbers, B "
        "turns them into as many as the layer has outputs, and only those are multiplied by s."
    )


def explain_blocks(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Rows or columns, dtype, the gradient, or which part's block is wrong."""
    one, other, given = _records(case, seen, expected)
    whole, wanted = one.get("whole"), other.get("whole")
    if wanted is None:
        return _blocks(case, seen, expected) or ("shape", f"The shape should be {other['shape']}.")
    if isinstance(whole, Tensor) and whole.ndim == 2 and whole.shape != wanted.shape:
        n, m, r = len(given["parts"]), len(given["all_parts"]), given["B"].shape[1]
        if whole.shape == wanted.T.shape:
            return "transposed", f"The shape should be {tuple(wanted.shape)}; yours is transposed."
        if whole.shape[0] != wanted.shape[0]:
            rows = f"Your result has {whole.shape[0]} rows, but the whole fused matrix has {wanted.shape[0]}:"
            return "rows", f"{rows} {m} parts of {len(wanted) // m} each."
        columns = f"Your result has {whole.shape[1]} columns. There should be n r = {n} x {r},"
        return "columns", f"{columns} those of each adapted part beside each other."
    if found := not_a_tensor(whole, wanted.shape, "the result"):
        return found
    assert isinstance(whole, Tensor)
    if same(whole, wanted):
        found = _blocks(case, seen, expected)
        return found or ("no gradient", "The matrix is right, but the gradient of B is not, or none flows.")
    return _wrong_part(whole, wanted, given)


def _wrong_part(whole: Tensor, wanted: Tensor, given: dict[str, Any]) -> Explanation:
    width = len(wanted) // len(given["all_parts"])
    pairs = zip(given["all_parts"], whole.split(width), wanted.split(width), strict=True)
    bad = [name for name, rows, right in pairs if not same(rows, right)]
    of = "the other parts are right" if len(bad) < len(given["all_parts"]) else "no part is right"
    return "rows of a part", f"The rows of {' and '.join(bad)} are wrong; {of}."


def explain_marked(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which parameter is trained and should not be, or the reverse."""
    one, other, _ = _records(case, seen, expected)
    for name, trained in other["trained"].items():
        if one["trained"].get(name) != trained:
            is_one = name.rpartition(".")[2] in ("lora_A", "lora_B")
            kind = "an A or a B" if is_one else "neither an A nor a B"
            return "another flag", f"{name!r} is {kind}, but its `requires_grad` is {not trained} after your code."
    return "other values", "Your code changes the values of parameters. Only their `requires_grad` should change."


def explain_state(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which names are superfluous, which are missing, and which tensor is another one."""
    one, other, _ = _records(case, seen, expected)
    state, wanted = one["state"], other["state"]
    extra, missing = [n for n in state if n not in wanted], [n for n in wanted if n not in state]
    if extra:
        return "too much", f"Your result contains {extra[0]!r}, which is not the full name of an A or a B."
    if missing:
        return "too little", f"{missing[0]!r} is missing: every A and every B has to be saved under its full name."
    for name, tensor in wanted.items():
        if not same(state[name], tensor):
            return "other values", f"{name!r} is not the tensor that the model has under this name."
    return _state(case, seen, expected)


def _gradient(one: Record, other: Record) -> Explanation:
    """The first of A and B whose gradient is missing or wrong."""
    gained, wanted = one["gradients"], other["gradients"]
    assert isinstance(gained, dict)
    assert isinstance(wanted, dict)
    for name, gradient in wanted.items():
        if not same(gained[name], gradient):
            what = "no gradient reaches" if gained[name] is None else "another gradient than should reaches"
            return "another gradient", f"The result is right, but {what} {name}. Both factors are trained."
    return None


def _records(case: Case, seen: Seen, expected: Seen) -> tuple[Any, Any, dict[str, Any]]:
    """What was seen, what should have been, and the inputs."""
    assert isinstance(seen.value, dict)
    assert isinstance(expected.value, dict)
    return seen.value, expected.value, dict(case.inputs)


explain_start_test = explain_trial(
    "layer", "Which line of the statement is it for? If there is an assertion for it, with which sizes would it fail?"
)
