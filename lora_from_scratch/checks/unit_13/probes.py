"""Unit 13, QLoRA: the inputs of the cases, and the probes; those about memory are in `probes_memory.py`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case, Draw
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.gpt2 import GPT2, GPT2Config
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.methods.lora import LoRA, LoRALinear, inject_lora
from lora_from_scratch.quantization.nf4_linear import NF4Linear, nf4_layers
from lora_from_scratch.quantization.quantized_tensor import QuantizedTensor, quantize_4bit

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

# --- FourBitProduct ----------------------------------------------------------------------------------

BOTH = "forward and backward"


def product_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str, outputs: int, inputs: int, batch: tuple[int, ...], *sentences: str, part: str = BOTH, **more: Data
    ) -> Case:
        given: dict[str, Data] = {
            "weight": draw.normal(outputs, inputs),
            "bias": draw.normal(outputs),
            "x": draw.normal(*batch, inputs),
            "grad_y": draw.normal(*batch, outputs),
        }
        return Case(name, given | more, part, sentences)

    product, kept, order = "`y = x W^T + b`", "kept never", "in this order"
    either, only_x, hold = "bias (out,) or None", "made again there", "Between the two"
    yield case(
        "4 rows of 6 inputs, 5 outputs, without a bias", 5, 6, (4,), product, kept, hold, only_x, either, bias=None
    )
    yield case("a square weight and a bias", 6, 6, (3,), product, order, either)
    yield case("3 texts of 2 tokens", 4, 7, (3, 2), "Returns y (..., out)", "grad_y = dL/dy", order)
    yield case("a single token", 3, 5, (), "Returns y (..., out)", "grad_y = dL/dy")
    yield case("dL/dy is not contiguous", 4, 6, (3, 2), "grad_y = dL/dy", turned=True)
    yield case("x in bfloat16", 4, 8, (2,), "in the dtype of x", bias=None, dtype="bfloat16")
    yield case("x in float64", 4, 8, (2,), "in the dtype of x", bias=None, dtype="float64")
    part, none, nothing = "gradients that are not needed", "A gradient that nobody needs", "nothing is dequantised"
    yield case("a frozen bias", 5, 3, (2, 2), none, part=part, trained_bias=False)
    yield case("the gradient of x is not needed", 4, 6, (5,), nothing, none, part=part, x_needs_it=False)


def run_product(
    answer: Any,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    grad_y: Tensor,
    dtype: str = "float32",
    trained_bias: bool = True,
    x_needs_it: bool = True,
    turned: bool = False,
) -> Any:
    """y, the gradients, how much is kept between forward and backward, and what is computed needlessly."""
    made: list[torch.dtype] = []
    given_back: list[bool] = []

    def watched_backward(ctx: Any, grad_y: Tensor) -> Any:
        gradients = answer.backward(ctx, grad_y)
        given_back[:] = [gradient is not None for gradient in gradients]
        return gradients

    function = type(answer.__name__, (answer,), {"backward": staticmethod(watched_backward)})

    class Watched(QuantizedTensor):
        def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
            made.append(dtype or self.dtype)
            return super().dequantize(dtype)

    q = quantize_4bit(weight, blocksize=32)
    quantized = Watched(q.packed, q.absmax, q.quant_type, q.blocksize, q.shape, q.dtype)
    leaf = x.to(DTYPES[dtype]).requires_grad_(x_needs_it)
    if bias is not None:
        bias = bias.to(DTYPES[dtype]).requires_grad_(trained_bias)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function.apply(leaf, bias, quantized)  # type: ignore[attr-defined]
    kept += [tensor for tensor in tree_leaves(getattr(y.grad_fn, "__dict__", {})) if isinstance(tensor, Tensor)]
    there = {part.data_ptr() for part in (q.packed, q.scales)}
    made.clear()
    wanted = {name: t for name, t in (("x", leaf), ("bias", bias)) if t is not None and t.requires_grad}
    above = grad_y.to(y.dtype)
    if turned:  # the gradient of a transposed y is not contiguous
        y, above = y.transpose(0, 1), above.transpose(0, 1).contiguous()
    loss = (y * above).sum()
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        "y": y,
        "dtype": str(y.dtype),
        **{f"gradient of {name}": gradient for name, gradient in zip(wanted, found, strict=True)},
        "gradients returned": given_back,
        "bytes kept": sum(tensor.nbytes for tensor in kept if tensor.data_ptr() not in there),
        "made for nothing": bool(made) and not x_needs_it,
    }


def same_product(case: Case, seen: Seen, expected: Seen) -> bool:
    """In bfloat16 the last digit depends on the order of the additions, and on when W is rounded."""
    return same(seen.value, expected.value, 2**-6 if case.inputs.get("dtype") == "bfloat16" else 2e-3)


# --- quantize_model ----------------------------------------------------------------------------------


def model_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, *sentences: str, **more: Data) -> Case:
        given = {"seed": draw.integer(0, 10**6), "tokens": draw.integers(0, 10, 1, 3), **more}
        return Case(name, given, part, sentences)

    model, every, same = "the model", "every linear layer of a model but", "All else stays"
    yield case(
        "a GPT-2 of one block", model, every, "of a GPT-2 they are", same, "The layers that were there", n_layer=1
    )
    other: dict[str, Data] = {"quant_type": "fp4", "blocksize": 32, "double_quantization": False}
    name = "a GPT-2 of two blocks, FP4 in blocks of 32, without double quantisation"
    yield case(name, model, "as `NF4Linear.from_layer`", "keep them, and", "Drop them", **other)
    name = "a GPT-2 with one more `nn.Linear`, and a head that makes classes"
    yield case(name, model, every, "finds these layers", same, n_layer=1, state="more layers")
    already = ("It may be in four bits already", "then there is nothing to do", "Empty if")
    yield case("a model that is already in four bits", model, *already, n_layer=1, state="quantised")
    refused, as_it_was = "what is refused", "The model is then as it was"
    broken, adapted = "a weight is not finite", "not adapted by a method"
    yield case("a weight of the second block is not finite", refused, as_it_was, broken, state="broken")
    yield case("a model that contains a LoRA", refused, adapted, as_it_was, n_layer=1, state="adapted")
    yield case("the type int4", refused, broken, as_it_was, n_layer=1, quant_type="int4")
    yield case("blocks of 48", refused, broken, as_it_was, n_layer=1, blocksize=48)


def small_gpt2(n_layer: int, seed: int, state: str) -> GPT2:
    config = GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=n_layer, n_head=2)
    torch.manual_seed(seed)
    model = GPT2(config).eval()
    for module in model.modules():
        if isinstance(module, Conv1D):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    if state == "quantised":  # not by `quantize_model`: in grading the library's has no body
        dense = {name: module for name, module in model.named_modules() if isinstance(module, Conv1D)}
        inject_lora(model, {name: NF4Linear.from_layer(layer) for name, layer in dense.items()})
    if state == "more layers":
        model.bridge = nn.Linear(8, 4)
        model.score = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2))
    if state == "adapted":
        LoRA(rank=1).adapt(model)
    if state == "broken":
        with torch.no_grad():
            model.get_parameter("transformer.h.1.mlp.c_fc.weight")[3, 2] = torch.nan
    return model


def run_quantize_model(
    answer: Callable[..., Any], seed: int, tokens: Tensor, n_layer: int = 2, state: str = "full", **options: Any
) -> Any:
    """The model's layers and output afterwards; after an error, whether the model is unchanged."""
    model = small_gpt2(n_layer, seed, state)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    try:
        returned = answer(model, **options)
    except ValueError as error:
        untouched = [id(m) for m in model.modules()] == [id(m) for m in modules.values()]
        named = state != "broken" or "transformer.h.1.mlp.c_fc" in str(error)
        return {"refused": True, "as it was": untouched, "names the layer": named}
    if not isinstance(returned, dict):
        return returned
    after, quantized = dict(model.named_parameters()), nf4_layers(model)
    return {
        "refused": False,
        "in four bits": {
            n: [q.quantized.quant_type, q.quantized.blocksize, q.quantized.nested] for n, q in quantized.items()
        },
        "returned": sorted(returned),
        "what was there": all(layer is modules.get(name) for name, layer in returned.items()),
        "the same objects": sorted(name for name, p in after.items() if p is parameters.get(name)),
        "logits": model(tokens).detach(),
        **_put_back_and_dropped(model, returned, quantized, tokens, modules, parameters),
    }


def _put_back_and_dropped(
    model: GPT2,
    returned: dict[str, Any],
    quantized: dict[str, NF4Linear],
    tokens: Tensor,
    *others: dict[str, Any],
) -> dict[str, Any]:
    """The output with the returned layers in their places again; and whether dropping them frees their weights."""
    inject_lora(model, returned)
    logits = model(tokens).detach()
    inject_lora(model, quantized)
    weights = [weakref.ref(layer.weight) for layer in returned.values() if not isinstance(layer, NF4Linear)]
    for dropped in (returned, *others):
        dropped.clear()
    if any(weight() is not None for weight in weights):
        gc.collect()  # perhaps they are part of a cycle; collecting takes long
    return {"logits when put back": logits, "weights left": sum(weight() is not None for weight in weights)}


# --- LoftQ -------------------------------------------------------------------------------------------


class Quantizer:
    """NF4 in blocks of 32, counting the calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, W: Tensor) -> QuantizedTensor:
        self.calls += 1
        return quantize_4bit(W, blocksize=32)


def loftq_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str,
        part: str,
        shape: tuple[int, ...],
        rank: int,
        iterations: int,
        *sentences: str,
        dtype: str = "float32",
    ) -> Case:
        W = draw.normal(*shape).to(DTYPES[dtype])
        return Case(name, {"W": W, "rank": rank, "iterations": iterations}, part, sentences)

    one, more, alternate = "one iteration", "more iterations", "Alternate"
    nearest, returned, called = "the matrix of rank r nearest", "Q of the last iteration", "It is called once"
    yield case("8 x 12, r = 2, one iteration", one, (8, 12), 2, 1, nearest, returned, called, alternate)
    yield case("12 x 8, r = 1, one iteration", one, (12, 8), 1, 1, nearest, "W: (out, in)", "maps a matrix to Q")
    name = "6 x 9 in bfloat16, r = 6, one iteration"
    yield case(name, one, (6, 9), 6, 1, "rank: r, from 1", "both float32", "W: (out, in)", dtype="bfloat16")
    yield case("12 x 12, r = 3, two iterations", more, (12, 12), 3, 2, alternate, "iterations: T", called, returned)
    last = "Q of the last iteration"
    yield case("8 x 16, r = 2, five iterations", more, (8, 16), 2, 5, alternate, last, "iterations: T", called)
    bad, refused, rank = "what is refused", "ValueError: W is not a matrix", "rank: r, from 1"
    yield case("r = 7 for a matrix of 6 x 9", bad, (6, 9), 7, 1, refused, rank)
    yield case("r = 0", bad, (6, 9), 0, 1, refused, rank)
    yield case("no iteration", bad, (6, 9), 2, 0, refused, "iterations: T")
    yield case("W is a vector", bad, (6,), 1, 1, refused)
    yield case("W has three axes", bad, (2, 3, 4), 1, 1, refused)
    strange = draw.normal(4, 6)
    strange[1, 2] = torch.nan
    yield Case("W has an entry that is NaN", {"W": strange, "rank": 2, "iterations": 1}, bad, (refused,))


def run_loftq(answer: Callable[..., Any], W: Tensor, rank: int, iterations: int) -> Any:
    quantize = Quantizer()
    Q, A, B = answer(W.requires_grad_(), rank, iterations, quantize)
    return {
        "calls of quantize": quantize.calls,
        "shapes": [list(A.shape), list(B.shape)],
        "dtypes": [str(A.dtype), str(B.dtype)],
        "Q": Q.dequantize(),
        "BA": B @ A,
        "part of a graph": bool(A.requires_grad or B.requires_grad),
    }


def begin_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str, part: str, outputs: int, inputs: int, rank: int, alpha: float, *sentences: str, **more: Data
    ) -> Case:
        given: dict[str, Data] = {"W": draw.normal(outputs, inputs), "x": draw.normal(3, inputs)}
        given |= {"rank": rank, "alpha": alpha, "iterations": 1}
        return Case(name, given | more, part, sentences)

    start, scaling, new_Q = "the layer", "with its own scaling", "The layer gets a new Q"
    full, several = "W: (out, in), the full weight", "iterations, quantize: as for"
    start_of = "Initialise a LoRA on a 4-bit layer"
    yield case("10 inputs, 6 outputs, r = 2, alpha = 8", start, 6, 10, 2, 8.0, start_of, scaling, new_Q, full)
    yield case("8 inputs, 8 outputs, r = 4, alpha = 1", start, 8, 8, 4, 1.0, scaling, "they remain the same parameters")
    name = "5 inputs, 12 outputs, r = 1, alpha = 3, three iterations"
    yield case(name, start, 12, 5, 1, 3.0, several, scaling, "layer: a LoRA of rank r", iterations=3)
    yield case("a scaling of alpha / sqrt(r) (rsLoRA)", start, 6, 9, 4, 6.0, scaling, rslora=True)
    yield case("A and B in bfloat16", start, 6, 8, 2, 4.0, "they remain the same parameters", dtype="bfloat16")
    refused, invalid, unchanged = "what is refused", "is not an `NF4Linear` or its shape", "The layer is then unchanged"
    yield case("a LoRA on a layer that is not in four bits", refused, 4, 6, 2, 4.0, invalid, unchanged, on="full")
    yield case("W and the layer have different shapes", refused, 4, 6, 2, 4.0, invalid, unchanged, on="turned")
    other = "or as for `loftq_init`"
    yield case("no iteration", refused, 4, 6, 2, 4.0, other, unchanged, iterations=0)
    yield case("W has entries that are NaN", refused, 4, 6, 2, 4.0, other, unchanged, on="not finite")


def run_begin(
    answer: Callable[..., Any],
    W: Tensor,
    x: Tensor,
    rank: int,
    alpha: float,
    iterations: int,
    on: str = "four bits",
    rslora: bool = False,
    dtype: str = "float32",
) -> Any:
    """The layer afterwards; after an error, whether it is unchanged."""
    dense = nn.Linear(W.shape[1], W.shape[0])
    with torch.no_grad():
        dense.weight.copy_(W)
    layer = LoRALinear(dense if on == "full" else NF4Linear.from_layer(dense), rank, alpha, rslora=rslora)
    layer.lora_A.data, layer.lora_B.data = (p.data.to(DTYPES[dtype]) for p in (layer.lora_A, layer.lora_B))
    before: Any = (layer.lora_A, layer.lora_B, layer.base, layer.lora_A.data.clone(), layer.lora_B.data.clone())
    old_Q = getattr(layer.base, "quantized", None)
    quantize = Quantizer()
    try:
        answer(layer, {"turned": W.T, "not finite": W * torch.nan}.get(on, W), iterations, quantize)
    except ValueError:
        same_Q = getattr(layer.base, "quantized", None) is old_Q
        kept = layer.lora_A is before[0] and layer.lora_B is before[1] and layer.base is before[2]
        equal = torch.equal(layer.lora_A, before[3]) and torch.equal(layer.lora_B, before[4])
        return {"refused": True, "unchanged": same_Q and kept and equal}
    base: Any = layer.base
    return {
        "refused": False,
        "calls of quantize": quantize.calls,
        "scaling": layer.scaling,
        "the same parameters": [layer.lora_A is before[0], layer.lora_B is before[1]],
        "dtypes": [str(layer.lora_A.dtype), str(layer.lora_B.dtype)],
        "trained": [layer.lora_A.requires_grad, layer.lora_B.requires_grad],
        "Q": base.quantized.dequantize(),
        "BA": layer.scaling * layer.lora_B.float() @ layer.lora_A.float(),
        "y": layer(x.to(DTYPES[dtype])).float(),
    }


def nearly_the_same_start(case: Case, seen: Seen, expected: Seen) -> bool:
    """Equal, except that a weight close to a midpoint may have the neighbouring code: rounding decides."""
    one, other = seen.value, expected.value
    if not isinstance(one, dict) or not isinstance(other, dict) or one.keys() != other.keys():
        return False
    if not all(same(one[key], other[key]) for key in other if key not in ("Q", "BA", "y")):
        return False
    if "Q" not in other:
        return True
    Q, wanted = one["Q"], other["Q"]
    assert isinstance(Q, Tensor)
    assert isinstance(wanted, Tensor)
    if Q.shape != wanted.shape:
        return False
    flipped = int(((Q - wanted).abs() > 1e-4 * wanted.abs().max()).sum())
    loose = 0.3 if flipped else 2e-2 if case.inputs.get("dtype") == "bfloat16" else 1e-3
    return flipped <= 1 and all(same(one[key], other[key], loose) for key in other if key in ("BA", "y"))
