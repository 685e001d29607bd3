"""NOLA (Koohpayegani et al. 2023, arXiv:2310.02556): factors that are sums of random matrices.

    A = A0 + sum over i of a_i U_i        A0, U_i: (r, in)
    B =      sum over j of b_j V_j        V_j: (out, r)
    y = W x + b + s B A x                 i, j = 1 ... k

The U, the V and A0 are random, drawn from a seed and never stored; the 2 k coefficients of a layer are all that is
trained and saved, whatever its size and rank (section 3). All coefficients start at zero: B is zero, so nothing
changes, and b gets a gradient through A0. (A0 stands in the authors' code; with A = 0 as well, no coefficient would
ever move.)

The random matrices are drawn again in every forward and backward pass, from generators of their own: PyTorch's global
random numbers are left alone, and on every device the numbers are the CPU's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.lora import LoRALinear, initial_factors
from lora_from_scratch.methods.method import LearningRates, Method, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS, check_ranks_and_alphas
from lora_from_scratch.methods.wrapped_layers import WrapsLayers, like, lora_on_computed_factors
from lora_from_scratch.support.linear_layers import in_and_out, is_linear
from lora_from_scratch.support.tape import Tape, TensorSize

CHUNK = 2**21  # random numbers that are in memory at a time


def random_combination(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    """The sum of k random matrices, each multiplied by its coefficient: sum over i of c_i U_i (NOLA, section 3).

    Every entry of a U is uniform between -1/sqrt(k) and 1/sqrt(k): `U_i = (2 R_i - 1) / sqrt(k)`, where R stands for
    the numbers of `torch.rand(k, *shape)`, drawn in this order from `torch.Generator().manual_seed(seed)`. So the seed
    stands for the matrices, and the same seed gives the same result in every call.

    PyTorch's global generator is neither read nor changed.

    Args:
        coefficients: c, (k,), in float32 or float64.
        shape: of the result and of each U_i.
        seed: of the random matrices.

    Returns:
        A tensor of this shape, in the dtype of the coefficients.
    """
    k, numbers = len(coefficients), math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    total = coefficients.new_zeros(numbers)
    for part in coefficients.split(counts_at_a_time(k, numbers)):
        U = draw_matrices(len(part), numbers, k, generator)  # (count, numbers)
        total += part @ U.to(total)
    return total.view(shape)


def coefficient_gradient(gradient: Tensor, k: int, seed: int) -> Tensor:
    """The gradient by the coefficients of `random_combination`, from the gradient G by its result.

    Entry i says how the loss changes with c_i. The result changes by U_i when c_i changes by 1, so entry i is the sum
    of the entries of G * U_i.

    No U_i was kept: they are drawn again, the same as in `random_combination(c, G.shape, seed)` with k coefficients.

    PyTorch's global generator is neither read nor changed.

    Args:
        gradient: G, a matrix, which need not be contiguous, in float32 or float64.
        k: the number of random matrices.
        seed: of the random matrices.

    Returns:
        (k,), in the dtype of G.
    """
    flat = gradient.reshape(-1)
    generator = torch.Generator().manual_seed(seed)
    counts = counts_at_a_time(k, len(flat))
    return torch.cat([draw_matrices(count, len(flat), k, generator).to(flat) @ flat for count in counts])


def draw_matrices(count: int, numbers: int, k: int, generator: torch.Generator) -> Tensor:
    """The next `count` of k random matrices, as rows (count, numbers): uniform between -1/sqrt(k) and 1/sqrt(k)."""
    return torch.rand(count, numbers, generator=generator).mul_(2).sub_(1).mul_(k**-0.5)


def counts_at_a_time(k: int, numbers: int) -> list[int]:
    """How many of k matrices with so many numbers are drawn at a time, so that they need little memory."""
    most = max(1, CHUNK // numbers)
    return [min(most, k - first) for first in range(0, k, most)]


class RandomCombination(torch.autograd.Function):
    """`random_combination` with its gradient. What is kept for the backward pass is the seed."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        ctx.seed, ctx.k = seed, len(coefficients)
        return random_combination(coefficients, shape, seed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return coefficient_gradient(gradient, ctx.k, ctx.seed), None, None


class NOLALinear(LoRALinear):
    """A LoRA layer that learns the coefficients `nola_a` and `nola_b`, (k,) each.

    Args:
        base: the linear layer.
        rank, alpha, dropout: as for LoRA.
        basis: k.
        seed: of A0, the U and the V.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, basis: int, seed: int, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.base, self.rank, self.alpha, self.dropout_p, self.seed = base, rank, alpha, dropout, seed
        self.scaling = alpha / rank
        self.register_buffer("_unmerged", None, persistent=False)
        A0, _ = initial_factors(*in_and_out(base), rank, torch.Generator().manual_seed(seed))
        self.A0: Tensor
        self.register_buffer("A0", like(A0, base).detach(), persistent=False)
        self.nola_a, self.nola_b = like(torch.zeros(basis), base), like(torch.zeros(basis), base)
        self.train(base.training)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), from coefficients and seed."""
        inputs, outputs = in_and_out(self.base)
        A = self.A0 + RandomCombination.apply(self.nola_a, (self.rank, inputs), self.seed + 1)
        return A, RandomCombination.apply(self.nola_b, (outputs, self.rank), self.seed + 2)


@dataclass(frozen=True)
class NOLA(WrapsLayers):
    """NOLA on whole linear layers of any model; see the module for the equations.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; a rank that does not fit a layer, in `adapt`;
            or as for `WrapsLayers`.
    """

    rank: int = hyperparameter(8, "r, the rank of the product of A and B")
    alpha: float = hyperparameter(64, "strength: the change is scaled by alpha / rank")
    basis: int = hyperparameter(64, "k, how many random matrices make up A, and as many B")
    dropout: float = hyperparameter(0.0, "share of the inputs that is dropped in training")
    projection_seed: int = hyperparameter(0, "seed of the frozen random matrices")

    name: ClassVar[str] = "nola"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_NOLA"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-2, 1e-2, "GPT-2 large on E2E in UCDvision/NOLA; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 15.2
    use_when: ClassVar[str] = (
        "an adapter may have a few hundred numbers in total, whatever the size of the layers; each step also "
        "draws the random matrices again"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"nola"})
    layer: ClassVar[type[nn.Module]] = NOLALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks_and_alphas(self.rank, {}, self.alpha, {})
        if not isinstance(self.basis, int) or isinstance(self.basis, bool) or self.basis < 1:
            raise ValueError(f"basis must be a whole number of at least 1, got {self.basis!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        seeds = {name: 3 * (1_000_003 * self.projection_seed + place) for place, name in enumerate(bases)}
        return {
            name: NOLALinear(base, self.rank, self.alpha, self.basis, seeds[name], self.dropout)
            for name, base in bases.items()
        }

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The coefficients. They fit layers of any size, so the sizes that they were trained for are noted."""
        config, tensors = super().to_adapter(model)
        sizes = {name: list(in_and_out(layer.base)) for name, layer in self.layers(model).items()}
        return config | {"layer_sizes": sizes}, tensors

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[Method, dict[str, Tensor]]:
        modules = dict(model.named_modules())
        for name, size in (config.get("layer_sizes") or {}).items():
            if name not in modules or not is_linear(modules[name]) or list(in_and_out(modules[name])) != size:
                raise ValueError(f"the adapter is for {name} with (in, out) = {size}; was it made for another model?")
        return super().from_adapter({k: v for k, v in config.items() if k != "layer_sizes"}, tensors, model)

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> NOLA:
        return cls(
            targets=rng.choice(WHOLE_LAYERS),
            rank=rng.randint(1, 2),
            alpha=rng.uniform(0.1, 20),
            basis=rng.randint(1, 20),
            dropout=rng.choice([0.0, 0.1]),
            projection_seed=rng.randint(0, 99),
        )


@activations.forward.register
def _(module: NOLALinear, x: TensorSize, tape: Tape) -> TensorSize:
    if not module.merged:
        for numbers in (module.rank * in_and_out(module.base)[0], module.rank * in_and_out(module.base)[1]):
            rows = counts_at_a_time(len(module.nola_a), numbers)[0]
            tape.add([], TensorSize(1, 1), [], [module.nola_a], scratch=4 * rows * numbers)
    return lora_on_computed_factors(module, x, tape)
