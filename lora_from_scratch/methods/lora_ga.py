"""LoRA-GA (Wang, Yu and Li 2024, arXiv:2407.05000): begin with singular vectors of the first gradient.

LoRA's A is random, so its first steps change W in random directions. LoRA-GA takes the directions from the gradient
G (out, in) of the loss with respect to W, computed on the first batch (section 3):

    G = U S V^T,    A0 = c V[:, :r]^T,    B0 = c U[:, r:2r],    c = out^(1/4) / sqrt(gamma)
    y = (W - s B0 A0) x + b + s B A x,    A and B begin as A0 and B0

As in PiSSA, the product of the start is subtracted from W, so the model does not change at the start, up to rounding.
Why these vectors: a step of gradient descent with the rate lr changes s B A, to first order in lr, by

    -lr s^2 (B0 B0^T G + G A0^T A0)  =  -lr s^2 c^2 (U_2r S_2r V_2r^T)

which is a step of full fine-tuning whose G is replaced by its best approximation of rank 2 r. Any division of the
first 2 r directions between A and B does that; PEFT calls this one "ArB2r". The scale c keeps the size of the output
independent of the width ("stable"). In PEFT 0.21 only B has this factor, and the singular values too, so its first step
is another one.

The start cannot be computed from the pretrained weights alone, so an adapter directory contains the learned change,
s (B A - B0 A0) = s [B, -B0] [A; A0], which is a LoRA of rank 2 r on W.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.linear_algebra.rank import check_rank
from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.lora import LoRA, LoRALinear, delta_weight, lora_layers
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.pissa import PiSSA, PiSSALinear, as_lora
from lora_from_scratch.methods.placement import random_targets
from lora_from_scratch.methods.weight_gradients import visit_weight_gradients
from lora_from_scratch.support.linear_layers import in_and_out, is_conv1d
from lora_from_scratch.support.wrapped import unwrapped

# --- The start -------------------------------------------------------------------------------------------


def gradient_factors(G: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """A0 and B0, from the singular vectors of a gradient.

    Only the directions of G count, not its size.

    Args:
        G: (out, in), the gradient of the loss with respect to W.
        rank: r, from 1 to half the smaller side of W.
        gamma: the larger, the smaller the start.

    Returns:
        A0 (r, in) and B0 (out, r), in float32: c times the first r right singular vectors, and c times the next r left
        singular vectors.
    """
    U, _, Vh = torch.linalg.svd(G.float(), full_matrices=False)
    c = len(G) ** 0.25 / math.sqrt(gamma)
    return c * Vh[:rank], c * U[:, rank : 2 * rank]


class LoRAGALinear(PiSSALinear):
    """A LoRA layer that begins with given factors, whose product is subtracted from its base's weight.

    Until `begin` is called, it is a LoRA that begins as usual. The weight of the base is `whole` - s B0 A0.

    Raises:
        ValueError: the rank is above half the smaller side of the weight.
    """

    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 16, **options: Any) -> None:
        check_rank(rank, min(in_and_out(base)) // 2, "half the smaller side of W")
        super().__init__(base, rank, alpha, **options)
        self.start_A = nn.Buffer(self.lora_A.detach().clone())  # A0 (r, in)
        self.start_B = nn.Buffer(self.lora_B.detach().clone())  # B0 (out, r); zero until `begin` is called

    def first_factors(self, decomposition: str) -> tuple[Tensor, Tensor]:
        return self.start_A, self.start_B

    @torch.no_grad()
    def begin(self, A: Tensor, B: Tensor) -> None:
        """Start again, from these factors."""
        for mine, given in ((self.start_A, A), (self.start_B, B), (self.lora_A, A), (self.lora_B, B)):
            mine.copy_(given)
        self.subtract_start()

    @torch.no_grad()
    def subtract_start(self) -> None:
        weight = self.base.weight
        assert isinstance(weight, nn.Parameter)
        part = delta_weight(self.start_A.float(), self.start_B.float(), self.scaling)
        weight.data = (self.whole.float() - (part.T if is_conv1d(self.base) else part)).to(weight.dtype)


def begin_with_gradients(model: nn.Module, layers: Mapping[str, LoRAGALinear], batch: Any, gamma: float) -> None:
    """Start these layers with the gradients of the loss on a batch (`visit_weight_gradients`).

    A layer that the batch does not reach begins as a LoRA.

    Args:
        model: maps `input_ids` to logits.
        layers: in the model, not begun.
        batch: with `input_ids`, `labels` and `attention_mask`.
    """
    factors: dict[str, tuple[Tensor, Tensor]] = {}

    def factor(name: str, G: Tensor) -> None:
        factors[name] = gradient_factors(G, layers[name].rank, gamma)

    visit_weight_gradients(model, {name: layer.base for name, layer in layers.items()}, batch, factor)
    for name, (A, B) in factors.items():
        layers[name].begin(A, B)


# --- The method ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoRAGA(PiSSA):
    """LoRA-GA on whole linear layers of any model; see the module for the equations.

    `adapt` makes a LoRA that begins as usual; `before_training` computes the gradients of the first training batch and
    starts it anew. That takes about the memory of one training step on the whole batch, without mixed precision and
    gradient accumulation. Of the gradients only one is kept at a time (the authors' code moves each to the CPU; PEFT
    keeps all of them). An adapter that was loaded has its start already and keeps it when it is trained further.

    An adapter directory is a LoRA of rank 2 r, which PEFT reads. Saved by PEFT, such an adapter is read if it was
    saved with `path_initial_model_for_weight_conversion`; otherwise the start is lost.

    Raises:
        ValueError: as for `PiSSA`; or gamma is not a positive number; or a rank is above half the smaller side of a
            weight, in `adapt`.
    """

    alpha: float = hyperparameter(16, "strength: the change is scaled by alpha / sqrt(rank)")  # as in the paper
    rslora: bool = hyperparameter(True, "multiply by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)")
    decomposition: str = field(default="svd", init=False, repr=False)  # of the gradient
    gamma: float = hyperparameter(64, "A and B begin with the size out^(1/4) / sqrt(gamma)")  # the authors' for rank 8

    name: ClassVar[str] = "lora-ga"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-3, 2e-5, "Outsider565/LoRA-GA, example for LLaMA-2-7B; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 14.5
    use_when: ClassVar[str] = (
        "the first steps should move the weights as full fine-tuning would; on story cards it was not ahead of LoRA, "
        "and forgot more (docs/atlas.md)"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"lora-ga"})
    layer: ClassVar[type[LoRALinear]] = LoRAGALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.gamma, int | float) or not math.isfinite(self.gamma) or self.gamma <= 0:
            raise ValueError(f"gamma must be a positive number, got {self.gamma!r}")

    def before_training(self, model: nn.Module, batches: Iterable[Any], steps: int) -> None:
        """Start every layer with the gradient of the first batch, unless it has begun already."""
        layers = {name: layer for name, layer in lora_ga_layers(unwrapped(model)).items() if not layer.lora_B.any()}
        batch = next(iter(batches), None)
        if layers and batch is not None:
            begin_with_gradients(model, layers, batch, self.gamma)

    # --- What is saved ---

    def _starts(self, model: nn.Module) -> dict[str, Tensor]:
        layers = lora_ga_layers(unwrapped(model))
        return {
            f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in ("start_A", "start_B")
        }

    def learned(self, model: nn.Module) -> Mapping[str, Tensor]:
        return {**self.trainable(model), **self._starts(model)}

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The start and what is left of W: the singular vectors of another computer may have other signs."""
        layers = lora_ga_layers(unwrapped(model))
        rest = {f"{name}.base.weight": layer.base.weight for name, layer in layers.items()}
        return self._starts(model) | rest  # type: ignore[return-value]

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(model, state)
        merged = self._adaptation(model).merged
        self.unmerge(model)
        for layer in lora_ga_layers(unwrapped(model)).values():
            layer.subtract_start()
        if merged:
            self.merge(model)

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's fields and keys for a LoRA of rank 2 r; without a gradient, PEFT ignores `init_lora_weights`."""
        config, tensors = as_lora(self, model)
        return config | {"init_lora_weights": "lora_ga"}, tensors

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Also a LoRA of rank 2 r that PEFT made of its own, whose `init_lora_weights` is True."""
        begins = config.get("init_lora_weights") == "lora_ga" or config.get("lora_ga_config") is not None
        return begins and config.get("peft_type") == cls.peft_type

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[LoRA, dict[str, Tensor]]:
        config = {**config}
        if config.pop("lora_ga_config", None) is not None and config["init_lora_weights"] == "lora_ga":
            raise ValueError(
                f"{CONFIG_FILE} has init_lora_weights='lora_ga' and a lora_ga_config: PEFT saved A and B without their "
                "start, which is subtracted from the weights; save it with path_initial_model_for_weight_conversion"
            )
        method, both = super(PiSSA, cls).from_adapter(config | {"init_lora_weights": True}, tensors, model)
        growth = math.sqrt(2) if method.rslora else 2
        method = replace(
            method,
            rank=method.rank // 2,
            alpha=_shrunk(method.alpha, growth),
            rank_pattern={pattern: rank // 2 for pattern, rank in method.rank_pattern.items()},
            alpha_pattern={pattern: _shrunk(alpha, growth) for pattern, alpha in method.alpha_pattern.items()},
        )
        state = {}
        for name, tensor in both.items():
            place, _, part = name.rpartition(".")
            if part == "lora_A" and len(tensor) % 2:
                raise ValueError(f"the rank of {place} must be even, half of it for the start, got {len(tensor)}")
            if part == "lora_A":
                state[name], state[f"{place}.start_A"] = tensor.tensor_split(2)
            elif part == "lora_B":
                state[name], start = tensor.tensor_split(2, dim=1)
                state[f"{place}.start_B"] = -start
            else:
                state[name] = tensor
        return method, state

    @classmethod
    def contestants(cls) -> dict[str, dict[str, Any]]:
        return {cls.name: {}}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LoRA:
        return cls(
            rank=rng.randint(1, 2),
            alpha=rng.uniform(0.1, 20),
            targets=random_targets(rng, with_parts=False),
            rslora=rng.random() < 0.5,
            gamma=rng.choice([1, 16, 64]),
            seed=rng.randint(0, 99),
            **cls.random_parts(rng),
        )


def lora_ga_layers(model: nn.Module) -> dict[str, LoRAGALinear]:
    """The LoRA-GA layers of a model, by the names of the layers that they wrap."""
    return {name: layer for name, layer in lora_layers(model).items() if isinstance(layer, LoRAGALinear)}


def _shrunk(alpha: float, growth: float) -> float:
    """alpha / growth without the rounding error of growing and shrinking."""
    return float(f"{alpha / growth:.15g}")
