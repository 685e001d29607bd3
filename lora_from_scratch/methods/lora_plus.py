"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): LoRA in which B learns faster than A.

With one learning rate for both, A and B of a wide layer cannot both learn efficiently (theorem 1). LoRA+ multiplies the
rate of B by a ratio lambda > 1; everything else is LoRA, and what is saved is a LoRA's directory. The ratio multiplies
the rate of A, so that a larger ratio wants a smaller learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import LearningRates, hyperparameter


def lora_plus_groups(parameters: Mapping[str, nn.Parameter], ratio: float) -> list[dict[str, Any]]:
    """The optimiser's two groups of parameters (Hayou et al. 2024): B learns `ratio` times as fast as everything else.

    A parameter is a B if the last part of its name is "lora_B", whatever its shape. Every parameter is in exactly one
    group, in the given order; a magnitude or a bias that is trained as well learns as A does. The training loop
    multiplies the learning rate of a group by its "lr_scale".

    Args:
        parameters: what is trained, by full names: "transformer.h.0.attn.c_attn.lora_A".
        ratio: the learning rate of B divided by that of A.

    Returns:
        Two dictionaries: for A and the others {"params": [...]}; for the B {"params": [...], "lr_scale": ratio}.
    """
    fast = [name for name in parameters if name.rpartition(".")[2] == "lora_B"]
    return [
        {"params": [p for name, p in parameters.items() if name not in fast]},
        {"params": [parameters[name] for name in fast], "lr_scale": ratio},
    ]


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """LoRA with the learning rate of B multiplied by `ratio`; what else is trained learns as A does.

    Raises:
        ValueError: the ratio is not a positive number, or as `LoRA`.
    """

    ratio: float = hyperparameter(16.0, "learning rate of B divided by that of A")  # the paper's code

    name: ClassVar[str] = "lora-plus"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-4, 2e-4, "GPT-2 script in nikhil-ghosh-berkeley/loraplus; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 11
    use_when: ClassVar[str] = (
        "you want to try a higher learning rate for B than for A; at tuned rates it was not ahead of LoRA here "
        "(unit 15)"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"lora-plus"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.ratio, int | float) or not math.isfinite(self.ratio) or self.ratio <= 0:
            raise ValueError(f"ratio must be a positive number, got {self.ratio!r}")

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return lora_plus_groups(self.trainable(model), self.ratio)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Never: what it saves is a LoRA."""
        return False
