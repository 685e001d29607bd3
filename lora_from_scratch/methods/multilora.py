"""MultiLoRA (Wang et al. 2023, arXiv:2311.11501): several LoRAs beside each other, each with a learned scale.

    y = W x + b + sum over i of c_i * (B_i (A_i x))        A_i: (r, in), B_i: (out, r), c_i: (out,), i = 1 ... n

The scales c_i start at zero, so at the start nothing changes, and A_i and B_i both start random (section 3.3). With
fixed scales, n LoRAs of rank r are one LoRA of rank n r; what differs is the start and that the scales are learned. The
paper's claim is that the change is then dominated less by a few singular directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.linear_algebra.rank import check_rank
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS
from lora_from_scratch.methods.wrapped_layers import WrapsLayers, like, lora_on_computed_factors
from lora_from_scratch.support.linear_layers import in_and_out
from lora_from_scratch.support.tape import Tape, TensorSize


def scaled_B(B: Tensor, scales: Tensor) -> Tensor:
    """The B of the one LoRA of rank n r that does what n LoRAs of rank r do, each with its scales.

    With A' = the A of all n LoRAs, one below the other, and B' = the result, B' A' is the sum of
    diag(c_i) B_i A_i over the LoRAs i (Wang et al. 2023, section 3.3). Gradients flow to B and to the scales.

    Args:
        B: (out, n r), the B of all LoRAs side by side: the first r columns are those of LoRA 0.
        scales: (n, out). Row i is c_i, with one number for each output.

    Returns:
        (out, n r).
    """
    rank = B.shape[1] // len(scales)
    return B * scales.T.repeat_interleave(rank, dim=1)


class MultiLoRALinear(LoRALinear):
    """n LoRAs on a layer: `lora_A` (n r, in) and `lora_B` (out, n r), one LoRA after the other; `scales` (n, out)."""

    def __init__(
        self, base: nn.Module, modules: int, rank: int, dropout: float, generator: torch.Generator | None = None
    ) -> None:
        self.n = modules
        super().__init__(base, rank, rank, dropout=dropout, generator=generator)  # alpha = r: the scales scale
        self.scales = like(torch.zeros(modules, in_and_out(base)[1]), base)

    def initial_factors(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """All A and all B, each entry uniform as in an `nn.Linear`: between -1/sqrt(fan_in) and 1/sqrt(fan_in)."""
        inputs, outputs = in_and_out(self.base)
        check_rank(self.rank, min(inputs, outputs), "the smaller side of W")
        A = nn.init.kaiming_uniform_(torch.empty(self.n * self.rank, inputs), a=math.sqrt(5), generator=generator)
        each = [
            nn.init.kaiming_uniform_(torch.empty(outputs, self.rank), a=math.sqrt(5), generator=generator)
            for _ in range(self.n)
        ]
        return A, torch.cat(each, dim=1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (n r, in), and B (out, n r) with the columns of each LoRA multiplied by its scales."""
        return self.lora_A, scaled_B(self.lora_B, self.scales)


@dataclass(frozen=True)
class MultiLoRA(WrapsLayers):
    """MultiLoRA on whole linear layers of any model; see the module for the equation.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; a rank that does not fit a layer, in `adapt`;
            or as for `WrapsLayers`.
    """

    modules: int = hyperparameter(3, "LoRAs beside each other on each layer")
    rank: int = hyperparameter(4, "r, the rank of each of them")
    dropout: float = hyperparameter(0.0, "share of the inputs that is dropped in training")
    seed: int = 0  # of the first values

    name: ClassVar[str] = "multilora"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_MULTILORA"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-2, 2e-4, "as LoRA; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 17
    use_when: ClassVar[str] = (
        "one adapter has to learn several tasks and LoRA is not enough; the paper reports an advantage there, but in "
        "benchmarks/several_tasks.md LoRA with as many parameters learned five small tasks better"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"multilora"})
    layer: ClassVar[type[nn.Module]] = MultiLoRALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("modules", "rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: MultiLoRALinear(base, self.modules, self.rank, self.dropout, generator)
            for name, base in bases.items()
        }

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> MultiLoRA:
        return cls(
            targets=rng.choice(WHOLE_LAYERS),
            modules=rng.randint(1, 3),
            rank=rng.randint(1, 2),
            dropout=rng.choice([0.0, 0.1]),
            seed=rng.randint(0, 99),
        )


@activations.forward.register
def _(module: MultiLoRALinear, x: TensorSize, tape: Tape) -> TensorSize:
    if not module.merged:
        repeated = TensorSize(
            1, module.lora_B.numel(), module.lora_B.element_size()
        )  # the scales, a column for each of B
        tape.add([], TensorSize(1, 1), [repeated], [module.lora_B])
    return lora_on_computed_factors(module, x, tape)
