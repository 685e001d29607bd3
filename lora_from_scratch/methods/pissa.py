"""PiSSA (Meng et al. 2024, arXiv:2404.02948): train the largest singular directions of the weight itself.

LoRA learns a change beside a frozen W. PiSSA splits W and trains its principal part (section 3):

    W = U S V^T,    B = U_r sqrt(S_r / s),    A = sqrt(S_r / s) V_r^T,    W_res = W - s B A
    y = W_res x + b + s B A x

W_res is frozen in the place of W; at the start the sum is W again, up to rounding. OLoRA (Büyükakyüz 2024,
arXiv:2406.01775) does the same with the first r columns of Q and rows of R of the decomposition W = Q R: one function
here, `initial_qr`. The learned change of the weight is s (B A - B0 A0), which has rank up to 2 r: `as_lora`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.adapter_files import CONFIG_FILE, PREFIX
from lora_from_scratch.methods.lora import LoRA, LoRALinear, lora_layers
from lora_from_scratch.methods.lora_peft import lora_to_peft
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import random_targets
from lora_from_scratch.support.linear_layers import is_conv1d, refuse_tied, weight_of

PEFT_NAMES = {"svd": "pissa", "qr": "olora"}  # of the decompositions, in `init_lora_weights`
OWN_TYPE = "LORA_FROM_SCRATCH_OLORA"


def initial_svd(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B before the first step: s B A is the best approximation of W of rank r (Meng et al. 2024, eq. 2 and 3).

    With the singular value decomposition W = U S V^T, A = sqrt(S_r / s) V_r^T and B = U_r sqrt(S_r / s): the r largest
    singular values, divided by s, are shared equally between A and B. It is computed in float32.

    Args:
        W: (out, in).
        rank: r, from 1 to the smaller side of W.
        scaling: s, by which B A is multiplied.

    Returns:
        A (r, in) and B (out, r), in float32. Row k of A and column k of B belong to the k-th largest singular value.
    """
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def initial_qr(W: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r): the first rows of R and columns of Q of W = Q R (OLoRA, algorithm 1)."""
    Q, R = torch.linalg.qr(W.float())
    return R[:rank], Q[:, :rank]


DECOMPOSITIONS = {"svd": initial_svd, "qr": initial_qr}


class PiSSALinear(LoRALinear):
    """A LoRA layer that trains a part of its base's weight.

    - `split(decomposition)` takes the part out of the base, whose weight is W_res from then on, and puts it into A and
      B. W is kept in `whole`, which follows the module to another device or dtype.
    - `join()` puts W back into the base, bit for bit; not while merged, when the base has the learned weight.
    """

    whole: Tensor

    @torch.no_grad()
    def split(self, decomposition: str) -> None:
        weight = self.base.weight
        assert isinstance(weight, nn.Parameter)
        self.register_buffer("whole", weight.data, persistent=False)
        A, B = self.first_factors(decomposition)
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        part = self.change(weight_of(self.base).float())  # of what A and B hold after rounding
        weight.data = (weight.float() - (part.T if is_conv1d(self.base) else part)).to(weight.dtype)

    def join(self) -> None:
        if not self.merged:
            self.base.weight.data = self.whole

    def first_factors(self, decomposition: str) -> tuple[Tensor, Tensor]:
        """A0 and B0, with which the layer begins."""
        W = self.whole.T if is_conv1d(self.base) else self.whole
        return DECOMPOSITIONS[decomposition](W, self.rank, self.scaling)


@dataclass(frozen=True)
class PiSSA(LoRA):
    """PiSSA, or OLoRA, on whole linear layers of any model; see the module for the equations.

    An adapter directory is a LoRA's, and its `init_lora_weights` tells PEFT to split the weight in the same way. For
    OLoRA on a Conv1D, PEFT 0.21 does so wrongly (A and B change places), so the directory has a `peft_type` of ours;
    `as_lora` gives the learned change as a plain LoRA, which loads anywhere.

    Raises:
        ValueError: as for `LoRA`; or there is dropout, which would drop parts of W itself; or a target is a part of a
            fused layer; or there is no such decomposition.
    """

    alpha: float = hyperparameter(8, "strength: the change is scaled by alpha / rank")  # alpha = r, as in the paper
    decomposition: str = hyperparameter("svd", "begin with the first directions of an SVD (PiSSA) or of a QR (OLoRA)")

    name: ClassVar[str] = "pissa"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        1e-2, 2e-5, "GraphPKU/PiSSA, scripts for LLaMA-2-7B; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 14
    use_when: ClassVar[str] = (
        "the rest of the weight will be quantised, since its largest directions are then trained at full "
        "precision; unquantised, it was not ahead of LoRA at tuned rates here (unit 15)"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"pissa", "olora"})
    layer: ClassVar[type[LoRALinear]] = PiSSALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decomposition not in DECOMPOSITIONS:
            raise ValueError(f"decomposition must be one of {', '.join(DECOMPOSITIONS)}, got {self.decomposition!r}")
        if self.dropout:
            raise ValueError(f"dropout must be 0, because B A is a part of the weight itself, got {self.dropout!r}")

    def _layer(self, model: nn.Module, name: str, parts: tuple[str, ...], generator: torch.Generator) -> LoRALinear:
        if parts:
            raise ValueError(f"PiSSA adapts whole layers, got a part of {name}; give the layer as a target")
        weight = model.get_submodule(name).weight
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            raise ValueError(f"{name}: its weight is not made of floating-point numbers and cannot be split")
        return super()._layer(model, name, parts, generator)

    def _install(self, model: nn.Module) -> None:
        super()._install(model)
        try:
            refuse_tied(model, lora_layers(model))
        except ValueError:
            super()._uninstall(model)
            raise
        for layer in pissa_layers(model).values():
            layer.split(self.decomposition)

    def _uninstall(self, model: nn.Module) -> None:
        for layer in pissa_layers(model).values():
            layer.join()
        super()._uninstall(model)

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys."""
        config, tensors = super().to_adapter(model)
        if self.decomposition == "qr" and any(is_conv1d(layer.base) for layer in pissa_layers(model).values()):
            config["peft_type"] = OWN_TYPE
        return config | {"init_lora_weights": PEFT_NAMES[self.decomposition]}, tensors

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        begins = config.get("init_lora_weights") in PEFT_NAMES.values()
        return begins and config.get("peft_type") in (cls.peft_type, OWN_TYPE)

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[LoRA, dict[str, Tensor]]:
        begin = config["init_lora_weights"]
        method, state = super().from_adapter({**config, "init_lora_weights": True}, tensors, model)
        decomposition = next(ours for ours, theirs in PEFT_NAMES.items() if theirs == begin)
        method = replace(method, decomposition=decomposition)  # type: ignore[call-arg]
        names = [name.removesuffix(".lora_A") for name in state if name.endswith(".lora_A")]
        if (
            begin == "olora"
            and config["peft_type"] != OWN_TYPE
            and any(is_conv1d(model.get_submodule(n)) for n in names)
        ):
            raise ValueError(
                f"{CONFIG_FILE} has init_lora_weights='olora' for a model with Conv1D layers, where PEFT subtracts the "
                "transpose of B A; such an adapter is not supported"
            )
        return method, state

    @classmethod
    def contestants(cls) -> dict[str, dict[str, Any]]:
        return {PEFT_NAMES[decomposition]: {"decomposition": decomposition} for decomposition in DECOMPOSITIONS}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LoRA:
        return cls(
            rank=rng.randint(1, 2),
            alpha=rng.uniform(0.1, 20),
            targets=random_targets(rng, with_parts=False),
            rslora=rng.random() < 0.5,
            decomposition=rng.choice(list(DECOMPOSITIONS)),
            **cls.random_parts(rng),
        )

    def starts_as_base(self) -> bool | None:
        return None  # up to rounding


def pissa_layers(model: nn.Module) -> dict[str, PiSSALinear]:
    """The PiSSA layers of a model, by the names of the layers that they wrap."""
    return {name: layer for name, layer in lora_layers(model).items() if isinstance(layer, PiSSALinear)}


def as_lora(method: PiSSA, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was learned as a plain LoRA of rank 2 r on the pretrained weights: PEFT's fields and tensors.

        s (B A - B0 A0) = s [B, -B0] [A; A0]

    Args:
        method: that adapts the model.
        model: adapted, not merged.
    """
    config, tensors = lora_to_peft(method, model, lora_layers(model))
    for name, layer in pissa_layers(model).items():
        A0, B0 = layer.first_factors(method.decomposition)
        prefix = f"{PREFIX}{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.cat([layer.lora_A, A0.to(layer.lora_A)])  # (2 r, in)
        tensors[f"{prefix}.lora_B.weight"] = torch.cat([layer.lora_B, -B0.to(layer.lora_B)], dim=1)  # (out, 2 r)
    growth = math.sqrt(2) if method.rslora else 2  # of alpha, so that the scaling stays
    config["r"], config["lora_alpha"] = 2 * config["r"], growth * config["lora_alpha"]
    for name, factor in (("rank_pattern", 2), ("alpha_pattern", growth)):
        if name in config:
            config[name] = {pattern: factor * value for pattern, value in config[name].items()}
    return config, tensors
