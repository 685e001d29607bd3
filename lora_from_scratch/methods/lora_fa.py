"""LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): LoRA whose A stays as it was drawn.

    y = W x + b + s B A x        only B: (out, r) is trained

The gradient of A needs x, (tokens, in), to be kept for the backward pass; that of B needs only A x, (tokens, r). With A
frozen x is not kept, which is most of what LoRA keeps (section 3.2). The change of the weight is confined to the rows
of A. What is saved is a LoRA's directory.

PEFT's optimiser for LoRA-FA also multiplies the gradient of B by (A A^T)^-1 / s^2, from the paper's second version.
With the usual random A, A A^T is nearly a multiple of the identity, and Adam does not see the scale of a gradient; that
step is left out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lora_from_scratch.methods.lora import LoRA, lora_layers
from lora_from_scratch.methods.method import LearningRates


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA in which only B is trained.

    Raises:
        ValueError: as for `LoRA`.
    """

    name: ClassVar[str] = "lora-fa"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-3, 6e-4, "three times LoRA's; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 13
    use_when: ClassVar[str] = (
        "the activations of wide layers are what fills the memory: a frozen A needs only r numbers of each token"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"lora-fa"})

    def _install(self, model: nn.Module) -> None:
        super()._install(model)
        for layer in lora_layers(model).values():
            layer.lora_A.requires_grad_(False)

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Never: what it saves is a LoRA."""
        return False
