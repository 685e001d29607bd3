"""Unit 10, fine-tuning with LoRA: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, first_difference, not_a_tensor, off_by, where_right
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.unit_10.probes import small_model
from lora_from_scratch.checks.verdict import describe

SWITCHED = {  # what the messages say of each entry of the record
    "dtypes": "A parameter of the model has another dtype than before: round the sum to the weight's own.",
    "the same parameters": "The values are right, but a parameter was replaced by a new one. Change its values "
    "in place.",
    "still trained": "The values are right, but a parameter is not trained any more, or belongs to a graph of "
    "gradients. The sums should not be recorded: `torch.no_grad()`.",
}
_switched = first_difference(SWITCHED)


def explain_count(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What is missing, or too much."""
    sizes, rank = case.inputs["sizes"], case.inputs["rank"]
    if found := _not_a_whole_number(seen):
        return found
    assert isinstance(seen.value, int)
    assert isinstance(expected.value, int)
    assert isinstance(sizes, list)
    assert isinstance(rank, int)
    pairs: Any = sizes
    parts = {"all the A": rank * sum(i for i, _ in pairs), "all the B": rank * sum(o for _, o in pairs)}
    if pairs:
        parts |= {"the A and B of the last matrix": rank * sum(pairs[-1]), "the first A": rank * pairs[0][0]}
    return off_by(seen.value, expected.value, parts, of="Your count")


def explain_budget(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether the rank is above the budget or a matrix's limit, or whether a larger one would do."""
    pairs: Any = case.inputs["sizes"]
    budget: Any = case.inputs["budget"]
    if found := _not_a_whole_number(seen):
        return found
    rank: Any = seen.value
    cost, limit = sum(map(sum, pairs)), min(map(min, pairs))
    if rank < 1:
        return "no rank", f"A LoRA of rank {rank} trains nothing: the rank is at least 1."
    if rank > limit:
        return "above the smaller side", f"Rank {rank} is above {limit}, the smallest of the matrices' sides."
    if rank * cost > budget:
        return "above the budget", f"With rank {rank} A and B have {rank * cost:,} numbers, more than {budget:,}."
    return "a larger rank", f"A larger rank than {rank} fits: with {rank + 1} they have {(rank + 1) * cost:,} numbers."


def explain_peft(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which name is wrong, or which tensor."""
    if not isinstance(seen.value, dict):
        return None
    one: Any = seen.value
    other: Any = expected.value
    state, wanted = one["state"], other["state"]
    extra, missing = [n for n in state if n not in wanted], [n for n in wanted if n not in state]
    if extra:
        return "another name", f"Your result has the name {extra[0]!r}, which no parameter of the model has."
    if missing:
        return "a missing name", f"Your result lacks {missing[0]!r}."
    for name, tensor in wanted.items():
        if not same(state[name], tensor):
            return "another tensor", f"What you return as {name!r} is not the tensor of the file that belongs there."
        if state[name].dtype != tensor.dtype:
            return "dtype", f"The values of {name!r} are right, but its dtype is not that of the file."
    if one["order"] != other["order"]:
        return "order", "The names and tensors are right, but their order is not that of the file."
    return None


def explain_switched(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Whether it should have been refused; else which layer is wrong and what happened to it."""
    one: Any = seen.value
    other: Any = expected.value
    given: Any = case.inputs
    if one["refused"] != other["refused"]:
        return "no error", "A layer of this LoRA is not in the model, or has another shape: your code should raise a "
        "ValueError."
    wrong = [name for name, weight in other["weights"].items() if not same(one["weights"].get(name), weight)]
    if not wrong:
        return _switched(case, seen, expected)
    if other["refused"]:
        return (
            "half changed",
            f"Your code raises an error, but {wrong[0]!r} is changed already. Check everything first.",
        )
    name = wrong[0]
    before = dict(small_model(given["seed"], given.get("whole", False)).named_parameters())[name].detach().float()
    layer, right = name.removesuffix(".weight"), f"right: {len(other['weights']) - len(wrong)} others"
    if name != f"{layer}.weight" or layer not in given["old"] | given["new"]:
        return "another layer", f"{name!r} belongs to neither LoRA, but its values have changed ({right})."
    which = " and ".join(kind for kind in ("old", "new") if layer in given[kind])
    after = one["weights"].get(name)
    if not isinstance(after, Tensor) or after.shape != before.shape:
        return "another weight", f"{name!r}, a weight that the {which} LoRA changes, is gone or has another shape."
    if same(after.float(), before):
        return "unchanged", f"{name!r} has not changed, although the {which} LoRA is on this layer ({right})."
    return "wrong weight", (
        f"{name!r} has the wrong values; on this layer is the {which} LoRA ({right}). It should be the weight before, "
        "minus B A of the old LoRA, plus B A of the new one, where each is on the layer."
    )


def explain_shrunk(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Axes, and what is zero and should not be, or the reverse."""
    wanted: Any = expected.value
    given: Any = case.inputs
    if found := _axes(seen.value, wanted, ("n rows", "T tokens", "R columns of A_T")):
        return found
    h: Any = seen.value
    kept, should = h != 0, wanted != 0
    for zero, message in ((False, "is not zero, but that column belongs to another adapter"), (True, "is zero")):
        places = (~kept & should if zero else kept & ~should).nonzero()
        if len(places):
            row, token, column = places[0].tolist()
            whose = (
                f"The row's adapter is {int(given['adapter_index'][row])}, the column's {int(given['owner'][column])}."
            )
            end = ", but that column belongs to the row's adapter" if zero else ""
            place = f"Row {row}, token {token}, column {column} of your result"
            return ("zero" if zero else "not zero") + " in the wrong place", f"{place} {message}{end}. {whose}"
    return where_right(h, wanted, ("row", "token")) or (
        "other products",
        "The zeros are in the right places, but the other numbers are not the products of x with the columns of A_T.",
    )


def explain_batched(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Axes, rows without an adapter, and the rows for which it is right."""
    wanted: Any = expected.value
    given: Any = case.inputs
    if found := _axes(seen.value, wanted, ("n rows", "T tokens", "outputs")):
        return found
    y: Any = seen.value
    none = given["adapter_index"] < 0
    if y[none].any():
        return "something without an adapter", "A row with -1 has no adapter, so nothing is added to it: it is zero."
    if not bool(y.isfinite().all()):
        return "no finite numbers", "Some numbers are NaN or infinite. Nothing here needs a division."
    s = torch.as_tensor(given["scaling"]).expand(len(given["A_stack"]))[given["adapter_index"]][:, None, None]
    for name, power in (("is not applied", -1), ("is applied twice", 1)):
        if s.ne(0).all() and same(y, torch.where(none[:, None, None], wanted, wanted * s**power)):
            return f"scaling {name}", f"The scaling {name}. Each row is multiplied by it once."
    return where_right(y, wanted, ("row", "token")) or (
        "no row is right",
        "No row is right. Work out the first row that has an adapter k: its tokens times the transpose of A_stack[k], "
        "times the transpose of B_stack[k], times s.",
    )


def _axes(seen: Any, wanted: Tensor, names: tuple[str, ...]) -> Explanation:
    """What is wrong with the axes of what should be a tensor of this shape."""
    if isinstance(seen, Tensor) and seen.ndim != wanted.ndim:
        axes = ", ".join(names)
        return "number of axes", f"The result should have {wanted.ndim} axes ({axes}), but yours has {seen.ndim}."
    if isinstance(seen, Tensor):
        for axis, name in enumerate(names):
            if seen.shape[axis] != wanted.shape[axis]:
                size = f"axis {axis} of the result should have the length {wanted.shape[axis]} ({name}), but yours has"
                return f"length of axis {axis}", f"Counted from 0, {size} {seen.shape[axis]}."
    return not_a_tensor(seen, wanted.shape, "the result")


def _not_a_whole_number(seen: Seen) -> Explanation:
    if seen.value is None:
        return not_a_tensor(None, (), "the result")
    if isinstance(seen.value, bool) or not isinstance(seen.value, int):
        return "no whole number", f"The result should be a whole number, but yours is {describe(seen.value)}."
    return None
