"""LQ-LoRA (Guo et al. 2023, arXiv:2311.12023): split each weight into a quantised part and a low-rank part.

    W ~ Q + s B A,      y = Q x + b + s B A x,      Q: (out, in) in NormalFloat,  A: (r, in),  B: (out, r)

Q is frozen, A and B are trained. It differs from QLoRA and LoftQ in three ways:

- The split (algorithm 2): starting from Q = 0, alternate `B A = SVD_r(W - Q)` and `Q = quant(W - B A)` until the error
  rises. LoftQ takes the same two steps in the opposite order, a fixed number of times.
- Errors may be weighted (section 3.3) by the diagonal of the Fisher information F, the mean squared gradient of each
  weight over examples. A weighted SVD has a closed form only if the weights are an outer product, so F (out, in) is
  replaced by row * column^T, with `row` (out,) and `column` (in,) the square roots of its row and column means:
  `SVD_r(row * (W - Q) * column)`, then divided by both.
- Each matrix gets its own number of bits and group size (section 3.2). An integer programme chooses them so that the
  sum of squared errors is minimal and the storage stays within a budget.

The paper has 432 configurations, which also vary how the scales are quantised; here there are 12 (`CHOICES`), with
8-bit scales. The integer programme uses the errors after one step of the split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import next_token_loss
from lora_from_scratch.methods.loftq import best_factors
from lora_from_scratch.methods.lora import LoRA, LoRALinear, inject_lora, lora_layers
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import random_targets
from lora_from_scratch.methods.quantized_lora import QuantizedLoRA, quantize_linear_layers
from lora_from_scratch.quantization.low_bit import BITS, LowBitTensor, quantize_normal_float
from lora_from_scratch.quantization.low_bit_linear import LowBitLinear
from lora_from_scratch.quantization.nf4_linear import quantized_layers
from lora_from_scratch.support.linear_layers import is_conv1d, weight_of
from lora_from_scratch.support.wrapped import unwrapped

Choice = tuple[int, int]  # bits and group size
Weighting = tuple[Tensor, Tensor]  # row (out,) and column (in,)

CHOICES: tuple[Choice, ...] = tuple((bits, group) for bits in BITS for group in (16, 32, 64))
LEAST = 1e-3  # smallest weight of a row or column, relative to the largest, so that it can be divided by

# --- One weight ------------------------------------------------------------------------------------------


def split(
    W: Tensor,
    rank: int,
    quantize: Callable[[Tensor], LowBitTensor],
    iterations: int = 5,
    weighting: Weighting | None = None,
) -> tuple[LowBitTensor, Tensor, Tensor]:
    """Find Q, A (r, in) and B (out, r) with Q + B A close to W (algorithm 2).

    Starting from Q = 0, each iteration takes A and B from `weighted_factors` of W - Q, and then Q = quant(W - B A). Its
    error is the `squared_error` of W - Q - B A. After the first iteration whose error is not smaller than that of the
    one before, there are no more. The best iteration is returned: the one before the error rose. (The authors' code
    returns the one in which it rose.)

    Args:
        W: (out, in), floating-point; perhaps a parameter, which gets no gradient. The computation runs in float32.
        rank: r, from 1 to the smaller side of W.
        quantize: maps a matrix to Q; `Q.dequantize()` is a matrix again. It is called once per iteration.
        iterations: the largest number of iterations, at least 1.
        weighting: passed on to `weighted_factors` and `squared_error`; None: no weighting.

    Returns:
        Q, A and B, all of the same iteration. Q is what `quantize` returned. How B A is factored is not specified.
    """
    W = W.detach().float()
    best, least, quantized = None, math.inf, torch.zeros_like(W)
    for _ in range(iterations):
        A, B = weighted_factors(W - quantized, rank, weighting)
        Q = quantize(W - B @ A)
        quantized = Q.dequantize()
        error = squared_error(W - quantized - B @ A, weighting)
        if error >= least:
            break
        best, least = (Q, A, B), error
    assert best is not None
    return best


def weighted_factors(matrix: Tensor, rank: int, weighting: Weighting | None = None) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) whose product is the matrix of rank r with the smallest `squared_error`.

    Args:
        matrix: (out, in), float32.
        weighting: the square roots of the weights of squared errors, by row and by column; None: no weighting.
    """
    if weighting is None:
        return best_factors(matrix, rank)
    row, column = weighting
    A, B = best_factors(row[:, None] * matrix * column, rank)
    return A / column, B / row[:, None]


def squared_error(difference: Tensor, weighting: Weighting | None = None) -> float:
    """The sum of squares, weighted by row^2 and column^2."""
    if weighting is not None:
        difference = weighting[0][:, None] * difference * weighting[1]
    return float(difference.square().sum(dtype=torch.float64))


# --- Bits for each matrix --------------------------------------------------------------------------------


def allocate(errors: Tensor, sizes: Tensor, budget: float) -> list[int]:
    """Choose a configuration for each matrix, minimising the summed errors with the summed sizes within a budget.

    An integer programme (section 3.2): x[i, c] is 1 if matrix i has choice c, and 0 otherwise,

        minimise  sum errors[i, c] x[i, c]   so that  sum sizes[i, c] x[i, c] <= budget  and  sum_c x[i, c] = 1

    Args:
        errors, sizes: (matrices, choices), float64.
        budget: in the same unit as the sizes.

    Raises:
        ValueError: nothing fits into the budget, or scipy is not installed.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise ValueError(
            "the bits of the matrices are chosen by scipy, which is not installed: "
            "pip install 'lora-from-scratch[lq-lora]'"
        ) from None
    n, choices = errors.shape
    one_each = torch.eye(n, dtype=torch.float64).repeat_interleave(choices, dim=1)  # (n, n * choices)
    unit = float(errors.max()) or 1.0
    result = milp(
        c=(errors / unit).flatten().numpy(),
        constraints=[
            LinearConstraint((sizes / budget).reshape(1, -1).numpy(), ub=1.0),
            LinearConstraint(one_each.numpy(), lb=1.0, ub=1.0),
        ],
        integrality=1,
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise ValueError(f"nothing fits into the budget of {budget:g}: the least is {float(sizes.amin(1).sum()):g}")
    return torch.from_numpy(result.x).view(n, choices).argmax(dim=1).tolist()


def choose_bits(
    weights: Mapping[str, Tensor], ranks: Mapping[str, int], budget: float, weighting: Mapping[str, Weighting]
) -> dict[str, Choice]:
    """One of `CHOICES` for each matrix.

    Args:
        weights: (out, in), by name.
        ranks: the rank of the low-rank part of each matrix that has one.
        budget: average number of bits per weight, including the scales.
        weighting: the weighting of the errors, for the matrices that have one.

    Raises:
        ValueError: as for `allocate`, with sizes in bits per weight.
    """
    errors = torch.zeros(len(weights), len(CHOICES), dtype=torch.float64)
    sizes = torch.zeros_like(errors)
    for i, (name, W) in enumerate(weights.items()):
        rest, of_it = W.detach().float(), weighting.get(name)
        if name in ranks and not W.is_meta:
            A, B = weighted_factors(rest, ranks[name], of_it)
            rest = rest - B @ A
        for c, (bits, group_size) in enumerate(CHOICES):
            Q = quantize_normal_float(rest, bits, group_size)
            sizes[i, c] = 8 * Q.nbytes
            # On the meta device there are no values; assume that each bit halves the error.
            errors[i, c] = W.numel() * 4.0**-bits if W.is_meta else squared_error(rest - Q.dequantize(), of_it)
    chosen = allocate(errors, sizes / sum(W.numel() for W in weights.values()), budget)
    return {name: CHOICES[c] for name, c in zip(weights, chosen, strict=True)}


# --- Weighting by Fisher information -------------------------------------------------------------------------------


def fisher_weighting(model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, Weighting]:
    """The row and column weights of each layer, from the squared gradients of single examples.

    Args:
        model: maps `input_ids` to logits.
        layers: linear layers in the model, by name.
        batches: each with `input_ids`, `labels` and `attention_mask`.
    """
    weights = {name: weight_of(layer).detach() for name, layer in layers.items()}
    rows = {name: torch.zeros(len(W), device=W.device) for name, W in weights.items()}
    columns = {name: torch.zeros(W.shape[1], device=W.device) for name, W in weights.items()}
    parameters: list[Any] = [layer.weight for layer in layers.values()]
    flags, training = [p.requires_grad for p in parameters], model.training
    model.eval()
    for parameter in parameters:
        parameter.requires_grad_(True)
    for batch in batches:
        for i in range(len(batch.input_ids)):
            one = slice(i, i + 1)
            mask = None if batch.attention_mask is None else batch.attention_mask[one]
            with torch.enable_grad():
                loss = next_token_loss(model(batch.input_ids[one], attention_mask=mask), batch.labels[one])
            for (name, layer), gradient in zip(layers.items(), torch.autograd.grad(loss, parameters), strict=True):
                squared = gradient.square().T if is_conv1d(layer) else gradient.square()  # (out, in)
                rows[name] += squared.mean(dim=1)
                columns[name] += squared.mean(dim=0)
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)
    model.train(training)
    return {name: (_root(rows[name]), _root(columns[name])) for name in layers}


def _root(means: Tensor) -> Tensor:
    """The square roots, relative to the largest and at least `LEAST`; ones if all are zero."""
    root = means.sqrt()
    largest = root.max()
    return (root / largest).clamp(min=LEAST) if largest > 0 else torch.ones_like(root)


# --- The method --------------------------------------------------------------------------------------------

# Attributes of an adapted model beside its `Adaptation`.
_FIT = "lq_lora_fit"
_WAITING = "lq_lora_waiting"  # the full layers, until `before_training` has found the weighting


@dataclass
class Fit:
    """How the base was quantised, which determines Q."""

    allocation: dict[str, Choice]
    weighting: dict[str, Weighting]


@dataclass(frozen=True)
class LQLoRA(QuantizedLoRA):
    """LQ-LoRA on whole linear layers of any model; see the module for the algorithm.

    `adapt` quantises every linear layer except the head; layers without LoRA have no low-rank part. With
    `fisher_batches`, gradients of the first training batches are computed before training, and the split is repeated
    with the weighting; the full weights stay in memory until then.

    An adapter directory contains A and B, the bits and group size of each matrix, and its weighting (out + in numbers).
    Q is not saved: loading computes it again from the same base.

    Args:
        allocation: bits and group size of each matrix, by name; empty: chosen within the budget.
        weighting: row and column weights of each matrix, by name; empty: none, or computed from `fisher_batches`.

    Raises:
        ValueError: a hyperparameter is out of range (raised by the constructor); or, raised by `adapt`, a target is a
            part of a fused layer or is not quantised, the model is already quantised, the budget is too small, or scipy
            is not installed.
    """

    budget: float = hyperparameter(3.0, "average number of bits per quantised weight, including the scales")
    iterations: int = hyperparameter(5, "largest number of iterations of the split")
    fisher_batches: int = hyperparameter(0, "number of batches for the Fisher weighting of errors; 0: no weighting")
    allocation: Mapping[str, Sequence[int]] = field(default_factory=dict, repr=False, compare=False)
    weighting: Mapping[str, Weighting] = field(default_factory=dict, repr=False, compare=False)

    name: ClassVar[str] = "lq-lora"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_LQLORA"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-3, 2e-5, "C4 with LLaMA-2 in HanGuo97/lq-lora; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 23
    use_when: ClassVar[str] = (
        "the weights have to fit in a given number of bytes, so that some matrices get fewer bits than others"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"lq-lora"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.budget, int | float) or not math.isfinite(self.budget) or self.budget <= 0:
            raise ValueError(f"budget must be a positive number of bits, got {self.budget!r}")
        for name, least in (("iterations", 1), ("fisher_batches", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")

    def quantize(self, model: nn.Module) -> dict[str, nn.Module]:
        for name in quantized_layers(model):
            raise ValueError(f"LQ-LoRA needs the full weights, and {name} is quantised already; load the model in full")
        return quantize_linear_layers(
            model, lambda name, W: quantize_normal_float(W)
        )  # provisional; `begin` replaces it

    def _layer(self, model: nn.Module, name: str, parts: tuple[str, ...], generator: torch.Generator) -> LoRALinear:
        if parts:
            raise ValueError(f"LQ-LoRA adapts whole layers, got a part of {name}; give the layer as a target")
        if not isinstance(model.get_submodule(name), LowBitLinear):
            raise ValueError(f"LQ-LoRA adapts quantised layers, and {name} is not quantised; leave it out")
        return super()._layer(model, name, parts, generator)

    def begin(self, model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
        device = weight_of(next(iter(dense.values()))).device
        self._fit(model, dense, {n: (row.to(device), column.to(device)) for n, (row, column) in self.weighting.items()})
        if self.fisher_batches and not self.weighting:
            model.__dict__[_WAITING] = dict(dense)

    def _fit(self, model: nn.Module, dense: Mapping[str, nn.Module], weighting: dict[str, Weighting]) -> None:
        """Choose the bits and compute Q, A and B."""
        loras, weights = lora_layers(model), {name: weight_of(layer) for name, layer in dense.items()}
        ranks = {name: layer.rank for name, layer in loras.items()}
        allocation = {name: (bits, group) for name, (bits, group) in self.allocation.items()}
        allocation = allocation or choose_bits(weights, ranks, self.budget, weighting)
        if allocation.keys() != weights.keys():
            raise ValueError("the bits were allocated to matrices of another model: " + ", ".join(allocation))
        for name, W in weights.items():
            self._fit_layer(loras.get(name), model.get_submodule(name), W, allocation[name], weighting.get(name))
        model.__dict__[_FIT] = Fit(allocation, weighting)

    def _fit_layer(
        self, lora: LoRALinear | None, layer: Any, W: Tensor, choice: Choice, weighting: Weighting | None
    ) -> None:
        def quantize(matrix: Tensor) -> LowBitTensor:
            return replace(quantize_normal_float(matrix, *choice), dtype=W.dtype)

        if lora is None:
            layer.quantized = quantize(W)
        elif W.is_meta:
            lora.base.quantized = quantize(W)  # type: ignore[assignment]
        else:
            lora.base.quantized, A, B = split(W, lora.rank, quantize, self.iterations, weighting)  # type: ignore[assignment]
            root = math.sqrt(lora.scaling)  # the layer multiplies by s
            lora.lora_A.copy_(A / root)
            lora.lora_B.copy_(B / root)

    @torch.no_grad()
    def before_training(self, model: Any, batches: Iterable[Any], steps: int) -> None:
        """With `fisher_batches`: find out what each weight counts, and fit everything anew."""
        inside = unwrapped(model)
        dense = inside.__dict__.pop(_WAITING, None)
        if dense is None:
            return
        in_place = {name: inside.get_submodule(name) for name in dense}
        inject_lora(inside, dense)
        try:
            weighting = fisher_weighting(model, dense, islice(batches, self.fisher_batches))
        finally:
            inject_lora(inside, in_place)
        self._fit(inside, dense, weighting)

    def _uninstall(self, model: nn.Module) -> None:
        super()._uninstall(model)
        model.__dict__.pop(_WAITING, None)
        del model.__dict__[_FIT]

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Our own fields and names, with the bits of every matrix and the weighting."""
        fit: Fit = model.__dict__[_FIT]
        config, tensors = super(LoRA, self).to_adapter(model)
        config["allocation"] = {name: list(choice) for name, choice in fit.allocation.items()}
        for name in ("keep_base", "weighting"):
            del config[name]
        for name, (row, column) in fit.weighting.items():
            tensors |= {f"{name}.fisher_row": row, f"{name}.fisher_column": column}
        return config, tensors

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        method, state = super(LoRA, cls).from_adapter(config, tensors, model)
        rows = [name.removesuffix(".fisher_row") for name in state if name.endswith(".fisher_row")]
        weighting = {name: (state.pop(f"{name}.fisher_row"), state.pop(f"{name}.fisher_column")) for name in rows}
        return replace(method, weighting=weighting), state  # type: ignore[call-arg]

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LoRA:
        names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        every = [f"transformer.h.{block}.{name}" for block in range(config.n_layer) for name in names]
        return cls(
            rank=rng.randint(1, 2),
            alpha=rng.uniform(0.1, 20),
            targets=random_targets(rng, with_parts=False),
            dropout=rng.choice([0.0, 0.1]),
            budget=rng.uniform(7, 9),
            iterations=rng.randint(1, 2),
            fisher_batches=rng.choice([0, 2]),
            allocation={name: rng.choice(CHOICES) for name in every} if rng.random() < 0.8 else {},
            seed=rng.randint(0, 99),
            **cls.random_parts(rng),
        )
