"""Unit 13, QLoRA: the inputs of the cases, and the probes."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
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


def product_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, outputs: int, inputs: int, *batch: int, **more: Data) -> Case:
        given: dict[str, Data] = {
            "weight": draw.normal(outputs, inputs),
            "bias": draw.normal(outputs),
            "x": draw.normal(*batch, inputs),
            "grad_y": draw.normal(*batch, outputs),
        }
        return Case(name, given | more, part)

    yield case("4 rows of 6 inputs, 5 outputs, without a bias", "forward and backward", 5, 6, 4, bias=None)
    yield case("a square weight and a bias", "forward and backward", 6, 6, 3)
    yield case("3 texts of 2 tokens", "forward and backward", 4, 7, 3, 2)
    yield case("a single token", "forward and backward", 3, 5)
    yield case("x in bfloat16", "forward and backward", 4, 8, 2, bias=None, dtype="bfloat16")
    yield case("a frozen bias", "gradients that are not needed", 5, 3, 2, 2, trained_bias=False)
    yield case("the gradient of x is not needed", "gradients that are not needed", 4, 6, 5, x_needs_it=False)


def run_product(
    answer: Any,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    grad_y: Tensor,
    dtype: str = "float32",
    trained_bias: bool = True,
    x_needs_it: bool = True,
) -> Any:
    """y, the gradients, how much is kept between forward and backward, and whether W is dequantised needlessly."""
    made: list[torch.dtype] = []

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
        y = answer.apply(leaf, bias, quantized)
    kept += [tensor for tensor in tree_leaves(getattr(y.grad_fn, "__dict__", {})) if isinstance(tensor, Tensor)]
    there = {part.data_ptr() for part in (q.packed, q.scales)}
    made.clear()
    wanted = [t for t in (leaf, bias) if t is not None and t.requires_grad]
    found = torch.autograd.grad((y * grad_y.to(y.dtype)).sum(), wanted, allow_unused=True)
    return {
        "y": y,
        "dtype": str(y.dtype),
        "gradients": list(found),
        "bytes kept": sum(tensor.nbytes for tensor in kept if tensor.data_ptr() not in there),
        "made for nothing": bool(made) and not x_needs_it,
    }


# --- quantize_model ----------------------------------------------------------------------------------


def model_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, **more: Data) -> Case:
        return Case(name, {"seed": draw.integer(0, 10**6), "tokens": draw.integers(0, 10, 1, 3), **more}, part)

    yield case("a GPT-2 of one block", "the model", n_layer=1)
    other: dict[str, Data] = {"quant_type": "fp4", "blocksize": 32, "double_quantization": False}
    yield case("a GPT-2 of two blocks, FP4 in blocks of 32, without double quantisation", "the model", **other)
    yield case("a model that is already in four bits", "the model", n_layer=1, state="quantised")
    yield case("a weight of the second block is not finite", "what is refused", state="broken")
    yield case("a model that contains a LoRA", "what is refused", n_layer=1, state="adapted")


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
        return {"refused": True, "as it was": untouched, "names the layer": "transformer.h.1.mlp.c_fc" in str(error)}
    if not isinstance(returned, dict):
        return returned
    after = dict(model.named_parameters())
    quantized = {name: layer.quantized for name, layer in nf4_layers(model).items()}
    return {
        "refused": False,
        "in four bits": {name: [q.quant_type, q.blocksize, q.nested] for name, q in quantized.items()},
        "returned": sorted(returned),
        "what was there": all(layer is modules.get(name) for name, layer in returned.items()),
        "the same objects": sorted(name for name, p in after.items() if p is parameters.get(name)),
        "logits": model(tokens),
    }


# --- CheckpointFunction ------------------------------------------------------------------------------


def checkpoint_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, rows: int, width: int, **more: Data) -> Case:
        given: dict[str, Data] = {
            "W": draw.normal(width, width),
            "x": draw.normal(rows, width),
            "grad_y": draw.normal(rows, width),
        }
        return Case(name, given | more, part)

    yield case("a function with two layers", "the gradients", 2, 3)
    yield case("x is the result of another operation", "the gradients", 3, 4, inside=True)
    yield case("the parameters already have a gradient", "the gradients", 2, 3, before=True)
    yield case("two functions in sequence", "the gradients", 2, 4, times=2, inside=True)
    yield case("a function with dropout", "randomness", 6, 8, dropout=0.5)


def run_checkpoint(
    answer: Any,
    W: Tensor,
    x: Tensor,
    grad_y: Tensor,
    inside: bool = False,
    before: bool = False,
    times: int = 1,
    dropout: float = 0.0,
) -> Any:
    """y, all gradients, which activations are kept, how often the function runs, and the random numbers."""
    W.requires_grad_(True)
    W.grad = torch.ones_like(W) if before else None
    x.requires_grad_(True)
    runs: list[bool] = []
    activations: list[weakref.ref[torch.UntypedStorage]] = []

    def function(x: Tensor) -> Tensor:
        h = torch.tanh(x @ W)
        runs.append(torch.is_grad_enabled())
        activations.append(weakref.ref(h.untyped_storage()))
        return F.dropout(h, dropout) @ W

    y = 2 * x if inside else x
    for _ in range(times):
        y = answer.apply(function, y)
    kept = sum(activation() is not None for activation in activations)
    first_runs = list(runs)
    state = torch.get_rng_state()
    (y * grad_y).sum().backward()
    return {
        "y": y,
        "gradient of x": x.grad,
        "gradient of W": W.grad,
        "activations that are kept": kept,
        "runs at first": len(first_runs),
        "runs in all": len(runs),
        "random numbers go on as if nothing had happened": torch.equal(state, torch.get_rng_state()),
    }


# --- Pages -------------------------------------------------------------------------------------------


def pages_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, *shape: int, start: int = 0, dtype: str = "float32") -> Case:
        n = max(1, int(torch.tensor(shape).prod()))
        given: dict[str, Data] = {"shape": list(shape), "dtype": dtype, "start": start}
        return Case(name, given | {"m": draw.integers(1, 99, n), "v": draw.integers(100, 199, n)}, part)

    yield case("a matrix of 2 x 3 at the start of the file", "m and v", 2, 3)
    yield case("a vector on the third page", "m and v", 5, start=2)
    yield case("float64, on the second page", "m and v", 2, 2, 3, start=1, dtype="float64")
    yield case("a single number in float16", "m and v", dtype="float16")
    yield case("m fits on one page, m and v together do not", "whole pages", 7, 100)
    yield case("more than two pages, on the second page", "whole pages", 1100, start=1)


def run_pages(answer: Any, shape: list[int], dtype: str, start: int, m: Tensor, v: Tensor) -> Any:
    """Where m and v are in the file, what the tensors contain when the file is written, and what is released."""
    released: list[list[Any]] = []

    class Watched(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = -1) -> None:
            released.append([option == getattr(mmap, "MADV_DONTNEED", option), start, length])

    mapping = Watched(-1, (start + 6) * mmap.PAGESIZE)
    like = torch.zeros(shape, dtype=DTYPES[dtype])
    pages = answer(mapping, start * mmap.PAGESIZE, like)
    seen: dict[str, Any] = {"shapes": [list(pages.m.shape), list(pages.v.shape)]}
    seen |= {"dtypes": [str(pages.m.dtype), str(pages.v.dtype)], "length": pages.length}
    pages.m.copy_(m.view(shape))
    pages.v.copy_(v.view(shape))
    seen["in the file"] = torch.frombuffer(bytearray(mapping[:]), dtype=like.dtype)
    seen["in the tensors"] = [pages.m.clone(), pages.v.clone()]
    mapping[:] = bytes(len(mapping))
    seen["after the file is emptied"] = [pages.m.clone(), pages.v.clone()]
    pages.release()
    return seen | {"released": released}


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
        name: str, part: str, outputs: int, inputs: int, rank: int, iterations: int = 1, dtype: str = "float32"
    ) -> Case:
        W = draw.normal(outputs, inputs).to(DTYPES[dtype])
        return Case(name, {"W": W, "rank": rank, "iterations": iterations}, part)

    yield case("8 x 12, r = 2, one iteration", "one iteration", 8, 12, 2)
    yield case("12 x 8, r = 1, one iteration", "one iteration", 12, 8, 1)
    yield case("6 x 9 in bfloat16, r = 6, one iteration", "one iteration", 6, 9, 6, dtype="bfloat16")
    yield case("12 x 12, r = 3, two iterations", "more iterations", 12, 12, 3, 2)
    yield case("8 x 16, r = 2, five iterations", "more iterations", 8, 16, 2, 5)
    yield case("r = 7 for a matrix of 6 x 9", "what is refused", 6, 9, 7)
    yield case("r = 0", "what is refused", 6, 9, 0)
    yield case("no iteration", "what is refused", 6, 9, 2, 0)


def run_loftq(answer: Callable[..., Any], W: Tensor, rank: int, iterations: int) -> Any:
    quantize = Quantizer()
    Q, A, B = answer(W, rank, iterations, quantize)
    return {
        "Q": Q.dequantize(),
        "shapes": [list(A.shape), list(B.shape)],
        "BA": B @ A,
        "calls of quantize": quantize.calls,
        "part of a graph": bool(A.requires_grad or B.requires_grad),
    }


def begin_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, part: str, outputs: int, inputs: int, rank: int, alpha: float, iterations: int = 1) -> Case:
        given: dict[str, Data] = {"W": draw.normal(outputs, inputs), "x": draw.normal(3, inputs)}
        return Case(name, given | {"rank": rank, "alpha": alpha, "iterations": iterations}, part)

    yield case("10 inputs, 6 outputs, r = 2, alpha = 8", "the layer", 6, 10, 2, 8.0)
    yield case("8 inputs, 8 outputs, r = 4, alpha = 1", "the layer", 8, 8, 4, 1.0)
    yield case("5 inputs, 12 outputs, r = 1, alpha = 3, three iterations", "the layer", 12, 5, 1, 3.0, 3)
    usual = case("a LoRA on a layer that is not in four bits", "what is refused", 4, 6, 2, 4.0)
    yield Case(usual.name, {**usual.inputs, "on": "full"}, usual.part)
    other = case("W and the layer have different shapes", "what is refused", 4, 6, 2, 4.0)
    yield Case(other.name, {**other.inputs, "on": "turned"}, other.part)


def run_begin(
    answer: Callable[..., Any],
    W: Tensor,
    x: Tensor,
    rank: int,
    alpha: float,
    iterations: int,
    on: str = "four bits",
) -> Any:
    dense = nn.Linear(W.shape[1], W.shape[0])
    with torch.no_grad():
        dense.weight.copy_(W)
    layer = LoRALinear(dense if on == "full" else NF4Linear.from_layer(dense), rank, alpha)
    parameters = [layer.lora_A, layer.lora_B]
    quantize = Quantizer()
    answer(layer, W.T if on == "turned" else W, iterations, quantize)
    base: Any = layer.base
    return {
        "y": layer(x),
        "Q": base.quantized.dequantize(),
        "BA": layer.scaling * layer.lora_B @ layer.lora_A,
        "scaling": layer.scaling,
        "the same parameters": [layer.lora_A is parameters[0], layer.lora_B is parameters[1]],
        "trained": [layer.lora_A.requires_grad, layer.lora_B.requires_grad],
        "calls of quantize": quantize.calls,
    }


def nearly_the_same_start(case: Case, seen: Seen, expected: Seen) -> bool:
    """Equal, except that a weight close to a midpoint may have the neighbouring code: rounding decides."""
    one, other = seen.value, expected.value
    if not isinstance(one, dict) or not isinstance(other, dict) or one.keys() != other.keys():
        return False
    if not all(same(one[key], other[key]) for key in other if key not in ("Q", "BA", "y")):
        return False
    Q, wanted = one["Q"], other["Q"]
    assert isinstance(Q, Tensor)
    assert isinstance(wanted, Tensor)
    if Q.shape != wanted.shape:
        return False
    flipped = int(((Q - wanted).abs() > 1e-4 * wanted.abs().max()).sum())
    loose = 0.3 if flipped else 1e-3
    return flipped <= 1 and all(same(one[key], other[key], loose) for key in other if key in ("BA", "y"))
