"""Unit 13, QLoRA: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation, first_difference
from lora_from_scratch.checks.observation import Seen

PRODUCT = {  # what the messages say of each entry of the record
    "y": "y is not x W^T + b. Which shape has W, and what does `F.linear` do with it?",
    "dtype": "y should have the dtype of x. In which dtype do you make W?",
    "gradient of x": "dL/dx is wrong or missing. With dL/dy (..., out) and W (out, in), which product is (..., in)?",
    "gradient of bias": "dL/dbias is wrong or missing. The bias was added to every row: over what do you add up?",
    "gradients returned": "`backward` returns other gradients than are needed. `ctx.needs_input_grad` has one truth "
    "value for each of x, bias and the weight: where it is False, return None.",
    "bytes kept": "Between forward and backward pass more is kept than the four bits. What do you put on `ctx`?",
    "made for nothing": "W is dequantised in the backward pass although the gradient of x is not needed.",
}
MODEL = {
    "as it was": "You raise the error too late: the model has been changed already. Check and create everything first.",
    "names the layer": "Your error does not say in which layer the weight is.",
    "in four bits": "Other layers are in four bits now than should be, or in another way. Compare "
    "`nf4_layers(model)` with `linear_layers(model)`, and look at type, block size and double quantisation.",
    "returned": "What you return has other names than those of the layers that were replaced.",
    "what was there": "You return other objects than the layers that were in the model.",
    "the same objects": "Some parameter that should have stayed is another object now, or is missing. Which of them do "
    "the new layers share with the old ones?",
    "logits": "The right layers are in four bits, but the model computes something else than it should.",
    "logits when put back": "With the layers that you return in their places again, the model does not compute what "
    "it did before.",
    "weights left": "When the layers that you return are dropped, some of their weights stay in memory. What "
    "holds them?",
}
CHECKPOINT = {
    "y": "The forward pass does not return `function(x)`.",
    "activations that are kept": "Activations of the function are kept from the forward to the backward pass.",
    "tensors kept besides x": "Between forward and backward pass you keep tensors besides x. What does the second "
    "computation need?",
    "runs at first": "In the forward pass the function should run once.",
    "runs in all": "The function should run once in the forward pass, and once more in the backward pass.",
    "gradient of x": "dL/dx is wrong or missing. Does the second computation begin at a leaf that requires a gradient, "
    "and does it go backward from dL/dy?",
    "gradient of W": "The parameters that the function uses do not get the right gradients in `.grad`. Where does your "
    "backward pass through the second graph begin, and where does it write?",
    "random numbers go on as if nothing had happened": "The backward pass has changed the state of PyTorch's random "
    "number generator.",
}
PAGES = {
    "shapes": "m and v should have the shape of `like`.",
    "dtypes": "m and v should have the dtype of `like`.",
    "length": "`length` is wrong: m and v together, in bytes, rounded up to whole pages.",
    "in the file": "What is written into m and v is not at its place in the file: m from byte `start`, and v right "
    "after m.",
    "in the tensors": "What is written into m and v is not in them afterwards. Do they share memory?",
    "after the file is emptied": "When zeros are written to the file, m and v do not become zero: they are copies.",
    "released": "`release` should call `mapping.madvise` once, with MADV_DONTNEED, `start` and `length`; and not at "
    "all where the module `mmap` has no MADV_DONTNEED.",
}
LOFTQ = {
    "calls of quantize": "`quantize` is called another number of times than there are iterations.",
    "shapes": "The shapes should be those of A (r, in) and B (out, r).",
    "dtypes": "A and B should be float32, whatever the dtype of W.",
    "part of a graph": "A or B requires gradients: they belong to the graph of W. Detach W first.",
}
BEGIN = {
    "unchanged": "You raise the error too late: the layer has been changed already.",
    "calls of quantize": "The `quantize` that is given is called another number of times than there are iterations.",
    "scaling": "The scaling of the layer has changed. It has to stay alpha / r.",
    "the same parameters": "`lora_A` and `lora_B` should stay the same parameter objects, with new values.",
    "dtypes": "`lora_A` or `lora_B` has another dtype than before.",
    "trained": "`lora_A` and `lora_B` should still require gradients.",
}
explain_product, explain_checkpoint, explain_pages = map(first_difference, (PRODUCT, CHECKPOINT, PAGES))
_model, _loftq, _begin = map(first_difference, (MODEL, LOFTQ, BEGIN))


def explain_model(case: Case, seen: Seen, expected: Seen) -> Explanation:
    return _refusal(seen, expected) or _model(case, seen, expected)


def explain_loftq(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The record's other entries, then whether Q or B A is wrong."""
    if (found := _loftq(case, seen, expected)) is not None:
        return found
    if _other_Q(seen, expected):
        if case.inputs["iterations"] == 1:
            return "another Q", "In the first iteration B A is still zero, so Q is quant(W). Yours is not."
        return "another Q", (
            "Q is not that of the last iteration. Each Q is quant(W - B A), with the B A of the iteration before."
        )
    Q, BA, W, rank = (_tensor(seen, "Q"), _tensor(seen, "BA"), case.inputs["W"], case.inputs["rank"])
    assert isinstance(W, Tensor)
    assert isinstance(rank, int)
    if same(BA, Q - W.float(), 1e-3):
        return "the other sign", "Q is right, but B A is Q - W. It is added to Q."
    lost, left = float((W.float() - Q).norm()), float((W.float() - Q - BA).norm())
    best = float(torch.linalg.svdvals(W.float() - Q)[rank:].norm())
    return "another product", (
        f"Q is right, but B A is not the matrix of rank {rank} that is nearest to W - Q. The norm of W - Q is "
        f"{lost:.4g}; with the best B A {best:.4g} of it is left, with yours {left:.4g}."
    )


def explain_begin(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The record's other entries, then whether Q or the product of A and B is wrong."""
    if (found := _refusal(seen, expected) or _begin(case, seen, expected)) is not None:
        return found
    if _other_Q(seen, expected):
        return "another Q", "`layer.base.quantized` is not the Q that LoftQ returns for this W."
    BA, wanted = _tensor(seen, "BA"), _tensor(expected, "BA")
    ratio = float((BA * wanted).sum() / wanted.square().sum())
    if same(BA, ratio * wanted, 2e-2):
        return "another size", (
            f"Q is right, but s B A of your layer is {ratio:.4g} times LoftQ's B A. The layer multiplies by its "
            "scaling, and its scaling stays as it is."
        )
    return (
        "another product",
        "Q is right, but s B A of your layer is not LoftQ's B A. What did you write into A, and into B?",
    )


def _refusal(seen: Seen, expected: Seen) -> Explanation:
    assert isinstance(seen.value, dict)
    assert isinstance(expected.value, dict)
    if seen.value["refused"] and not expected.value["refused"]:
        return "refuses valid input", "These arguments are valid, but your code raises a ValueError."
    if expected.value["refused"] and not seen.value["refused"]:
        return "no error", "These arguments are invalid. Your code should raise a ValueError that says why."
    return None


def _other_Q(seen: Seen, expected: Seen) -> bool:
    """Whether more than one entry differs: a single one may, where rounding decides."""
    Q, wanted = _tensor(seen, "Q"), _tensor(expected, "Q")
    return int(((Q - wanted).abs() > 1e-4 * wanted.abs().max()).sum()) > 1


def _tensor(seen: Seen, name: str) -> Tensor:
    assert isinstance(seen.value, dict)
    value = seen.value[name]
    assert isinstance(value, Tensor)
    return value
