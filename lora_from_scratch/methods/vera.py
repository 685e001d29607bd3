"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): frozen random matrices, and a learned vector on each side.

All layers share one pair of random matrices A and B, which are never trained; a layer learns two vectors (eq. 2):

    y = W x + b + lambda_b * (B (lambda_d * (A x)))
    A: (r, in), B: (out, r), lambda_d: (r,), lambda_b: (out,)

lambda_b starts at zero, so at the start nothing changes; lambda_d starts at 0.1. A layer learns r + out numbers, so r
can be large (256). Layers of different sizes use the first columns of A and the first rows of B: both are as large as
the largest layer needs. They are drawn from a seed, and need not be kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.lora_peft import targets_in_peft
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS
from lora_from_scratch.methods.wrapped_layers import WrapsLayers
from lora_from_scratch.support.linear_layers import in_and_out
from lora_from_scratch.support.tape import Tape, TensorSize

INITIAL_D = 0.1
PEFT_A, PEFT_B = "base_model.vera_A", "base_model.vera_B"


def draw_projections(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    """The random matrices that all layers share, from a seed: the same as PEFT's.

    Each entry is uniform between -sqrt(6 / fan_in) and sqrt(6 / fan_in), with fan_in = in for A and r for B (He et al.
    2015, arXiv:1502.01852; VeRA, section 3.3).

    The numbers come from `torch.Generator().manual_seed(seed)`, row by row, first all of A and then all of B. PyTorch's
    global generator is neither read nor changed.

    Args:
        rank: r.
        in_features, out_features: the most inputs and the most outputs of a layer.
        seed: the same seed gives the same matrices in every call.

    Returns:
        A (r, in) and B (out, r), in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, in_features), (out_features, rank))
    A, B = (
        torch.empty(shape).uniform_(-math.sqrt(6 / shape[1]), math.sqrt(6 / shape[1]), generator=generator)
        for shape in shapes
    )
    return A, B


def vera_delta_weight(A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor, in_features: int) -> Tensor:
    """The learned change of one layer's weight, diag(lambda_b) B diag(lambda_d) A (VeRA, eq. 2).

    A and B are shared by all layers and as large as the largest one needs. A layer with fewer inputs uses the first
    columns of A, and one with fewer outputs the first rows of B.

    Args:
        A: (r, most inputs).
        B: (most outputs, r).
        lambda_d: (r,), this layer's.
        lambda_b: (out,), this layer's, one number for each of its outputs.
        in_features: in, the number of this layer's inputs.

    Returns:
        (out, in). Gradients flow to lambda_d and lambda_b.
    """
    A, B = A[:, :in_features], B[: len(lambda_b)]
    return lambda_b[:, None] * (B * lambda_d) @ A


class Projections(nn.Module):
    """The A and B that all layers share. One module, so that moving the model moves them once."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.A: Tensor
        self.B: Tensor
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)


class VeRALinear(LoRALinear):
    """A LoRA layer whose factors are shared and frozen, and which learns lambda_d (r,) and lambda_b (out,)."""

    def __init__(self, base: nn.Module, shared: Projections, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.base, self.shared = base, shared
        self.rank, self.alpha, self.scaling, self.dropout_p = len(shared.A), 1, 1.0, dropout
        self.register_buffer("_unmerged", None, persistent=False)
        self.vera_lambda_d = nn.Parameter(self._like_base(torch.full((self.rank,), INITIAL_D)))
        self.vera_lambda_b = nn.Parameter(self._like_base(torch.zeros(in_and_out(base)[1])))
        self.train(base.training)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r): this layer's part of the shared matrices."""
        inputs, outputs = in_and_out(self.base)
        return self.shared.A[:, :inputs], self.shared.B[:outputs]

    def middle(self, x: Tensor, A: Tensor) -> Tensor:
        """lambda_d * (A x)."""
        return self.vera_lambda_d * F.linear(x, A.to(x.dtype))

    def combine(self, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """y + lambda_b * (B h)."""
        return torch.addcmul(y, F.linear(h, B.to(h.dtype)), self.vera_lambda_b.to(y.dtype))

    def change(self, W: Tensor) -> Tensor:
        """diag(lambda_b) B diag(lambda_d) A."""
        A, B, d, b = (t.float() for t in (self.shared.A, self.shared.B, self.vera_lambda_d, self.vera_lambda_b))
        return vera_delta_weight(A, B, d, b, in_and_out(self.base)[0])


@dataclass(frozen=True)
class VeRA(WrapsLayers):
    """VeRA on whole linear layers of any model; see the module for the equation.

    The random matrices are drawn from `projection_seed` and are in the adapter directory only if `save_projection`
    says so. PyTorch does not promise the same random numbers for ever: what is kept for years is better saved with
    them.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; or as for `WrapsLayers`.
    """

    rank: int = hyperparameter(256, "r, the rank of the product of A and B")
    dropout: float = hyperparameter(0.0, "share of the inputs that is dropped in training")
    projection_seed: int = hyperparameter(0, "seed of the frozen random matrices")
    save_projection: bool = hyperparameter(False, "save the frozen random matrices with the adapter")
    projections: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)  # instead of the seed's

    name: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        1e-1, 2e-2, "GPT-2 medium on E2E (VeRA, table 9); bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 15
    use_when: ClassVar[str] = (
        "thousands of adapters have to be stored, a few kilobytes each, and time while training matters less "
        "than bytes; merge it before use, because its rank is high"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"vera"})
    layer: ClassVar[type[nn.Module]] = VeRALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        sizes = [in_and_out(base) for base in bases.values()]
        largest = max(inputs for inputs, _ in sizes), max(outputs for _, outputs in sizes)
        A, B = self.projections or draw_projections(self.rank, *largest, self.projection_seed)
        weight: Any = next(iter(bases.values())).weight
        shared = Projections(A.to(weight.device), B.to(weight.device))
        return {name: VeRALinear(base, shared, self.dropout) for name, base in bases.items()}

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys."""
        optional = {"projection_prng_key": self.projection_seed, "vera_dropout": self.dropout}
        config = self.peft_config(model, r=self.rank, **{name: value for name, value in optional.items() if value})
        tensors = self.peft_tensors(model)
        if self.save_projection or self.projections is not None:
            shared = next(iter(self.layers(model).values())).shared
            return config, {PEFT_A: shared.A, PEFT_B: shared.B, **tensors}
        return config | {"save_projection": False}, tensors

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[VeRA, dict[str, Tensor]]:
        understood: tuple[str, ...] = (
            "r",
            "target_modules",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "vera_dropout",
        )
        understood += ("projection_prng_key", "save_projection", "d_initial", "fan_in_fan_out", "init_weights", "bias")
        adapter_files.refuse_unknown_fields(config, understood)
        adapter_files.refuse_other_values(config, "bias", ("none",))
        saved = PEFT_A in tensors and PEFT_B in tensors
        method = cls(
            targets=targets_in_peft(config, model),
            rank=config.get("r", 256),
            dropout=config.get("vera_dropout", 0.0),
            projection_seed=config.get("projection_prng_key") or 0,
            save_projection=saved,
            # Cloned, because a product with a tensor that is aligned differently may round its last bit differently.
            projections=(tensors[PEFT_A].clone(), tensors[PEFT_B].clone()) if saved else None,
        )
        state = {key.removeprefix(adapter_files.PREFIX): t for key, t in tensors.items() if key not in (PEFT_A, PEFT_B)}
        return method, state

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> VeRA:
        return cls(
            targets=rng.choice(WHOLE_LAYERS),
            rank=rng.randint(1, 5),
            dropout=rng.choice([0.0, 0.1]),
            projection_seed=rng.randint(0, 99),
            save_projection=rng.random() < 0.5,
        )


@activations.forward.register
def _(module: VeRALinear, x: TensorSize, tape: Tape) -> TensorSize:
    y = activations.forward(module.base, x, tape)
    if module.merged:
        return y
    A, B = module.factors()
    h = tape.linear(tape.dropout(x, module.dropout_p, noise_width=1), A, len(A))  # (rows, r)
    scaled = tape.add([h], TensorSize(h.rows, h.columns, h.width), [h], [module.vera_lambda_d])
    u = tape.linear(scaled, B, len(B))  # (rows, out)
    return tape.add([y, u], TensorSize(y.rows, y.columns, y.width), [u], [module.vera_lambda_b])
