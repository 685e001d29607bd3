"""Unit 17: ReLoRA layers on which the learner's test is tried, sound ones and faulty ones.

They use nothing of the exercises, whose solutions are missing where submissions are graded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """A sound layer: A uniform, B zero. The others change one thing."""

    W: Tensor

    def __init__(self, W: Tensor, rank: int, scaling: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("W", W.clone())
        self.factor = scaling
        self.A = nn.Parameter(torch.empty(rank, W.shape[1], dtype=W.dtype))
        self.B = nn.Parameter(torch.empty(W.shape[0], rank, dtype=W.dtype))
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        bound = self.W.shape[1] ** -0.5
        self.A.uniform_(-bound, bound)
        self.B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W.T + self.factor * (x @ self.A.T @ self.B.T)

    @torch.no_grad()
    def restart(self) -> None:
        self.merge()
        self.start_again()

    def merge(self) -> None:
        self.W += self.factor * (self.B @ self.A)

    def start_again(self) -> None:
        self.start()


class BRandom(Layer):
    @torch.no_grad()
    def start(self) -> None:
        self.A.zero_()
        self.B.normal_(std=self.W.shape[1] ** -0.5)


class SmallNormal(Layer):
    @torch.no_grad()
    def start(self) -> None:
        self.A.normal_(std=1e-3)
        self.B.zero_()


class OnlyBTrained(Layer):
    """As in LoRA-FA."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.A.requires_grad_(False)


class OnlyATrained(BRandom):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.B.requires_grad_(False)


class BothZeroAtTheStart(Layer):
    """The fault of the museum."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        nn.init.zeros_(self.A)


class BothRandomAtTheStart(Layer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        nn.init.normal_(self.B)


class WTrained(Layer):
    """The gradient goes to W, and none to A and B."""

    def __init__(self, W: Tensor, rank: int, scaling: float = 1.0) -> None:
        super().__init__(W, rank, scaling)
        del self.W
        self.W = nn.Parameter(W.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W.T + self.factor * (x @ self.A.detach().T @ self.B.detach().T)


class BothZeroAfterARestart(Layer):
    def start_again(self) -> None:
        self.A.zero_()
        self.B.zero_()


class NotMerged(Layer):
    def merge(self) -> None:
        pass


class MergedWithoutScaling(Layer):
    def merge(self) -> None:
        self.W += self.B @ self.A


class BKept(Layer):
    def start_again(self) -> None:
        bound = self.W.shape[1] ** -0.5
        self.A.uniform_(-bound, bound)


class AKept(Layer):
    def start_again(self) -> None:
        self.B.zero_()


class BKeptAndAZero(BRandom):
    def start_again(self) -> None:
        self.A.zero_()


SOUND: dict[str, type[nn.Module]] = {
    "A is uniform, B zero": Layer,
    "A is normal and small, B zero": SmallNormal,
    "A is zero, B normal": BRandom,
    "only B is trained, A is frozen and random": OnlyBTrained,
    "only A is trained, B is frozen and random": OnlyATrained,
}
FAULTY: dict[str, type[nn.Module]] = {
    "A and B are both zero at the start": BothZeroAtTheStart,
    "A and B are both random at the start": BothRandomAtTheStart,
    "at the start the gradient goes to W, and none to A and B": WTrained,
    "A and B are both zero after a restart": BothZeroAfterARestart,
    "a restart begins anew without merging": NotMerged,
    "a restart merges B A without the scaling": MergedWithoutScaling,
    "a restart merges and keeps B": BKept,
    "a restart keeps A, and only B is new": AKept,
    "a restart keeps B, and only A is new": BKeptAndAZero,
}
LAYERS = SOUND | FAULTY
