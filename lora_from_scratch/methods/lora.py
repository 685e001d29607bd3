"""LoRA (Hu et al. 2021, arXiv:2106.09685): learn a change of the weight that has a low rank.

The pretrained weight W stays frozen; beside it two thin matrices are learned (eq. 3):

    y = W x + b + s B A x,      A: (r, in),  B: (out, r),  s = alpha / r

B starts at zero, so at the start nothing changes; A starts random, so that B gets a gradient. Afterwards s B A can be
added to W, and the model costs what it did before. In ten lines:

    class LoRA(nn.Module):
        def __init__(self, base, rank=8, alpha=16):
            super().__init__()
            self.base = base.requires_grad_(False)  # W and b
            self.A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
            self.B = nn.Parameter(torch.zeros(base.out_features, rank))
            self.scaling = alpha / rank

        def forward(self, x):
            return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)

The rest of this file is merging, dropout, fused matrices, and putting the layer into a model. Weights are written
(out, in); GPT-2's Conv1D stores the transpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.linear_algebra.rank import check_rank
from lora_from_scratch.methods import placement
from lora_from_scratch.methods.fast_product import add_product, dropout
from lora_from_scratch.methods.lora_peft import lora_from_peft, lora_to_peft
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import block_diagonal_B, by_pattern, check_patterns, find_targets, fused_parts
from lora_from_scratch.methods.trained_parts import TrainsParts
from lora_from_scratch.support.linear_layers import dense, in_and_out, is_conv1d, keep_called, refuse_tied, weight_of
from lora_from_scratch.support.tape import Tape, TensorSize
from lora_from_scratch.support.wrapped import plain_name

LORA_PARAMETERS = ("lora_A", "lora_B")  # the last part of their names

# --- The arithmetic ------------------------------------------------------------------------------------


def lora_scaling(rank: int, alpha: float, rslora: bool = False) -> float:
    """s = alpha / r (Hu et al., section 4.1), or alpha / sqrt(r) (rsLoRA; Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def delta_weight(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The learned change of the weight, s B A (Hu et al., section 4.1). Gradients flow to A and B.

    Args:
        A: (r, in).
        B: (out, r).
        scaling: s, which is alpha / r already.

    Returns:
        (out, in), the shape of the weight of an `nn.Linear`.
    """
    return scaling * (B @ A)


def initial_factors(
    in_features: int, out_features: int, rank: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A and B before the first step: A random, B zero. So B A is zero, and yet B gets a gradient.

    Each entry of A is uniform between -1/sqrt(in) and 1/sqrt(in), as loralib and PEFT have it, who call it
    `kaiming_uniform_` with a = sqrt(5). (Hu et al., section 4.1, say "a random Gaussian", without its width.)

    Args:
        in_features, out_features: of the layer that the two stand beside.
        rank: r, from 1 to the smaller side of the layer's weight.
        generator: where the random numbers come from; None: PyTorch's own.

    Returns:
        A (r, in) and B (out, r), in float32.

    Raises:
        ValueError: the rank does not fit the layer.
    """
    check_rank(rank, min(in_features, out_features), "the smaller side of W")
    A = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)
    return A, torch.zeros(out_features, rank)


# --- The layer -----------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A linear layer with a LoRA beside it. The layer itself is kept, unchanged, as `base`.

    - `forward(x)`, (..., in) to (..., out): y = base(x) + s B A x' (Hu et al., eq. 3). x' is x after `dropout`, which
      only the way through A and B sees. While merged, the weight has the change in it: then it is base(x) alone.
    - `merge()` puts W0 + s B A into `base.weight` and keeps W0. The weight of a `Conv1D` is (in, out). The sum
      is formed in at least float32 and rounded once, to the weight's dtype. What is merged is not merged again.
    - `unmerge()` puts W0 back, bit for bit: subtracting s B A again would not. If nothing is merged it does nothing.

    Both leave `base.weight` the same parameter object and change its `.data`.

    A variant of LoRA overrides one of four methods: `initial_factors` (how A and B start), `factors` (how they come
    about), `middle` (what is between them) and `combine` (what is done with their product, in `change` when merging).

    Args:
        base: `nn.Linear`, or the `Conv1D` of a GPT-2.
        rank: r, from 1 to the smaller side of the weight.
        alpha: the strength; the scaling is alpha / r.
        dropout: the probability that an element of A's input is zeroed in training.
        rslora: scale by alpha / sqrt(r) instead.
        generator: where A's random numbers come from; None: PyTorch's own.

    Raises:
        ValueError: the rank does not fit the layer.
    """

    parts: tuple[str, ...] = ()  # the parts of a fused matrix that are adapted; none: the matrix is one thing

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.rank, self.alpha, self.dropout_p = rank, alpha, dropout
        self.scaling = lora_scaling(rank, alpha, rslora)
        self._unmerged: Tensor | None
        self.register_buffer("_unmerged", None, persistent=False)  # W0, while merged
        A, B = self.initial_factors(generator)
        self.lora_A = nn.Parameter(self._like_base(A))  # (r, in)
        self.lora_B = nn.Parameter(self._like_base(B))  # (out, r)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # (..., out)
        if self.merged:
            return y
        A, B = self.factors()
        h = self.middle(dropout(x, self.dropout_p, self.training), A)  # (..., r)
        return self.combine(y, h, B)  # y + s B A x

    def initial_factors(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) before the first step."""
        return initial_factors(*in_and_out(self.base), self.rank, generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        return self.lora_A, self.lora_B

    def middle(self, x: Tensor, A: Tensor) -> Tensor:
        """A x: (..., in) to (..., r)."""
        return F.linear(x, A)

    def combine(self, y: Tensor, h: Tensor, B: Tensor) -> Tensor:
        """y + s B h, in one kernel; y is the base's output."""
        return add_product(y, h, B, self.scaling)

    def change(self, W: Tensor) -> Tensor:
        """What merging adds to the base's weight W (out, in): s B A, in float32."""
        A, B = self.factors()
        return delta_weight(A.float(), B.float(), self.scaling)

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @property
    def weight(self) -> Tensor | nn.Module:
        """The base's, for models that look at a layer's dtype before they call it (T5)."""
        return self.base.weight

    @torch.no_grad()
    def merge(self) -> None:
        """W = W0 + s B A. W0 is kept in `_unmerged`, which follows the module to another device or dtype."""
        if self._unmerged is not None:
            return
        weight = dense(self.base)
        change = self.change(weight_of(self.base).float())  # (out, in)
        if is_conv1d(self.base):
            change = change.T  # (in, out)
        self._unmerged = weight.data
        weight.data = (weight.float() + change).to(weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """W0 again, bit for bit."""
        if self._unmerged is not None:
            self.base.weight.data = self._unmerged
            self._unmerged = None

    def _like_base(self, values: Tensor) -> Tensor:
        weight: Any = self.base.weight
        return values.to(weight.device, weight.dtype if weight.is_floating_point() else torch.float32)

    def extra_repr(self) -> str:
        parts = f", parts={'+'.join(self.parts)}" if self.parts else ""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout_p:g}{parts}, merged={self.merged}"


class FusedLoRALinear(LoRALinear):
    """LoRAs on some parts of a fused matrix, such as q and v of GPT-2's `c_attn`, each with its own A and B.

    "r = 4 on q and on v" is not "r = 4 on c_attn", though it has as many parameters: there q, k and v share one A. n
    LoRAs of rank r on n parts are one LoRA of rank n r on the whole matrix, with the A stacked and the B on a block
    diagonal. `lora_A` is (n r, in), `lora_B` (n out / 3, r), one part below the other, as loralib's `MergedLinear`.
    """

    def __init__(self, base: nn.Module, parts: Sequence[str], all_parts: Sequence[str], **options: Any) -> None:
        self.all_parts: tuple[str, ...] = tuple(all_parts)
        self.parts = tuple(part for part in all_parts if part in parts)  # in the order of the output axis
        super().__init__(base, **options)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (n r, in), and B (out, n r), which is zero outside its blocks."""
        return self.lora_A, block_diagonal_B(self.lora_B, self.parts, self.all_parts)

    def initial_factors(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A (n r, in) and B (n width, r): those of each part, one below the other."""
        in_features, out_features = in_and_out(self.base)
        n, width = len(self.parts), out_features // len(self.all_parts)
        check_rank(self.rank, min(in_features, out_features) // n, f"{n} parts share the smaller side of W")
        pairs = [initial_factors(in_features, width, self.rank, generator) for _ in self.parts]
        return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs])


# --- A whole model -------------------------------------------------------------------------------------


def inject_lora(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put these layers into the model, each in the place of the layer that has its name. The model is changed in place.

    Whatever held the old layer holds the new one afterwards, so that the model's own `forward` calls it. All other
    modules stay the objects that they are.

    Args:
        model: any module.
        layers: by the full name of the place, as `model.named_modules()` has it: "transformer.h.0.attn.c_attn", or
            "head" for a layer of the model itself. A layer may hold the one that it takes the place of.
    """
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRA layers of a model, by the names of the layers that they wrap."""
    return {plain_name(name): layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Train every A and B, and nothing else: `requires_grad` is True on them and False on all other parameters.

    Args:
        model: any module with LoRA layers in it, whatever `requires_grad` its parameters have before. Their parameters
            are recognised by their names, whose last part is "lora_A" or "lora_B" and nothing else.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] in LORA_PARAMETERS)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What has to be saved: every A and B of the model, and nothing else, whether it is trained at the moment or not.

    Returns:
        The tensors by their full names in the model ("transformer.h.0.attn.c_attn.lora_A"), in the model's order.
        Each is outside the graph of gradients and has the dtype that it has in the model.
    """
    return {name: p.detach() for name, p in model.named_parameters() if name.rpartition(".")[2] in LORA_PARAMETERS}


@dataclass(frozen=True)
class LoRA(TrainsParts):
    """LoRA on any model; see the module for the equation and `find_targets` for what a target can be.

    `rank_pattern` and `alpha_pattern` give another rank or alpha to the layers whose name ends in a regular
    expression (at a dot); the first that matches counts, as in PEFT: `{"h.0.attn.c_attn": 2}`.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; or one that does not fit the model, in `adapt`.
    """

    rank: int = hyperparameter(8, "rank r of the update B A")
    alpha: float = hyperparameter(64, "the update is multiplied by alpha / rank")  # s = 8, as the paper's GPT-2
    targets: Sequence[str] | str = hyperparameter(  # every matrix of a block, as Dettmers et al. 2023 advise
        "all-linear",
        "the layers to adapt: all-linear, their names (c_attn, mlp.c_proj), parts of them (c_attn.q), or one regular "
        "expression",
    )
    dropout: float = hyperparameter(0.0, "dropout probability of the input of A during training")
    rslora: bool = hyperparameter(False, "multiply by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)")
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0  # of A's first values

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    learning_rates: ClassVar[LearningRates] = LearningRates(3e-3, 2e-4, "GPT-2 medium on E2E in microsoft/LoRA")
    position: ClassVar[float] = 10
    use_when: ClassVar[str] = (
        "you have no reason for another method: merged it costs nothing, unmerged many adapters share one model, "
        "and every library reads it"
    )
    can_merge: ClassVar[bool] = True
    layer: ClassVar[type[LoRALinear]] = LoRALinear  # of a whole matrix; a variant has its own

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise ValueError(f"targets must name at least one layer, got {self.targets!r}")
        placement.check_ranks_and_alphas(self.rank, self.rank_pattern, self.alpha, self.alpha_pattern)
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def _install(self, model: nn.Module) -> None:
        plan, parts = find_targets(model, self.targets), self.parts_to_train(model)
        check_patterns([*self.rank_pattern, *self.alpha_pattern], plan)
        generator = torch.Generator().manual_seed(self.seed)
        layers = {name: self._layer(model, name, parts, generator) for name, parts in plan.items()}
        inject_lora(model, layers)
        keep_called(model, layers)
        self.train_parts(model, layers, parts)

    def _layer(self, model: nn.Module, name: str, parts: tuple[str, ...], generator: torch.Generator) -> LoRALinear:
        base = model.get_submodule(name)
        options: dict[str, Any] = {"dropout": self.dropout, "rslora": self.rslora, "generator": generator}
        rank, alpha = by_pattern(self.rank_pattern, name, self.rank), by_pattern(self.alpha_pattern, name, self.alpha)
        try:
            if parts:
                return FusedLoRALinear(base, parts, fused_parts(model, name), rank=rank, alpha=alpha, **options)
            return self.layer(base, rank, alpha, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _uninstall(self, model: nn.Module) -> None:
        inject_lora(model, {name: layer.base for name, layer in lora_layers(model).items()})
        super()._uninstall(model)

    def _merge(self, model: nn.Module) -> None:
        layers = lora_layers(model)
        refuse_tied(model, layers)
        super()._merge(model)
        for layer in layers.values():
            layer.merge()

    def _unmerge(self, model: nn.Module) -> None:
        super()._unmerge(model)
        for layer in lora_layers(model).values():
            layer.unmerge()

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys."""
        self._adaptation(model)
        return lora_to_peft(self, model, lora_layers(model))

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[LoRA, dict[str, Tensor]]:
        arguments, state = lora_from_peft(config, tensors, model)
        return cls(**arguments), state

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LoRA:
        return cls(
            rank=rng.randint(1, 2),
            alpha=rng.uniform(0.1, 20),
            targets=placement.random_targets(rng, with_parts=cls.layer is LoRALinear),
            dropout=rng.choice([0.0, 0.1]),
            rslora=rng.random() < 0.5,
            seed=rng.randint(0, 99),
            **cls.random_parts(rng),
        )

    def starts_as_base(self) -> bool | None:
        return True


# --- What it keeps for the backward pass ---------------------------------------------------------------


@activations.forward.register
def _(module: LoRALinear, x: TensorSize, tape: Tape) -> TensorSize:
    y = activations.forward(module.base, x, tape)
    if module.merged:
        return y
    A, B = module.lora_A, module.lora_B
    h = tape.linear(tape.dropout(x, module.dropout_p, noise_width=1), A, len(A))  # (rows, r)
    saved = [h] if B.requires_grad else []
    if isinstance(module, FusedLoRALinear):
        saved.append(TensorSize(y.columns, h.columns, h.width))  # B on a block diagonal
    elif h.width != B.element_size():
        saved.append(TensorSize(1, B.numel(), h.width))  # the copy of B
    return tape.add([y, h], TensorSize(y.rows, y.columns, y.width), saved, [B])
