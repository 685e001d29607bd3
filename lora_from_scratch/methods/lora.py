"""LoRA (Hu et al. 2021, arXiv:2106.09685): learn a change of the weight that has a low rank.

The pretrained weight W stays frozen; beside it two thin matrices are learned (eq. 3):

    y = W x + b + s B A x,      A: (r, in),  B: (out, r),  s = alpha / r

B starts at zero, so at the start nothing changes; A starts random, so that B gets a gradient. Afterwards
s B A can be added to W, and the model costs what it did before. Weights are written `(out, in)` here;
GPT-2's Conv1D stores the transpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2.model import GPT2, Conv1D
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.placement import FUSED_PARTS, compile_pattern, describe_names, find_targets, last_part

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


def block_diagonal_B(B: Tensor, parts: Sequence[str], all_parts: Sequence[str]) -> Tensor:
    """The B of one LoRA on a whole fused matrix that does what n LoRAs on n of its parts do.

    A fused matrix makes several outputs side by side, each `width` wide: GPT-2's `c_attn` makes q, then k, then v. n
    of them are adapted, each by an A (r, in) and a B (width, r) of its own. With their A below each other as one
    (n r, in), h = A x holds n times r numbers, and part i may read its own r of them only:

        for q and v of q, k, v:   B_q   0        rows of q
                                   0    0        rows of k, which is not adapted
                                   0   B_v       rows of v

    This is what loralib's `MergedLinear` computes. Gradients flow to B.

    Args:
        B: (n * width, r): the B of the adapted parts below each other, in the order of the output axis.
        parts: the names of those n parts, in the same order.
        all_parts: the names of all the parts of the fused matrix, in the order of the output axis.

    Returns:
        (len(all_parts) * width, n * r).
    """
    blocks = dict(zip(parts, B.chunk(len(parts)), strict=True))  # each (width, r)
    nothing = B.new_zeros(len(B) // len(parts), 0)  # the rows of a part that is not adapted, and no column
    return torch.block_diag(*(blocks.get(part, nothing) for part in all_parts))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Each element becomes 0 with probability p, the others x / (1 - p); in training only.

    The same as `F.dropout`, but what it keeps for the backward pass is the mask, one byte an element. On a
    CPU `F.dropout` keeps the scaled mask in the type of x: four bytes.
    """
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def add_product(y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + s h B^T in one kernel, without a second and a third tensor of the size of y.

    Args:
        y: (..., out).
        h: (..., r).
        B: (out, r).
    """
    out, rank = B.shape
    return torch.addmm(y.reshape(-1, out), h.reshape(-1, rank), B.T, alpha=scaling).view_as(y)


# --- The layer -----------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A linear layer with a LoRA beside it. The layer itself is kept, unchanged, as `base`.

    - `forward(x)`, (..., in) to (..., out): y = base(x) + s B A x' (Hu et al., eq. 3). x' is x after `dropout`, which
      only the way through A and B sees. While merged, the weight has the change in it: then it is base(x) alone.
    - `merge()` puts W0 + s B A into `base.weight` and keeps W0. The weight of a `Conv1D` is (in, out). The sum
      is formed in float32 and rounded to the weight's dtype. Merging twice is like once.
    - `unmerge()` puts W0 back, bit for bit: subtracting s B A again would not. If nothing is merged it does nothing.

    Both leave `base.weight` the same parameter object and change its `.data`.

    Args:
        base: `nn.Linear` or GPT-2's `Conv1D`.
        rank: r, from 1 to the smaller side of the weight.
        alpha: the strength; the scaling is alpha / r.
        dropout: of the elements of A's input, in training.
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
        self.rank, self.alpha = rank, alpha
        self.dropout_p = dropout
        self.scaling = lora_scaling(rank, alpha, rslora)
        self._unmerged: Tensor | None = None  # W0, while merged
        A, B = self._initial_factors(generator)
        self.lora_A = nn.Parameter(self._like_base(A))  # (r, in)
        self.lora_B = nn.Parameter(self._like_base(B))  # (out, r)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)  # (..., out)
        if self.merged:
            return y
        A, B = self.factors()
        h = F.linear(dropout(x, self.dropout_p, self.training), A)  # (..., r)
        return add_product(y, h, B, self.scaling)  # y + s B A x

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        return self.lora_A, self.lora_B

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """W = W0 + s B A. W0 is kept in `_unmerged`."""
        if self._unmerged is not None:
            return
        weight = self.base.weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ValueError(f"cannot merge into {self.base}: its weight is not made of floating-point numbers")
        A, B = self.factors()
        change = delta_weight(A.float(), B.float(), self.scaling)  # (out, in)
        if isinstance(self.base, Conv1D):
            change = change.T  # (in, out)
        self._unmerged = weight.data
        weight.data = (weight.float() + change).to(weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """W0 again, bit for bit."""
        if self._unmerged is not None:
            self.base.weight.data = self._unmerged
            self._unmerged = None

    def _initial_factors(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return initial_factors(*in_and_out(self.base), self.rank, generator)

    def _like_base(self, values: Tensor) -> Tensor:
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return values.to(weight.device, weight.dtype if weight.is_floating_point() else torch.float32)

    def extra_repr(self) -> str:
        parts = f", parts={'+'.join(self.parts)}" if self.parts else ""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout_p:g}{parts}, merged={self.merged}"


class FusedLoRALinear(LoRALinear):
    """LoRAs on some parts of a fused matrix, such as q and v of GPT-2's `c_attn`, each with its own A and B.

    "r = 4 on q and on v" is not "r = 4 on c_attn", though it has as many parameters: there q, k and v share
    one A. n LoRAs of rank r on n parts are one LoRA of rank n r on the whole matrix, with the A stacked and the
    B on a block diagonal. `lora_A` is (n r, in) and `lora_B` is (n out / 3, r), one part below the
    other, as in loralib's `MergedLinear`.
    """

    def __init__(self, base: nn.Module, parts: Sequence[str], all_parts: Sequence[str], **options: Any) -> None:
        self.all_parts: tuple[str, ...] = tuple(all_parts)
        self.parts = tuple(part for part in all_parts if part in parts)  # in the order of the output axis
        super().__init__(base, **options)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (n r, in), and B (out, n r), which is zero outside its blocks."""
        return self.lora_A, block_diagonal_B(self.lora_B, self.parts, self.all_parts)

    def _initial_factors(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """A (n r, in) and B (n width, r): those of each part, one below the other."""
        in_features, out_features = in_and_out(self.base)
        n, width = len(self.parts), out_features // len(self.all_parts)
        check_rank(self.rank, min(in_features, out_features) // n, f"{n} parts share the smaller side of W")
        pairs = [initial_factors(in_features, width, self.rank, generator) for _ in self.parts]
        return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs])


def in_and_out(layer: nn.Module) -> tuple[int, int]:
    """How many features a linear layer takes and gives."""
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def check_rank(rank: int, largest: int, why: str) -> None:
    """Refuse a rank that does not fit.

    Args:
        why: what sets the limit, for the message: "the smaller side of W".

    Raises:
        ValueError: the rank is not from 1 to `largest`.
    """
    if not 1 <= rank <= largest:
        raise ValueError(f"rank must be between 1 and {largest} ({why}), got {rank}")


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
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


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
        The tensors as they are, outside the graph of gradients, by their full names in the model
        ("transformer.h.0.attn.c_attn.lora_A"), in the model's order.
    """
    named = model.named_parameters()
    return {name: p.detach() for name, p in named if name.rpartition(".")[2] in LORA_PARAMETERS}


@dataclass(frozen=True)
class LoRA(Method):
    """LoRA on a GPT-2; see the module for the equation and `find_targets` for what a target can be.

    `rank_pattern` and `alpha_pattern` give another rank or alpha to the layers whose name ends in a regular
    expression (at a dot); the first that matches counts, as in PEFT: `{"h.0.attn.c_attn": 2}`.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; or one that does not fit the model, in `adapt`.
    """

    rank: int = 8
    alpha: float = 64  # s = 8, as in the paper's GPT-2 runs (r = 4, alpha = 32)
    targets: Sequence[str] | str = ("c_attn", "c_proj", "c_fc")  # every matrix of a block, as Dettmers et al. advise
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0  # of A's first values

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    can_merge: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise ValueError(f"targets must name at least one layer, got {self.targets!r}")
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"{_in_pattern(name, 'rank')} must be a whole number of at least 1, got {rank!r}")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
                raise ValueError(f"{_in_pattern(name, 'alpha')} must be a positive number, got {alpha!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def _install(self, model: GPT2) -> None:
        plan = find_targets(model, self.targets)
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            if not any(_matches(pattern, name) for name in plan):
                raise ValueError(f"the pattern {pattern!r} matches none of the targets; {describe_names(plan)}")
        generator = torch.Generator().manual_seed(self.seed)
        inject_lora(model, {name: self._layer(model, name, parts, generator) for name, parts in plan.items()})

    def _layer(self, model: GPT2, name: str, parts: tuple[str, ...], generator: torch.Generator) -> LoRALinear:
        base = model.get_submodule(name)
        options: dict[str, Any] = {
            "rank": next((r for pattern, r in self.rank_pattern.items() if _matches(pattern, name)), self.rank),
            "alpha": next((a for pattern, a in self.alpha_pattern.items() if _matches(pattern, name)), self.alpha),
            "dropout": self.dropout,
            "rslora": self.rslora,
            "generator": generator,
        }
        try:
            if parts:
                return FusedLoRALinear(base, parts, FUSED_PARTS[last_part(name)], **options)
            return LoRALinear(base, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _uninstall(self, model: GPT2) -> None:
        inject_lora(model, {name: layer.base for name, layer in lora_layers(model).items()})

    def _merge(self, model: GPT2) -> None:
        for layer in lora_layers(model).values():
            layer.merge()

    def _unmerge(self, model: GPT2) -> None:
        for layer in lora_layers(model).values():
            layer.unmerge()

    def to_adapter(self, model: GPT2) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys."""
        self._adaptation(model)
        return peft_format.lora_to_peft(self, lora_layers(model))

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: GPT2
    ) -> tuple[LoRA, dict[str, Tensor]]:
        arguments, layers, state = peft_format.lora_from_peft(config, tensors)
        if layers is not None:
            everywhere = find_targets(model, arguments["targets"])
            arguments["targets"] = [name for name in everywhere if peft_format.layer_index(name) in layers]
        return cls(**arguments), state


def _matches(pattern: str, name: str) -> bool:
    return compile_pattern(rf"(.*\.)?({pattern})").fullmatch(name) is not None


def _in_pattern(name: str, what: str) -> str:
    return what if name == what else f"{what} of the pattern {name!r}"
