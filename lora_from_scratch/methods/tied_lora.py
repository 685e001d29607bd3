"""Tied-LoRA (Renduchintala et al. 2023, arXiv:2311.09578): one A and one B for all blocks, and vectors for each.

Matrices of one kind (all `c_attn`, all `c_fc`, ...) share a trained A and B; each has two trained vectors of its own
(section 3):

    y = W x + b + s v * (B (u * (A x)))        A: (r, in), B: (out, r), u: (r,), v: (out,)

B starts at zero, so at the start nothing changes; A starts as in LoRA, u and v at one. A and B get the sum of the
gradients of all blocks. VeRA is the case in which A and B are random and frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.lora import LoRALinear, initial_factors
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS, check_ranks_and_alphas
from lora_from_scratch.methods.wrapped_layers import WrapsLayers, like, lora_on_computed_factors
from lora_from_scratch.support.linear_layers import in_and_out
from lora_from_scratch.support.tape import Tape, TensorSize


def kind_of(name: str, size: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """The kind of a matrix: the last two parts of its name, and its size (in, out)."""
    return ".".join(name.split(".")[-2:]), size


def tied_lora_parameter_count(sizes: Mapping[str, tuple[int, int]], rank: int) -> int:
    """How many numbers Tied-LoRA trains: an A (r, in) and a B (out, r) for each kind, a u (r,) and a v (out,) for each
    matrix.

    Two matrices are of one kind if the last two parts of their names ("attn.c_proj") agree and their sizes do too.

    Args:
        sizes: (in, out) of each adapted matrix, by its full name in the model: "transformer.h.0.attn.c_proj".
        rank: r, the same for all of them.
    """
    kinds = {kind_of(name, size) for name, size in sizes.items()}
    shared = sum(rank * (inputs + outputs) for _, (inputs, outputs) in kinds)
    return shared + sum(rank + outputs for _, outputs in sizes.values())


class TiedFactors(nn.Module):
    """The A (r, in) and B (out, r) that the matrices of one kind share, in the dtype of the first."""

    def __init__(self, base: nn.Module, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        A, B = initial_factors(*in_and_out(base), rank, generator)
        self.A, self.B = like(A, base), like(B, base)


class TiedLoRALinear(LoRALinear):
    """A LoRA layer whose A and B it shares with others, and which has the vectors u (r,) and v (out,) of its own."""

    tied: TiedFactors

    def __init__(self, base: nn.Module, tied: TiedFactors, alpha: float, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.base = base
        self.__dict__["tied"] = tied  # no part of this layer: the first of its kind registers it
        self.rank, self.alpha, self.dropout_p = len(tied.A), alpha, dropout
        self.scaling = alpha / self.rank
        self.register_buffer("_unmerged", None, persistent=False)
        self.u = like(torch.ones(self.rank), base)
        self.v = like(torch.ones(in_and_out(base)[1]), base)
        self.train(base.training)

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(u) A (r, in) and diag(v) B (out, r)."""
        return self.u[:, None] * self.tied.A, self.v[:, None] * self.tied.B


@dataclass(frozen=True)
class TiedLoRA(WrapsLayers):
    """Tied-LoRA on whole linear layers of any model; see the module for the equation.

    Layers whose names end in the same two parts ("attn.c_proj") and that have the same sizes are of one kind.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; a rank that does not fit a layer, in `adapt`;
            or as for `WrapsLayers`.
    """

    rank: int = hyperparameter(8, "r, the rank of the product of A and B")
    alpha: float = hyperparameter(64, "strength: the change is scaled by alpha / rank")
    dropout: float = hyperparameter(0.0, "share of the inputs that is dropped in training")
    seed: int = 0  # of the first values of A

    name: ClassVar[str] = "tied-lora"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_TIED_LORA"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(
        1e-2, 2e-4, "as LoRA; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 15.1
    use_when: ClassVar[str] = (
        "an adapter has to be smaller than a LoRA of rank 1, and the blocks of the model have the same shapes"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"tied-lora"})
    layer: ClassVar[type[nn.Module]] = TiedLoRALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks_and_alphas(self.rank, {}, self.alpha, {})
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        generator = torch.Generator().manual_seed(self.seed)
        kinds: dict[tuple[str, tuple[int, int]], TiedFactors] = {}
        layers: dict[str, nn.Module] = {}
        for name, base in bases.items():
            kind = kind_of(name, in_and_out(base))
            first = kind not in kinds
            if first:
                kinds[kind] = TiedFactors(base, self.rank, generator)
            layers[name] = layer = TiedLoRALinear(base, kinds[kind], self.alpha, self.dropout)
            if first:
                layer.register_module("shared", kinds[kind])
        return layers

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> TiedLoRA:
        return cls(
            targets=rng.choice(WHOLE_LAYERS),
            rank=rng.randint(1, 2),
            alpha=rng.uniform(0.1, 20),
            dropout=rng.choice([0.0, 0.1]),
            seed=rng.randint(0, 99),
        )


@activations.forward.register
def _(module: TiedLoRALinear, x: TensorSize, tape: Tape) -> TensorSize:
    return lora_on_computed_factors(module, x, tape)
