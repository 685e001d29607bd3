"""LoRA with layer-wise learning rates: the lower a block, the slower it learns.

Howard and Ruder 2018 (arXiv:1801.06146, section 3.2) fine-tune lower layers at smaller rates, because they hold what is
general; the rate falls by a constant factor from block to block. Everything else is LoRA, and what is saved is a LoRA's
directory.

This file stands outside the package. It is the example of docs/architecture.md, and a test adds it to the methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.lora_peft import layer_index
from lora_from_scratch.methods.method import LearningRates, hyperparameter


@dataclass(frozen=True)
class LayerwiseLoRA(LoRA):
    """LoRA whose learning rate is multiplied by `decay` for every block between a layer and the top.

    Raises:
        ValueError: the decay is not above 0 and at most 1, or as for `LoRA`.
    """

    decay: float = hyperparameter(0.5, "learning rate of a block divided by that of the block above")

    name: ClassVar[str] = "lora-layerwise"
    learning_rates: ClassVar[LearningRates] = LearningRates(3e-3, 2e-4, "as LoRA; not tuned: an example")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.decay, int | float) or not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay!r}")

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        blocks = {name: layer_index(name) for name in self.trainable(model)}
        top = max((block for block in blocks.values() if block is not None), default=0)
        groups: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.trainable(model).items():
            block = blocks[name]
            groups.setdefault(top if block is None else block, []).append(parameter)
        return [{"params": group, "lr_scale": self.decay ** (top - block)} for block, group in groups.items()]

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Never: what it saves is a LoRA."""
        return False
