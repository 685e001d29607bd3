"""Unit 09: LoRA layers on which the learner's test is tried, sound ones and faulty ones.

They use nothing of the exercises, whose solutions are missing where submissions are graded.
"""

from __future__ import annotations

import torch
from torch import nn


class Layer(nn.Module):
    """A sound layer: A is (r, in) and uniform, B is zero. The others change one thing."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.inputs, self.outputs, self.rank, self.alpha = in_features, out_features, rank, alpha
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        bound = self.bound()
        self.A.uniform_(-bound, bound)
        self.B.zero_()

    def bound(self) -> float:
        return float(self.inputs) ** -0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Refused: without a `forward`, PyTorch would raise the error of an exercise that is not written yet."""
        raise RuntimeError("this layer consists of A and B only: test how they start, without calling the layer")


class Transposed(Layer):
    """As in the museum, but with the right bound."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        super().__init__(in_features, out_features, rank, alpha)
        self.A = nn.Parameter(self.A.detach().T.contiguous())
        self.B = nn.Parameter(self.B.detach().T.contiguous())


class Normal(Layer):
    @torch.no_grad()
    def start(self) -> None:
        self.A.normal_(std=(3 * self.inputs) ** -0.5)
        self.B.zero_()


class TwoValues(Layer):
    """Every entry is plus or minus the standard deviation."""

    @torch.no_grad()
    def start(self) -> None:
        self.A.bernoulli_(0.5).sub_(0.5).mul_(2 * (3 * self.inputs) ** -0.5)
        self.B.zero_()


class BoundFromRank(Transposed):
    """The fault of the museum."""

    def bound(self) -> float:
        return float(self.rank) ** -0.5


class BoundFromOutputs(Layer):
    def bound(self) -> float:
        return float(self.outputs) ** -0.5


class BoundWithoutRoot(Layer):
    def bound(self) -> float:
        return 1 / self.inputs


class BoundOfHe(Layer):
    def bound(self) -> float:
        return float((6 / self.inputs) ** 0.5)


class DeviationIsTheBound(Layer):
    def bound(self) -> float:
        return float((3 / self.inputs) ** 0.5)


class DividedByAlpha(Layer):
    def bound(self) -> float:
        return super().bound() / self.alpha


class FixedWidth(Layer):
    @torch.no_grad()
    def start(self) -> None:
        self.A.normal_(std=0.02)
        self.B.zero_()


class BoundFromTheSmallerSide(Layer):
    """Right for a layer with more outputs than inputs."""

    def bound(self) -> float:
        return float(min(self.inputs, self.outputs)) ** -0.5


class BoundFromTheLargerSide(Layer):
    """Right for a layer with more inputs than outputs."""

    def bound(self) -> float:
        return float(max(self.inputs, self.outputs)) ** -0.5


class AZero(Layer):
    @torch.no_grad()
    def start(self) -> None:
        self.A.zero_()
        self.B.zero_()


class BRandom(Layer):
    @torch.no_grad()
    def start(self) -> None:
        super().start()
        self.B.uniform_(-self.bound(), self.bound())


class BConstant(Layer):
    @torch.no_grad()
    def start(self) -> None:
        super().start()
        self.B.fill_(0.5)


class OneColumnOfBRandom(Layer):
    @torch.no_grad()
    def start(self) -> None:
        super().start()
        self.B[:, -1].normal_(std=1e-3)


SOUND: dict[str, type[nn.Module]] = {
    "A is (r, in) and uniform": Layer,
    "A is (in, r) and uniform": Transposed,
    "A is (r, in) and normal": Normal,
    "every entry of A is plus or minus 1 / sqrt(3 in)": TwoValues,
}
FAULTY: dict[str, type[nn.Module]] = {
    "A is uniform up to 1/sqrt(r)": BoundFromRank,
    "A is uniform up to 1/sqrt(out)": BoundFromOutputs,
    "A is uniform up to 1/in": BoundWithoutRoot,
    "A is uniform up to sqrt(6/in)": BoundOfHe,
    "A is uniform with the standard deviation 1/sqrt(in)": DeviationIsTheBound,
    "A is uniform up to 1/sqrt(in), divided by alpha": DividedByAlpha,
    "A is normal with the standard deviation 0.02": FixedWidth,
    "A is uniform up to 1/sqrt of the smaller of in and out": BoundFromTheSmallerSide,
    "A is uniform up to 1/sqrt of the larger of in and out": BoundFromTheLargerSide,
    "A and B are zero": AZero,
    "A and B are both random": BRandom,
    "A is right and B is 0.5 everywhere": BConstant,
    "B is zero except for one column of small numbers": OneColumnOfBRandom,
}
LAYERS = SOUND | FAULTY
