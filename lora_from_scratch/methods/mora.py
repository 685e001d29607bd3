"""MoRA (Jiang et al. 2024, arXiv:2405.12130): one square matrix in the place of two thin ones.

    y = W x + b + decompress(M compress(x))        M: (q, q), q = round(sqrt((in + out) r))

M has as many parameters as a LoRA of rank r, and a rank of up to q instead of r. Going from in to q numbers and from q
to out has no parameters (section 4.2). Two ways, by their names in the paper:

- "sharing": compress adds up the entries of x whose places are the same modulo q; decompress repeats the q numbers. The
  change has rank q.
- "rotation": x is cut into pieces of q numbers; piece j is turned by the angles of rotary position embeddings for
  position j (Su et al. 2021, base 10,000), so that M sees which piece it is; the products of all pieces are put side by
  side. The change has a block of its own for each piece, and rank up to the smaller side of W.

Where in or out is no multiple of q, x is filled up with its own first entries, and of the result what is too much is
cut off or, if it is too little, its beginning is repeated, as in the authors' code. M starts at zero, so at the start
nothing changes. There is no scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.linear_algebra.rank import check_rank
from lora_from_scratch.methods.fast_product import dropout
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS, check_ranks_and_alphas
from lora_from_scratch.methods.wrapped_layers import WrapsLayers, like
from lora_from_scratch.support.linear_layers import in_and_out
from lora_from_scratch.support.tape import Tape, TensorSize

SHARING, ROTATION = "sharing", "rotation"
ROPE_BASE = 10_000.0


def side_for_rank(in_features: int, out_features: int, rank: int, even: bool = False) -> int:
    """q, the side of a square with about as many numbers as a LoRA of this rank; rounded up to an even one if need be.

    (The paper, section 4.1, rounds down; the authors' code to the nearest.)
    """
    q = int(math.sqrt((in_features + out_features) * rank) + 0.5)
    return q + q % 2 if even else q


# --- From in to q numbers, and from q to out ----------------------------------------------------------------


def compress(x: Tensor, q: int) -> Tensor:
    """MoRA's way from in to q numbers in the variant "sharing" (Jiang et al. 2024, section 4.2).

    Entry i of the result is x[i] + x[i + q] + x[i + 2 q] + ...: the entries of x whose places are the same modulo q
    share a column of M. Where in is no multiple of q, x is first filled up to one with its own first entries
    (`fill_up`), as in the authors' code. Gradients flow to x.

    Args:
        x: (..., in), with any number of leading axes, also none.
        q: the side of M. It may be larger than in.

    Returns:
        (..., q).
    """
    return fill_up(x, q).unflatten(-1, (-1, q)).sum(dim=-2)


def decompress(z: Tensor, outputs: int) -> Tensor:
    """MoRA's way from q numbers to out in the variant "sharing" (Jiang et al. 2024, section 4.2).

    The q numbers are repeated one after the other, as a whole, until there are enough of them: entry i of the result
    is z[i mod q]. What is too much at the end is cut off. Gradients flow to z.

    Args:
        z: (..., q), with any number of leading axes, also none.
        outputs: out, the length of the result. It may be smaller than q.

    Returns:
        (..., out).
    """
    times = math.ceil(outputs / z.shape[-1])
    return z.repeat(*[1] * (z.ndim - 1), times)[..., :outputs]


def fill_up(x: Tensor, multiple: int) -> Tensor:
    """x (..., n) with its own first entries behind it, until n is a multiple of this."""
    missing = -x.shape[-1] % multiple
    while missing > 0:  # more than once only if q is above 2 n
        x = torch.cat([x, x[..., :missing]], dim=-1)
        missing = -x.shape[-1] % multiple
    return x


def rotate(pieces: Tensor) -> Tensor:
    """Turn piece j (..., pieces, q) by the angles of position j: entries i and i + q / 2 by j / 10000^(2 i / q)."""
    count, q = pieces.shape[-2:]
    place = torch.arange(0, q, 2, device=pieces.device, dtype=torch.float32) / q
    angles = (
        torch.arange(count, device=pieces.device, dtype=torch.float32)[:, None] / ROPE_BASE**place
    )  # (pieces, q / 2)
    cos, sin = angles.cos().to(pieces.dtype), angles.sin().to(pieces.dtype)
    first, second = pieces.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


# --- The layer and the method -------------------------------------------------------------------------------


class MoRALinear(LoRALinear):
    """A linear layer with a MoRA beside it; merging is LoRA's.

    Args:
        base: the linear layer.
        rank: r, of the LoRA whose number of parameters is taken.
        variant: "sharing" or "rotation".
        dropout: of the elements of the input, in training.
    """

    def __init__(self, base: nn.Module, rank: int, variant: str = ROTATION, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.base, self.rank, self.alpha, self.scaling = base, rank, rank, 1.0
        self.variant, self.dropout_p = variant, dropout
        self.register_buffer("_unmerged", None, persistent=False)
        inputs, outputs = in_and_out(base)
        check_rank(rank, min(inputs, outputs), "the smaller side of W")
        self.q = side_for_rank(inputs, outputs, rank, even=variant == ROTATION)
        self.mora_M = like(torch.zeros(self.q, self.q), base)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.merged:
            return y
        z = F.linear(self.compress(dropout(x, self.dropout_p, self.training)), self.mora_M)
        return y + self.decompress(z)

    def compress(self, x: Tensor) -> Tensor:
        """(..., in) to (..., q), or in the variant "rotation" to (..., pieces, q)."""
        if self.variant == SHARING:
            return compress(x, self.q)
        return rotate(fill_up(x, self.q).unflatten(-1, (-1, self.q)))

    def decompress(self, z: Tensor) -> Tensor:
        """The inverse direction, to (..., out)."""
        _, outputs = in_and_out(self.base)
        return decompress(z if self.variant == SHARING else z.flatten(-2), outputs)

    def change(self, W: Tensor) -> Tensor:
        """What merging adds to the weight (out, in): what the layer adds for each unit vector."""
        M = self.mora_M.float()
        units = torch.eye(W.shape[1], device=M.device)
        return self.decompress(F.linear(self.compress(units), M)).T

    def extra_repr(self) -> str:
        return f"variant={self.variant}, q={self.q}, dropout={self.dropout_p:g}, merged={self.merged}"


SHARING_RATES = LearningRates(3e-3, 3e-4, "kongds/MoRA; bundled: benchmarks/learning_rates.md")


@dataclass(frozen=True)
class MoRA(WrapsLayers):
    """MoRA on whole linear layers of any model; see the module for the equation.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; a rank that does not fit a layer, in `adapt`;
            or as for `WrapsLayers`.
    """

    rank: int = hyperparameter(8, "r, of the LoRA with as many parameters")
    variant: str = hyperparameter(ROTATION, 'how the input is compressed: "sharing" or "rotation"')
    dropout: float = hyperparameter(0.0, "share of the inputs that is dropped in training")

    name: ClassVar[str] = "mora"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_MORA"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(
        1e-2, 3e-4, "kongds/MoRA; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 18
    use_when: ClassVar[str] = (
        "the task is to remember facts, such as random pairs (unit 17): an update of high rank stores more of "
        "them with the same number of parameters"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"mora-sharing", "mora-rotation"})
    layer: ClassVar[type[nn.Module]] = MoRALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranks_and_alphas(self.rank, {}, 1.0, {})
        if self.variant not in (SHARING, ROTATION):
            raise ValueError(f"variant must be one of {SHARING}, {ROTATION}, got {self.variant!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        return {name: MoRALinear(base, self.rank, self.variant, self.dropout) for name, base in bases.items()}

    def learning_rate(self, width: int) -> float:
        return (SHARING_RATES if self.variant == SHARING else self.learning_rates).for_width(width)

    @classmethod
    def contestants(cls) -> dict[str, dict[str, object]]:
        return {f"mora-{variant}": {"variant": variant} for variant in (SHARING, ROTATION)}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> MoRA:
        return cls(
            targets=rng.choice(WHOLE_LAYERS),
            rank=rng.randint(1, 2),
            variant=rng.choice([SHARING, ROTATION]),
            dropout=rng.choice([0.0, 0.1]),
        )


@activations.forward.register
def _(module: MoRALinear, x: TensorSize, tape: Tape) -> TensorSize:
    y = activations.forward(module.base, x, tape)
    if module.merged:
        return y
    inputs, _ = in_and_out(module.base)
    x = tape.dropout(x, module.dropout_p, noise_width=1)
    pieces = 1 if module.variant == SHARING else -(-inputs // module.q)
    small = tape.add([x], TensorSize(x.rows * pieces, module.q, x.width))
    z = tape.linear(small, module.mora_M, module.q)
    return tape.add([y, z], TensorSize(y.rows, y.columns, y.width))
