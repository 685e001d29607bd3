"""SPAFIT (Arora and Wang 2024, arXiv:2405.00201): the further a layer is from the input, the more of it is trained.

The first layers stay frozen, the next train their biases, the last their biases and LoRAs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.bitfit import select_biases
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import LearningRates, Method, hyperparameter
from lora_from_scratch.methods.placement import find_targets


def stratify(n_layer: int, frozen_layers: int, bias_layers: int) -> tuple[range, range, range]:
    """Divide the layers from 0 to n_layer - 1 into three groups: frozen, biases only, LoRA and biases.

    Layers near the input hold knowledge that is useful for every task, layers near the output knowledge specific to the
    task (Arora and Wang 2024). Therefore the further a layer is from the input, the more of it is trained.

    Args:
        n_layer: the number of layers.
        frozen_layers: the number of layers, from the input, that stay frozen (the paper's N1), at least 0.
        bias_layers: the number of layers after these in which only the biases are trained (N2 - N1), at least 0.

    Returns:
        The indices of the layers of each group, from 0, in this order. The third group has all remaining layers.

    Raises:
        ValueError: a number is negative, or no layer is left for the third group.
    """
    for name, count in (("frozen_layers", frozen_layers), ("bias_layers", bias_layers)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"{name} must be a whole number of at least 0, got {count!r}")
    first, second = frozen_layers, frozen_layers + bias_layers
    if second >= n_layer:
        raise ValueError(
            f"frozen_layers and bias_layers together must be at most {n_layer - 1} (the model has {n_layer} layers, "
            f"and at least one gets LoRAs), got {frozen_layers} + {bias_layers}"
        )
    return range(first), range(first, second), range(second, n_layer)


@dataclass(frozen=True)
class SPAFIT(Method):
    """SPAFIT with three groups of layers (see `stratify`); the last has LoRAs on its `targets` and trains its biases.

    The embeddings and the final LayerNorm belong to no layer and stay frozen.

    Raises:
        ValueError: a hyperparameter is out of range, or, in `adapt`, one does not fit the model.
    """

    frozen_layers: int = hyperparameter(1, "number of blocks at the bottom that stay entirely frozen")
    bias_layers: int = hyperparameter(1, "number of blocks above the frozen ones in which only the biases are trained")
    rank: int = hyperparameter(8, "rank r of the update B A")
    alpha: float = hyperparameter(16, "the update is multiplied by alpha / rank")
    targets: Sequence[str] | str = hyperparameter(  # the paper: the attention's matrices
        ("c_attn", "attn.c_proj"),
        "names of the layers to adapt (c_attn, mlp.c_proj), parts of them (c_attn.q), or one regular expression",
    )
    seed: int = 0  # of A's initial values

    name: ClassVar[str] = "spafit"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_SPAFIT"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(1e-2, 2e-4, "as LoRA")
    position: ClassVar[float] = 80
    use_when: ClassVar[str] = (
        "you want a fixed rule by depth: the first layers stay frozen, the middle ones get biases, the last ones LoRA"
    )
    needs_gpt2: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", self._lora(self.targets).targets)
        stratify(self.frozen_layers + self.bias_layers + 1, self.frozen_layers, self.bias_layers)

    def _lora(self, targets: Sequence[str] | str) -> LoRA:
        """The LoRA on these targets, which also validates rank and alpha."""
        return LoRA(rank=self.rank, alpha=self.alpha, targets=targets, seed=self.seed)

    def _install(self, model: GPT2) -> None:
        _, biases_only, lora_and_biases = stratify(model.config.n_layer, self.frozen_layers, self.bias_layers)
        plan = find_targets(model, self.targets)
        inside = [f"transformer.h.{layer}." for layer in lora_and_biases]
        chosen = [
            ".".join(filter(None, (name, part)))
            for name, parts in plan.items()
            if name.startswith(tuple(inside))
            for part in parts or ("",)
        ]
        if not chosen:
            raise ValueError(
                f"none of the targets {self.targets!r} is in the layers {lora_and_biases.start} to "
                f"{lora_and_biases.stop - 1}, which get LoRAs; give a layer there or a name without a layer number"
            )
        self._lora(tuple(chosen))._install(model)
        for layer in (*biases_only, *lora_and_biases):
            for bias in select_biases(model.transformer.h[layer]).values():
                bias.requires_grad_(True)

    def _uninstall(self, model: GPT2) -> None:
        self._lora(self.targets)._uninstall(model)

    def _merge(self, model: GPT2) -> None:
        self._lora(self.targets)._merge(model)

    def _unmerge(self, model: GPT2) -> None:
        self._lora(self.targets)._unmerge(model)

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> SPAFIT:
        biased = rng.randint(0, config.n_layer - 1)
        frozen = rng.randint(0, config.n_layer - 1 - biased)
        return cls(frozen_layers=frozen, bias_layers=biased, rank=rng.randint(1, 2))

    def trains_of_base(self) -> str:
        return "biases"

    def starts_as_base(self) -> bool | None:
        return True
