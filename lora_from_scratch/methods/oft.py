"""OFT (Qiu et al. 2023, arXiv:2306.07280): rotate the neurons of a layer instead of adding to its weight.

A neuron of a layer is a row w of its weight W: (out, in). All of them are rotated by the same orthogonal matrix R (eq.
2; the paper writes weights as (in, out), with the neurons as columns):

    w' = R w for each row w,   so   W' = W R^T   and   y = W' x + b = W (R^T x) + b

A rotation changes neither the lengths of the neurons nor the angles between them, and so neither their hyperspherical
energy (section 3.2) nor the singular values of W. R is kept orthogonal by the Cayley transform of a skew-symmetric
matrix, and it is block-diagonal to save parameters (section 3.3):

    R = diag(R_1, ..., R_k),   R_i = (I + Q_i) (I - Q_i)^-1,   Q_i = -Q_i^T        R_i, Q_i: (b, b), k = in / b

Learned are the b (b - 1) / 2 numbers below the diagonal of each Q_i. They start at zero, where R = I and nothing
changes. In training it is cheaper to rotate the inputs back than to rotate the neurons, and W may then be quantised
(OFTv2; Qiu et al. 2025, arXiv:2506.19847, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.lora_peft import targets_in_peft
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS
from lora_from_scratch.methods.wrapped_layers import WrapsLayers, like
from lora_from_scratch.support.linear_layers import dense, in_and_out, is_conv1d, weight_of
from lora_from_scratch.support.tape import FP32, Tape, TensorSize

# --- The arithmetic ------------------------------------------------------------------------------------


def skew_symmetric(entries: Tensor, size: int) -> Tensor:
    """Q = -Q^T from the entries below its diagonal. Gradients flow to them.

    Args:
        entries: (..., b (b - 1) / 2), column by column: Q_10, Q_20, ..., Q_21, ... This is the order of PEFT, which
            writes the same numbers above the diagonal, row by row, and calls that matrix -Q.
        size: b.

    Returns:
        (..., b, b).
    """
    row, column = torch.triu_indices(size, size, offset=1, device=entries.device)
    above = entries.new_zeros(*entries.shape[:-1], size, size)
    above[..., row, column] = entries
    return above.mT - above


def cayley(Q: Tensor) -> Tensor:
    """R = (I + Q) (I - Q)^-1, which is orthogonal if Q is skew-symmetric (Qiu et al. 2023, section 3.3).

    I - Q can always be inverted, since the eigenvalues of Q are imaginary. Because I + Q = 2 I - (I - Q),

        R = 2 (I - Q)^-1 - I

    R is never a reflection, and -1 is never one of its eigenvalues. Gradients flow to Q.

    Args:
        Q: (..., b, b), in float32 or float64.

    Returns:
        (..., b, b).
    """
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return 2 * torch.linalg.inv(identity - Q) - identity


def rotate(x: Tensor, R: Tensor) -> Tensor:
    """diag(R_1, ..., R_k) x, for each of the vectors in x. Gradients flow to both.

    Args:
        x: (..., k b), with any number of leading axes, also none.
        R: (k, b, b), in the dtype of x.

    Returns:
        (..., k b).
    """
    parts = x.unflatten(-1, (len(R), -1))  # (..., k, b)
    return torch.einsum("...kj,kij->...ki", parts, R).flatten(-2)


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 if its type is a shorter one, in which matrices cannot be inverted."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nearest_divisor(number: int, wanted: int, least: int = 1) -> int:
    """The divisor of a number, from `least` on, that is nearest to the wanted one; of two, the smaller."""
    divisors = (candidate for candidate in range(least, number + 1) if number % candidate == 0)
    return min(divisors, key=lambda candidate: (abs(candidate - wanted), candidate))


# --- The layer -----------------------------------------------------------------------------------------


class OFTLinear(nn.Module):
    """A linear layer whose neurons are rotated; the layer itself is kept as `base`, unchanged unless merged.

    Args:
        base: the linear layer.
        block_size: b; where it does not divide the layer's inputs, the nearest number that does, as in PEFT (but not
            1, since a single number cannot be rotated).
        block_share: whether all blocks of the layer are the same.

    Raises:
        ValueError: the layer has a single input.
    """

    def __init__(self, base: nn.Module, block_size: int, block_share: bool = False) -> None:
        super().__init__()
        inputs, _ = in_and_out(base)
        self.base, self.block_share = base, block_share
        if inputs < 2:
            raise ValueError("a layer with a single input cannot be rotated")
        self.block_size = nearest_divisor(inputs, block_size, least=2)
        self.blocks = inputs // self.block_size  # k
        self._unmerged: Tensor | None
        self.register_buffer("_unmerged", None, persistent=False)  # W, while merged
        entries = torch.zeros(1 if block_share else self.blocks, self.block_size * (self.block_size - 1) // 2)
        self.oft_R = like(entries, base)  # of Q; the name is PEFT's
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        return self.base(self.turn(x, back=True))  # W (R^T x) + b

    def turn(self, vectors: Tensor, back: bool = False) -> Tensor:
        """R v for each of the vectors v, (..., in); R^T v with `back`."""
        R = self.rotation().to(vectors.dtype)
        return rotate(vectors, R.mT if back else R)

    def rotation(self) -> Tensor:
        """R, as its blocks (k, b, b), in at least float32."""
        return cayley(skew_symmetric(at_least_float32(self.oft_R), self.block_size)).expand(self.blocks, -1, -1)

    def change_weight(self, W: Tensor) -> Tensor:
        """The weight (out, in) in whose place merging puts W: each row w becomes R w."""
        return self.turn(W)

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @property
    def weight(self) -> Tensor | nn.Module:
        """The base's, for models that look at a layer's dtype before they call it."""
        return self.base.weight

    @torch.no_grad()
    def merge(self) -> None:
        """W' = W R^T, rounded once, to the weight's dtype; keep W."""
        if self._unmerged is not None:
            return
        weight = dense(self.base)
        changed = self.change_weight(at_least_float32(weight_of(self.base)))
        self._unmerged = weight.data
        weight.data = (changed.T if is_conv1d(self.base) else changed).to(weight.dtype).contiguous()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W back, bit for bit."""
        if (W := self._unmerged) is not None:
            dense(self.base).data, self._unmerged = W, None

    def extra_repr(self) -> str:
        share = ", block_share=True" if self.block_share else ""
        return f"block_size={self.block_size}{share}, merged={self.merged}"


@dataclass(frozen=True)
class OFT(WrapsLayers):
    """OFT on whole linear layers of any model; see the module for the equations.

    PEFT has OFT for an `nn.Linear` only, and its default is another one, whose R is a truncated series and not
    orthogonal: PEFT's directories are read if `use_cayley_neumann` is False.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; a layer with a single input, in `adapt`; or as
            for `WrapsLayers`.
    """

    block_size: int = hyperparameter(32, "b, the side of the blocks of R; a layer takes the nearest number that fits")
    block_share: bool = hyperparameter(False, "make all blocks of a layer the same")

    name: ClassVar[str] = "oft"
    peft_type: ClassVar[str] = "OFT"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        1e-2, 4e-4, "BART-large on XSum (OFTv2, table 6); bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 24
    use_when: ClassVar[str] = (
        "the angles between the neurons of each layer should stay what they were; on story cards it learned as well "
        "as LoRA, and forgot more (docs/atlas.md)"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"oft"})
    layer: ClassVar[type[nn.Module]] = OFTLinear

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.block_size, int) or isinstance(self.block_size, bool) or self.block_size < 2:
            raise ValueError(f"block_size must be a whole number of at least 2, got {self.block_size!r}")
        if not isinstance(self.block_share, bool):
            raise ValueError(f"block_share must be True or False, got {self.block_share!r}")

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        layers: dict[str, nn.Module] = {}
        for name, base in bases.items():
            try:
                layers[name] = OFTLinear(base, self.block_size, self.block_share)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return layers

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys."""
        share = {"block_share": True} if self.block_share else {}
        config = self.peft_config(model, oft_block_size=self.block_size, use_cayley_neumann=False, **share)
        return config, {f"{key}.weight": tensor for key, tensor in self.peft_tensors(model).items()}

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[OFT, dict[str, Tensor]]:
        adapter_files.refuse_unknown_fields(config, UNDERSTOOD, HARMLESS)
        adapter_files.refuse_other_values(config, "bias", ("none",))
        if config.get("use_cayley_neumann", True):  # PEFT's default
            raise ValueError(
                f"{adapter_files.CONFIG_FILE} has use_cayley_neumann=True, with which PEFT computes R by a truncated "
                "series, and R is not orthogonal; supported: False"
            )
        names = targets_in_peft(config, model)
        size = _block_size_in_peft(config, {in_and_out(model.get_submodule(name))[0] for name in names})
        keys = {key: key.removeprefix(adapter_files.PREFIX).removesuffix(".weight") for key in tensors}
        method = cls(targets=names, block_size=size, block_share=config.get("block_share", False))
        return method, {keys[key]: tensor for key, tensor in tensors.items()}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> OFT:
        # Without `block_share`, whose adapters fit models of any width.
        return cls(targets=rng.choice(WHOLE_LAYERS), block_size=rng.randint(2, 9))


UNDERSTOOD = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("r", "oft_block_size", "block_share", "use_cayley_neumann", "bias"),
)
# PEFT 0.21 reads `module_dropout` and never applies it; `eps` belongs to `coft`, which is refused if it is on.
HARMLESS = ("fan_in_fan_out", "init_weights", "num_cayley_neumann_terms", "eps", "module_dropout")


def _block_size_in_peft(config: Mapping[str, Any], inputs: set[int]) -> int:
    """b, which PEFT gives as it is or as r, the number of blocks of each layer; `inputs`: of the layers."""
    blocks: int = config.get("r") or 0
    if not blocks:
        return int(config.get("oft_block_size", 32))
    sizes = {number // nearest_divisor(number, blocks) for number in inputs}
    if len(sizes) > 1:
        raise ValueError(
            f"{adapter_files.CONFIG_FILE} has r={blocks}, which makes blocks of {', '.join(map(str, sorted(sizes)))} "
            "in layers of different width; supported: one oft_block_size for all layers"
        )
    return sizes.pop()


# --- What it keeps for the backward pass ---------------------------------------------------------------


@activations.forward.register
def _(module: OFTLinear, x: TensorSize, tape: Tape) -> TensorSize:
    if module.merged:
        return activations.forward(module.base, x, tape)
    x = tape.cast(x, 2) if tape.autocast else x
    entries, b, k = module.oft_R, module.block_size, len(module.oft_R)
    width = max(entries.element_size(), FP32)
    places = TensorSize(2, entries.shape[1], 8)
    Q = tape.add([], TensorSize(k * b, b, width), [places], [entries])
    inverse = TensorSize(k * b, b, width)
    R = tape.add([Q], TensorSize(k * b, b, width), [inverse], scratch=inverse.nbytes)
    if R.width != x.width:
        R = tape.add([R], TensorSize(module.blocks * b, b, x.width))
    back = tape.add([x, R], TensorSize(x.rows, x.columns, x.width), [x, R] if x.grad else [x])
    return activations.forward(module.base, back, tape)
