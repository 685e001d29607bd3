"""Unit 15, magnitude and direction: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, first_difference, not_a_tensor, where_right
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.checks.verdict import describe

NORMS = {
    "dtype": "The norms are right, but they should be in float32.",
    "gradient": "The norms are right, but they belong to the graph of gradients: detach W, A and B first.",
    "as large as W": "The norms are right, but your code creates a tensor that has as many elements as W, or "
    "more. Choose the order of the products so that none has more than r columns.",
}
FORWARD = {
    "the base as before": "Your `combine` changes the weight of the base. Only `merge` does.",
}
SVD = {
    "dtypes": "A and B should both be in float32, whatever the dtype of W.",
}
_norms, _forward, _svd = first_difference(NORMS), first_difference(FORWARD), first_difference(SVD)


def explain_norms(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which terms the squares have, as far as that can be seen."""
    one, other, given = _records(case, seen, expected)
    norms, wanted = one["norms"], other["norms"]
    if found := not_a_tensor(norms, wanted.shape, "the result"):
        return found
    if not norms.isfinite().all():
        return "not finite", "Some of your norms are NaN or infinite. Is a root taken of a negative number?"
    if same(norms, wanted):
        return _norms(case, seen, expected)
    W, A, B, s = (given[name] for name in ("W", "A", "B", "scaling"))
    W, A, B = W.double(), A.double(), B.double()
    base, cross, own = W.square().sum(1), ((W @ A.T) * B).sum(1), ((B @ A @ A.T) * B).sum(1)
    squares = norms.double().square()
    wholes = {
        "the squares of the norms": (norms.double(), base + 2 * s * cross + s**2 * own),
        "the norms of W alone": (squares, base),
        "the norms of s B A alone": (squares, s**2 * own),
    }
    for name, (yours, other_whole) in wholes.items():
        if same(yours, other_whole, 1e-3):
            return name, f"Your result has {name} where the norms of the rows of V should be."
    for k, factor in ((1, 2 * s), (2, s**2)):
        rest = squares - base - (s**2 * own if k == 1 else 2 * s * cross)
        term = cross if k == 1 else own
        ratio = rest / (factor * term)
        if same(ratio, ratio.mean().expand_as(ratio), 1e-2):
            what = "mixed term, of W with s B A," if k == 1 else "square of s B A"
            return f"term {k}", f"The {what} enters your squares with another factor than it should."
    return where_right(norms, wanted, ("row",)) or (
        "other norms",
        "No norm is right. Compare the three terms of the square for one row with those of W + s B A.",
    )


def explain_dora(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What is wrong with the output, a gradient, or the merged weight."""
    one, other, given = _records(case, seen, expected)
    if given["what"] == "merge":
        return _merged(one, other)
    y, wanted = one["y"], other["y"]
    if found := not_a_tensor(y, wanted.shape, "what `combine` returns"):
        return found
    if not y.isfinite().all():
        return "not finite", "The output has entries that are NaN or infinite: a row of zeros has the norm 0."
    if not same(y, wanted):
        return _output(y, wanted, given)
    if given["what"] == "zeros":
        return (
            "gradients",
            "The output is right, but some gradients are NaN or infinite: a row of zeros has the norm 0.",
        )
    for name, gradient in other["gradients"].items():
        if not same(one["gradients"][name], gradient):
            what = "no gradient reaches" if one["gradients"][name] is None else "another gradient reaches"
            rule = "||V|| is a constant for the gradient; everything else is not."
            return f"gradient of {name}", f"The output is right, but {what} {name}. {rule}"
    return _forward(case, seen, expected)


def _output(y: Tensor, wanted: Tensor, given: dict[str, Any]) -> Explanation:
    W, A, B, x = (given[name] for name in ("weight", "A", "B", "x"))
    V, b = W + given["alpha"] / len(A) * B @ A, given["bias"]
    b = torch.zeros(len(W)) if b is None else b
    m = W.norm(dim=1) if given["magnitude"] is None else given["magnitude"]
    direction = V / V.norm(dim=1, keepdim=True)
    others = {
        "LoRA's output": (x @ V.T + b, "Your output is LoRA's, W x + s B A x + b: the magnitude has no effect."),
        "the base alone": (
            x @ W.T + b,
            "Your output is that of the base: neither B A nor the magnitude has an effect.",
        ),
        "no bias": (x @ (m[:, None] * direction).T, "The bias is missing in your output."),
        "unit rows": (x @ direction.T + b, "You divide by ||V|| but do not multiply by m."),
        "not divided": (x @ (m[:, None] * V).T + b, "You multiply by m but do not divide by ||V||."),
        "the bias too": ((x @ V.T + b) * m / V.norm(dim=1), "You rescale the bias as well."),
    }
    for name, (other, message) in others.items():
        if same(y, other):
            return name, message
    return where_right(y, wanted, ()) or (
        "another output",
        "With the given A, B and m the output is not (m / ||V||) (V x) + b. Work out one entry of it by hand: which "
        "row of V and which entry of m does it take?",
    )


def _merged(one: dict[str, Any], other: dict[str, Any]) -> Explanation:
    total, wanted = one["W + change"], other["W + change"]
    if found := not_a_tensor(total, wanted.shape, "what `change` returns"):
        return found
    if not total.isfinite().all():
        return "not finite", "The change has entries that are NaN or infinite: a row of zeros has the norm 0."
    if not same(total, wanted):
        return "another change", (
            "`change(W)` is not (m / ||V||) V - W. `merge` adds it to W; the sum should be V with its rows brought to "
            "the lengths m."
        )
    if one["dtype"] != other["dtype"]:
        return "dtype", f"The change should be in float32, but yours is in {one['dtype']}."
    return "another weight", "What `change` returns is right, but the merged layer is not: does it change its input?"


def explain_groups(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which parameter is in the wrong group, twice, or missing."""
    one, other, given = _records(case, seen, expected)
    groups, wanted = one["groups"], other["groups"]
    if not isinstance(groups, list) or not all(isinstance(group, dict) and "names" in group for group in groups):
        return "no list of dictionaries", f"The result should be a list of two dictionaries, but is {describe(groups)}."
    if len(groups) != len(wanted):
        return "number of groups", f"There should be two groups, but there are {len(groups)}."
    if not all(group["params"] for group in groups):
        return "no params", 'Each dictionary needs the key "params", with a list of parameters.'
    for name in given["shapes"]:
        times = [group["names"].count(name) for group in groups]
        right = [group["names"].count(name) for group in wanted]
        if times != right:
            is_B = "is a B" if right[1] else "is no B"
            where = "in neither group" if not sum(times) else "in both groups" if min(times) else "in the other group"
            return "wrong group", f"{name!r} {is_B}, but is {where} of yours."
    if [group["names"] for group in groups] != [group["names"] for group in wanted]:
        return "order", "The right parameters are in each group, but not in the given order."
    return "other entries", (
        f"The parameters are in the right groups, but the other entries are not: {groups[0]['more']} and "
        f'{groups[1]["more"]}. Only the group of the B has one, "lr_scale".'
    )


def explain_svd(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Shapes, the product, or how it is shared."""
    one, other, given = _records(case, seen, expected)
    if "factors" in one:
        return "no pair of tensors", f"Return two tensors, A and B. Yours is {describe(one['factors'])}."
    if one["shapes"] != other["shapes"]:
        yours, wanted = ([tuple(shape) for shape in record["shapes"]] for record in (one, other))
        swapped = " They have changed places." if yours == wanted[::-1] else ""
        return (
            "shapes",
            f"A and B should have the shapes {wanted[0]} and {wanted[1]}, but have {yours[0]} and {yours[1]}.{swapped}",
        )
    s = given["scaling"]
    if not same(one["product"], other["product"], 1e-3):
        for name, power in (("s is missing", 1), ("s is divided by twice", -1)):
            if s != 1 and same(one["product"], other["product"] * s**power, 1e-3):
                return name, f"s B A is off by a factor: in your A and B, {name}."
        return "another product", "s B A is not the best approximation of W of this rank. Which directions are kept?"
    if not (same(one["A A^T"], other["A A^T"], 1e-3) and same(one["B^T B"], other["B^T B"], 1e-3)):
        return (
            "not shared",
            "s B A is right, but the singular values are not shared equally between A and B, or not in order.",
        )
    return _svd(case, seen, expected) or ("rounding", "The values are right only roughly: compute in float32.")


def explain_merging(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first call after which something is not as it should be."""
    one, other, given = _records(case, seen, expected)
    for place, (step, wanted) in enumerate(zip(one["steps"], other["steps"], strict=True)):
        call = f"After call number {place + 1} ({given['calls'][place]})"
        if step["training"] != wanted["training"]:
            return "mode", f"{call} the layer is in the wrong mode: its `training` is {step['training']}."
        if step["dtype"] != wanted["dtype"]:
            return "dtype", f"{call} the weight is in {step['dtype']}; it should be in {wanted['dtype']}."
        if not same(step["weight"], wanted["weight"]):
            should = "W + s B A" if not wanted["training"] else "W"
            return "another weight", f"{call} the weight is not {should}."
        if step["every bit of W"] != wanted["every bit of W"]:
            return "last bits", f"{call} the weight is W only up to rounding. Which tensor had every bit of it?"
        if step["returns"] != wanted["returns"]:
            return "returns another thing", f"{call} what is returned is not the layer itself, but a {step['returns']}."
        if step["keeps W"] != wanted["keeps W"] or not same(step["y"], wanted["y"]):
            return "W", (
                f"{call} the weight is right, but `self.W` is not: it should be the frozen weight while the layer is "
                "merged, and None otherwise. `forward` relies on it."
            )
    return "another parameter", "`weight` is another parameter object at the end. Change its `.data`."


def explain_test(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What the test does with this layer, and should not."""
    layer = str(case.inputs["version"])
    if seen.value == "passes":
        return "passes a faulty layer", f"Your test passes {layer}. After which call would one see the fault?"
    if seen.value == "fails":
        return "fails a sound layer", f"Your test fails {layer}. What does it demand that the list does not promise?"
    return (
        "breaks",
        f"With {layer} your test breaks: {seen.value}. A test of a faulty layer ends with an AssertionError.",
    )


def _records(case: Case, seen: Seen, expected: Seen) -> tuple[Any, Any, dict[str, Any]]:
    """What was seen, what should have been, and the inputs."""
    assert isinstance(seen.value, dict)
    assert isinstance(expected.value, dict)
    inputs: dict[str, Data] = dict(case.inputs)
    return seen.value, expected.value, inputs
