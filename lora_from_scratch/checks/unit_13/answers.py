"""Unit 13, QLoRA: mistakes that people make with the 4-bit layer and the 4-bit model, and other right ways.

The files `unit_13_*.py` have those of the other exercises.
"""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.methods.lora import inject_lora
from lora_from_scratch.methods.method import adaptation_of
from lora_from_scratch.methods.placement import classifier, linear_layers, output_head
from lora_from_scratch.quantization.nf4 import dequantize_nf4
from lora_from_scratch.quantization.nf4_linear import FourBitProduct, NF4Linear, check_quantization, nf4_layers
from lora_from_scratch.quantization.quantized_tensor import quantize_4bit

# --- FourBitProduct ----------------------------------------------------------------------------------


def first(ctx: Any, x: Any, bias: Any, quantized: Any) -> Any:
    ctx.quantized = quantized
    return F.linear(x, quantized.dequantize(x.dtype), bias)


def gradients(ctx: Any, grad_y: Any) -> tuple:
    grad_x = grad_y @ ctx.quantized.dequantize(grad_y.dtype) if ctx.needs_input_grad[0] else None
    grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(dim=0) if ctx.needs_input_grad[1] else None
    return grad_x, grad_bias, None


@right("FourBitProduct")
class FromThePackedBytes(torch.autograd.Function):
    """Keeps the parts by PyTorch's own means, and unpacks them by itself."""

    @staticmethod
    def forward(ctx, x, bias, quantized):
        ctx.save_for_backward(quantized.packed, quantized.scales)
        ctx.rest = quantized.shape, quantized.blocksize, x.dtype
        W = dequantize_nf4(quantized.packed, quantized.scales, *ctx.rest)
        return x @ W.T if bias is None else x @ W.T + bias

    @staticmethod
    def backward(ctx, grad_y):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.einsum("...o,oi->...i", grad_y, dequantize_nf4(*ctx.saved_tensors, *ctx.rest))
        if ctx.needs_input_grad[1]:
            grad_bias = torch.einsum("...o->o", grad_y)
        return grad_x, grad_bias, None


@right("FourBitProduct")
class BackwardInFloat32(torch.autograd.Function):
    """More precise than it has to be; autograd converts the gradient to the dtype of x."""

    @staticmethod
    def forward(ctx, x, bias, quantized):
        ctx.q = quantized
        return F.linear(x, quantized.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad_y):
        exact = torch.promote_types(grad_y.dtype, torch.float32)
        x, b, _ = ctx.needs_input_grad
        rows = grad_y.to(exact).reshape(-1, grad_y.shape[-1])
        grad_x = (rows @ ctx.q.dequantize(exact)).reshape(*grad_y.shape[:-1], -1) if x else None
        return grad_x, rows.sum(dim=0) if b else None, None


@right("FourBitProduct")
class ALinearLayerOfTheTransposedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, quantized):
        ctx.q, ctx.dtype = quantized, x.dtype
        return F.linear(x, ctx.q.dequantize(ctx.dtype), bias)

    @staticmethod
    def backward(ctx, grad_y):
        x, b, _ = ctx.needs_input_grad
        rows = grad_y.flatten(0, -2) if grad_y.ndim > 1 else grad_y[None]
        return F.linear(grad_y, ctx.q.dequantize(ctx.dtype).T) if x else None, rows.sum(0) if b else None, None


@right("FourBitProduct")
class AsksAutogradForThePullback(torch.autograd.Function):
    """A linear layer is linear in x: its gradient does not depend on where it is taken, so it is taken at zero."""

    @staticmethod
    def forward(ctx, x, bias, quantized):
        ctx.quantized, ctx.shape = quantized, x.shape
        return torch.matmul(x, quantized.dequantize(x.dtype).mT) + (0 if bias is None else bias)

    @staticmethod
    def backward(ctx, grad_y):
        grad_x = None
        if ctx.needs_input_grad[0]:
            with torch.enable_grad():
                zero = grad_y.new_zeros(ctx.shape, requires_grad=True)
                y = F.linear(zero, ctx.quantized.dequantize(grad_y.dtype))
            (grad_x,) = torch.autograd.grad(y, zero, grad_y)
        axes = tuple(range(grad_y.ndim - 1))
        grad_bias = (grad_y.sum(axes) if axes else grad_y) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


@right("FourBitProduct")
class LeavesTheSumToPyTorch(torch.autograd.Function):
    """A gradient that still has the axes of the batch is summed over them, as where a tensor was broadcast."""

    forward = staticmethod(first)

    @staticmethod
    def backward(ctx, grad_y):
        return gradients(ctx, grad_y)[0], grad_y.clone() if ctx.needs_input_grad[1] else None, None


@wrong(
    "FourBitProduct",
    "The dequantised weight stays in memory after the forward pass. In a model this happens in every layer at once, "
    "and all that quantisation saved is lost.",
)
class KeepsTheWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, quantized):
        ctx.W = quantized.dequantize(x.dtype)
        return F.linear(x, ctx.W, bias)

    @staticmethod
    def backward(ctx, grad_y):
        grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(dim=0) if ctx.needs_input_grad[1] else None
        return grad_y @ ctx.W if ctx.needs_input_grad[0] else None, grad_bias, None


@wrong(
    "FourBitProduct",
    "You save x. A layer with a trained weight has to do that; which of your gradients depends on x?",
)
class KeepsTheInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, quantized):
        ctx.save_for_backward(x)
        return first(ctx, x, bias, quantized)

    backward = staticmethod(gradients)


@wrong("FourBitProduct", "y lacks the bias.")
@changed(FourBitProduct, ("F.linear(x, W, bias)", "F.linear(x, W)"))
class WithoutTheBias: ...


@wrong(
    "FourBitProduct",
    "You multiply the gradient by the transposed weight, as in the forward pass. Write down the shapes of dL/dy, W and "
    "dL/dx: which product fits?",
)
@changed(FourBitProduct, ("grad_x = grad_y @ W", "grad_x = grad_y @ W.T"))
class TheTransposedWeightAgain: ...


@wrong(
    "FourBitProduct",
    "You return no gradient for x. The weight is frozen, but the layers before this one are not: a LoRA in an earlier "
    "block learns only through this gradient.",
)
@changed(FourBitProduct, ("return grad_x, ", "return None, "))
class NoGradientForX: ...


@wrong("FourBitProduct", "The bias was added to every row, so its gradient is the sum over the rows, not their mean.")
@changed(FourBitProduct, (".sum(dim=0)", ".mean(dim=0)"))
class TheMeanOverTheRows: ...


@wrong(
    "FourBitProduct",
    "You dequantise W to its original dtype. It is multiplied with x, so dequantise it to the dtype of x.",
)
@changed(FourBitProduct, ("dequantize(x.dtype)", "dequantize()"))
class InTheStoredDtype: ...


@wrong("FourBitProduct", "You compute in float32 whatever the dtype of x. y must have the dtype of x.")
class AlwaysInFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, quantized):
        return first(ctx, x.float(), bias, quantized)

    @staticmethod
    def backward(ctx, grad_y):
        return gradients(ctx, grad_y)


@wrong(
    "FourBitProduct",
    "You dequantise W in the backward pass even if the gradient of x is not needed. In the first layer after frozen "
    "embeddings that is wasted work: check `ctx`.",
)
@changed(FourBitProduct, ("if ctx.needs_input_grad[0]:", "if True:"))
class WithoutAsking: ...


@wrong("FourBitProduct", "You return a gradient for the bias even if nobody needs it. Ask `ctx.needs_input_grad`.")
@changed(FourBitProduct, ("if ctx.needs_input_grad[1]:", "if True:"))
class AlwaysAGradientForTheBias: ...


@wrong("FourBitProduct", "You return no gradient for the bias: a trained bias would never change.")
@changed(FourBitProduct, ("if ctx.needs_input_grad[1]:", "if False:"))
class NoGradientForTheBias: ...


@wrong(
    "FourBitProduct",
    "You `view` dL/dy, which only works if it is contiguous. `reshape` copies where it has to.",
)
@changed(FourBitProduct, ("grad_y.reshape", "grad_y.view"))
class OnlyContiguous: ...


@wrong(
    "FourBitProduct",
    "You exchange the two questions: `ctx.needs_input_grad[0]` is about x, and `[1]` is about the bias.",
)
@changed(
    FourBitProduct,
    ("ctx.needs_input_grad[0]", "ctx.needs_input_grad[-2]"),
    ("ctx.needs_input_grad[1]", "ctx.needs_input_grad[0]"),
)
class QuestionsExchanged: ...


@wrong("FourBitProduct", "You sum the gradient of the bias over the wrong axis: one number for each output remains.")
@changed(
    FourBitProduct,
    (
        ".reshape(-1, grad_y.shape[-1]).sum(dim=0)",
        ".sum(dim=-1).sum() * torch.ones_like(grad_y[..., 0, :] if grad_y.ndim > 1 else grad_y)",
    ),
)
class TheSumOfAll: ...


# --- quantize_model ----------------------------------------------------------------------------------


def check_not_adapted(model: Any) -> None:
    if adaptation_of(model) is not None:
        raise ValueError("the model is adapted already")


def matrices(model: Any) -> dict:
    head = classifier(model)
    kept = [] if head is None else list(head.modules())
    found = linear_layers(model).items()
    return {name: layer for name, layer in found if layer not in kept and not isinstance(layer, NF4Linear)}


def in_four_bits(name: str, layer: Any, *options: Any) -> NF4Linear:
    try:
        return NF4Linear.from_layer(layer, *options)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@right("quantize_model")
def parent_by_parent(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    plan = []
    dense = list(matrices(model).values())
    for path, parent in model.named_modules():
        for child, layer in parent.named_children():
            if any(layer is one for one in dense):
                name = f"{path}.{child}" if path else child
                new = in_four_bits(name, layer, quant_type, blocksize, double_quantization)
                plan.append((name, parent, child, layer, new))
    for _, parent, child, _, new in plan:
        setattr(parent, child, new)
    return {name: layer for name, _, _, layer, _ in plan}


@right("quantize_model")
def puts_them_back_when_one_fails(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    done = {}
    try:
        for name, layer in matrices(model).items():
            inject_lora(model, {name: in_four_bits(name, layer, quant_type, blocksize, double_quantization)})
            done[name] = layer
    except ValueError:
        inject_lora(model, done)
        raise
    return done


@right("quantize_model")
def checks_first_and_converts_one_by_one(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    check_quantization(quant_type, blocksize)
    dense = matrices(model)
    for name, layer in dense.items():
        if not layer.weight.isfinite().all():
            raise ValueError(f"the weight of {name} has entries that are not finite")
    for name, layer in dense.items():
        path, _, child = name.rpartition(".")
        new = NF4Linear.from_layer(layer, quant_type, blocksize, double_quantization)
        model.get_submodule(path)._modules[child] = new
    return dense


@right("quantize_model")
def by_walking_down_the_tree(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    head, out, new = classifier(model), output_head(model), {}

    def walk(module, path):
        for child, part in module.named_children():
            name = ".".join([*path, child])
            if part is head or part is out or isinstance(part, NF4Linear):
                continue
            if isinstance(part, nn.Linear | Conv1D):
                new[name] = in_four_bits(name, part, quant_type, blocksize, double_quantization)
            walk(part, [*path, child])

    walk(model, [])
    old = {name: model.get_submodule(name) for name in new}
    inject_lora(model, new)
    return old


@wrong("quantize_model", "You quantise the Conv1D alone. A model may have `nn.Linear` too: `linear_layers` finds both.")
def conv1d_alone(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    dense = {name: layer for name, layer in model.named_modules() if isinstance(layer, Conv1D)}
    options = quant_type, blocksize, double_quantization
    inject_lora(model, {name: in_four_bits(name, layer, *options) for name, layer in dense.items()})
    return dense


@wrong("quantize_model", "You quantise the head that makes classes too. It stays as it is, with everything in it.")
def the_head_too(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    dense = {name: layer for name, layer in linear_layers(model).items() if not isinstance(layer, NF4Linear)}
    options = quant_type, blocksize, double_quantization
    inject_lora(model, {name: in_four_bits(name, layer, *options) for name, layer in dense.items()})
    return dense


@wrong(
    "quantize_model",
    "For a model that is in four bits already you return its layers. None of them was replaced: return nothing for it.",
)
def returns_layers_in_four_bits(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    dense = matrices(model)
    options = quant_type, blocksize, double_quantization
    inject_lora(model, {name: in_four_bits(name, layer, *options) for name, layer in dense.items()})
    return dense or nf4_layers(model)


@wrong(
    "quantize_model",
    "The old weights stay in memory even when the layers that you return are dropped: something in the model, or a new "
    "layer, still holds them.",
)
def holds_the_old_ones(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    dense = matrices(model)
    new = {name: in_four_bits(name, layer, quant_type, blocksize, double_quantization) for name, layer in dense.items()}
    for name, layer in new.items():
        layer.__dict__["before"] = dense[name]
    inject_lora(model, new)
    return dense


@wrong(
    "quantize_model",
    "Some of the matrices are not quantised. Replace every Conv1D of every block, including those of the MLP.",
)
def the_attention_alone(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    dense = {name: layer for name, layer in matrices(model).items() if ".attn." in name}
    for name, layer in matrices(model).items():
        in_four_bits(name, layer)
    new = {n: in_four_bits(n, layer, quant_type, blocksize, double_quantization) for n, layer in dense.items()}
    inject_lora(model, new)
    return dense


@wrong(
    "quantize_model",
    "You look only at the model's direct children, which are not matrices. The matrices are in nested modules.",
)
def the_children_alone(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    for name, layer in matrices(model).items():
        in_four_bits(name, layer)
    dense = {name: child for name, child in model.named_children() if isinstance(child, Conv1D)}
    inject_lora(model, {name: NF4Linear.from_layer(child) for name, child in dense.items()})
    return dense


@wrong("quantize_model", "You return the new layers. The model already holds those; return the old ones.")
def returns_the_new_ones(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    options = quant_type, blocksize, double_quantization
    new = {name: in_four_bits(name, layer, *options) for name, layer in matrices(model).items()}
    inject_lora(model, new)
    return new


@wrong(
    "quantize_model",
    "The model is left half changed if a later weight turns out to be invalid. Create all the new layers first, and "
    "insert them when nothing can fail any more.",
)
def layer_by_layer(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    dense = matrices(model)
    for name, layer in dense.items():
        inject_lora(model, {name: in_four_bits(name, layer, quant_type, blocksize, double_quantization)})
    return dense


@wrong(
    "quantize_model",
    "Raise an error for a model that a method has adapted: the method's record of it would no longer be true.",
)
def even_if_it_is_adapted(model, quant_type="nf4", blocksize=64, double_quantization=True):
    dense = matrices(model)
    options = quant_type, blocksize, double_quantization
    inject_lora(model, {name: in_four_bits(name, layer, *options) for name, layer in dense.items()})
    return dense


@wrong(
    "quantize_model",
    "You raise an error for an invalid weight, but the message does not say which layer it is in. In a model with "
    "hundreds of layers, the user needs to know.",
)
def without_the_name(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    dense = matrices(model)
    options = quant_type, blocksize, double_quantization
    inject_lora(model, {name: NF4Linear.from_layer(layer, *options) for name, layer in dense.items()})
    return dense


@wrong(
    "quantize_model",
    "You always quantise with the default type, block size and double quantisation. Use the given ones.",
)
def as_usual(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    dense = matrices(model)
    inject_lora(model, {name: in_four_bits(name, layer) for name, layer in dense.items()})
    return dense


@wrong(
    "quantize_model",
    "You use the weight of a Conv1D as it is stored, (in, out). The 4-bit layer expects (out, in).",
)
def not_turned_round(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    dense = matrices(model)
    for name, layer in dense.items():
        in_four_bits(name, layer)
    inject_lora(
        model,
        {
            name: NF4Linear(quantize_4bit(layer.weight.data, quant_type, blocksize, double_quantization), layer.bias)
            for name, layer in dense.items()
        },
    )
    return dense


@wrong(
    "quantize_model",
    "The new layers have biases of their own. They have to share the old ones: the same parameter, not a copy.",
)
def copies_the_biases(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    dense = matrices(model)
    options = quant_type, blocksize, double_quantization
    new = {name: in_four_bits(name, layer, *options) for name, layer in dense.items()}
    for layer in new.values():
        layer.bias = nn.Parameter(layer.bias.detach().clone())
    inject_lora(model, new)
    return dense


@wrong("quantize_model", caught_by="returns nothing")
def keeps_nothing(model, quant_type="nf4", blocksize=64, double_quantization=True):
    check_not_adapted(model)
    options = quant_type, blocksize, double_quantization
    inject_lora(model, {name: in_four_bits(name, layer, *options) for name, layer in matrices(model).items()})
