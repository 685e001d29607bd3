"""ReMoRA (Jiang et al. 2024, arXiv:2405.12130, section 4.3): MoRA with the restarts of ReLoRA.

    y = W x + b + decompress(M compress(x))        M: (q, q), q = round(sqrt((in + out) r))

After each cycle except the last, the change is merged into W and M is reset to zero (`relora.Restarts`). With the same
compress and decompress in every cycle this would gain nothing: the sum of two changes is the change with M_1 + M_2. So
a restart also changes how features are grouped. n features are divided into q groups in one of two ways:

- "modulo q": group i contains the positions i, i + q, i + 2 q, ... (MoRA's "sharing");
- "neighbours": group i contains consecutive positions; the first n mod q groups have one more than the others.

compress sums each group of inputs; decompress gives all outputs of a group the same value. With two groupings of the
inputs and two of the outputs there are four kinds of cycle, used in turn in the order of the authors' code (types 1 to
4 in kongds/MoRA). The summed change has rank up to 2 q - 1; MoRA's has rank up to q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.lora import lora_layers
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.mora import SHARING, MoRALinear
from lora_from_scratch.methods.placement import WHOLE_LAYERS, check_ranks_and_alphas
from lora_from_scratch.methods.relora import Restarts
from lora_from_scratch.methods.wrapped_layers import WrapsLayers
from lora_from_scratch.support.linear_layers import in_and_out
from lora_from_scratch.support.wrapped import unwrapped

# Whether the groups of inputs, and those of outputs, are neighbours: in the first four cycles, then again from the
# first.
KINDS = ((False, False), (True, True), (True, False), (False, True))


def add_up_neighbours(x: Tensor, groups: int) -> Tensor:
    """(..., n) to (..., groups): sums over consecutive features; the first n mod groups sums have one term more."""
    size, larger = divmod(x.shape[-1], groups)
    first, rest = x.split([larger * (size + 1), (groups - larger) * size], dim=-1)
    sums = [first.unflatten(-1, (larger, size + 1)).sum(-1), rest.unflatten(-1, (groups - larger, size)).sum(-1)]
    return torch.cat(sums, dim=-1)


def repeat_for_neighbours(z: Tensor, outputs: int) -> Tensor:
    """(..., groups) to (..., outputs): each value repeated for the positions of its group in `add_up_neighbours`."""
    size, larger = divmod(outputs, z.shape[-1])
    first, rest = z[..., :larger], z[..., larger:]
    return torch.cat([first.repeat_interleave(size + 1, dim=-1), rest.repeat_interleave(size, dim=-1)], dim=-1)


class ReMoRALinear(MoRALinear):
    """A MoRA layer of the variant "sharing" whose groups depend on the cycle.

    Attributes:
        restarts: the number of restarts so far; a scalar on the CPU, so that reading it does not wait for a GPU.
    """

    def __init__(self, base: nn.Module, rank: int, dropout: float = 0.0) -> None:
        super().__init__(base, rank, SHARING, dropout)
        self.restarts = torch.zeros((), dtype=torch.int64, device="cpu")

    def compress(self, x: Tensor) -> Tensor:
        neighbours, _ = self.kind()
        return add_up_neighbours(x, self.q) if neighbours else super().compress(x)

    def decompress(self, z: Tensor) -> Tensor:
        _, neighbours = self.kind()
        return repeat_for_neighbours(z, in_and_out(self.base)[1]) if neighbours else super().decompress(z)

    def kind(self) -> tuple[bool, bool]:
        """Whether the groups of inputs, and those of outputs, are neighbours."""
        return KINDS[int(self.restarts) % len(KINDS)]

    def extra_repr(self) -> str:
        return f"q={self.q}, restarts={int(self.restarts)}, dropout={self.dropout_p:g}, merged={self.merged}"


@dataclass(frozen=True)
class ReMoRA(Restarts, WrapsLayers):
    """MoRA trained in several cycles with different groups; see the module for the equation.

    Raises:
        ValueError: a hyperparameter is out of range (raised by the constructor), or the rank does not fit a layer
            (raised by `adapt`); otherwise as for `Restarts` and `WrapsLayers`.
    """

    rank: int = hyperparameter(8, "rank r of the LoRA with the same number of parameters")
    dropout: float = hyperparameter(0.0, "dropout rate of the inputs in training")

    name: ClassVar[str] = "remora"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_REMORA"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-3, 5e-4, "kongds/MoRA, for pretraining; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 18.5
    use_when: ClassVar[str] = (
        "you would use MoRA, and the run is long enough for restarts; what is saved is as large as the adapted weights"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"remora"})
    layer: ClassVar[type[nn.Module]] = ReMoRALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks_and_alphas(self.rank, {}, 1.0, {})
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {name: ReMoRALinear(base, self.rank, self.dropout) for name, base in bases.items()}

    def start_cycle(self, layer: ReMoRALinear, generator: torch.Generator) -> None:
        layer.mora_M.zero_()
        layer.restarts += 1

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        layers: Mapping[str, ReMoRALinear] = lora_layers(unwrapped(model))  # type: ignore[assignment]
        restarts = {f"{name}.restarts": layer.restarts for name, layer in layers.items()}
        return super().training_state(model) | restarts

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> ReMoRA:
        return cls(
            targets=rng.choice(WHOLE_LAYERS),
            rank=rng.randint(1, 2),
            dropout=rng.choice([0.0, 0.1]),
            **cls.random_cycles(rng),
        )
