"""Unit 15: sound and faulty versions of a layer that merges itself, on which a learner's test is tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Layer(nn.Linear):
    """What they share: the parameters, and a forward pass that is right whatever `train` does to the weight."""

    def __init__(self, in_features: int, out_features: int, rank: int, scaling: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        self.requires_grad_(False)
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        self.kept: Tensor | None = None
        self.added: Tensor | None = None

    def change(self) -> Tensor:
        return (self.scaling * self.lora_B @ self.lora_A).detach()

    def mode(self, mode: bool) -> None:
        nn.Module.train(self, mode)

    def merge(self) -> None:
        self.kept = self.weight.data.clone()
        self.weight.data += self.change()

    def unmerge(self) -> None:
        assert self.kept is not None
        self.weight.data.copy_(self.kept)
        self.kept = None

    def train(self, mode: bool = True) -> Any:
        self.mode(mode)
        if not mode and self.kept is None:
            self.merge()
        elif mode and self.kept is not None:
            self.unmerge()
        return self


class InDoublePrecision(Layer):
    """Sound: the sum is formed in float64, so that its last bits are others."""

    def merge(self) -> None:
        self.kept = self.weight.data
        A, B = self.lora_A.detach().double(), self.lora_B.detach().double()
        self.weight.data = (self.kept.double() + self.scaling * (B @ A)).to(self.kept.dtype)

    def unmerge(self) -> None:
        assert self.kept is not None
        self.weight.data, self.kept = self.kept, None


class KeepsACopyFromTheStart(nn.Linear):
    """Sound: W is there twice, from the first evaluation on."""

    def __init__(self, in_features: int, out_features: int, rank: int, scaling: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        self.requires_grad_(False)
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.randn(rank, in_features))
        self.lora_B = nn.Parameter(torch.randn(out_features, rank))  # not zero at the start
        self.frozen: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> KeepsACopyFromTheStart:
        if self.training:
            self.frozen["weight"] = self.weight.detach().clone()
        W = self.frozen["weight"]
        self.weight.data.copy_(W if mode else torch.addmm(W, self.lora_B, self.lora_A, alpha=self.scaling))
        super().train(mode)
        return self


class Subtracts(Layer):
    def merge(self) -> None:
        self.kept = self.weight.data
        self.weight.data = self.weight.data + self.change()

    def unmerge(self) -> None:
        self.kept = None
        self.weight.data = self.weight.data - self.change()


class SubtractsWhatItAdded(Layer):
    def merge(self) -> None:
        self.kept = self.added = self.change()
        self.weight.data = self.weight.data + self.added

    def unmerge(self) -> None:
        assert self.added is not None
        self.kept = None
        self.weight.data = self.weight.data - self.added


class SubtractsInDoublePrecision(Layer):
    """W comes back, bit for bit, as long as A and B stay."""

    def exact(self) -> Tensor:
        return self.scaling * (self.lora_B.detach().double() @ self.lora_A.detach().double())

    def merge(self) -> None:
        self.kept = self.weight.data.double() + self.exact()
        self.weight.data = self.kept.to(self.weight.dtype)

    def unmerge(self) -> None:
        assert self.kept is not None
        self.weight.data = (self.kept - self.exact()).to(self.weight.dtype)
        self.kept = None


class ReturnsNothing(Layer):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)


class TrainReturnsNothing(Layer):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        return None if mode else self


class EvalReturnsTheWeight(Layer):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        return self if mode else self.weight


class NeverMerges(Layer):
    def train(self, mode: bool = True) -> Any:
        self.mode(mode)
        return self


class ForgetsTheScaling(Layer):
    def change(self) -> Tensor:
        return (self.lora_B @ self.lora_A).detach()


class MergesAgain(Layer):
    """Each `eval()` adds the change; `train()` gives back what was there before the first."""

    def train(self, mode: bool = True) -> Any:
        self.mode(mode)
        if not mode:
            before = self.kept
            self.merge()
            self.kept = self.kept if before is None else before
        elif self.kept is not None:
            self.unmerge()
        return self


class Toggles(Layer):
    """Each call of `eval()` or of `train()` merges or unmerges, whatever the mode; a first `train()` does nothing."""

    def train(self, mode: bool = True) -> Any:
        self.mode(mode)
        if self.kept is not None:
            self.unmerge()
        elif not mode or self.added is not None:
            self.merge()
        self.added = self.weight.data
        return self


class NeverUnmerges(Layer):
    def unmerge(self) -> None:
        pass


class TakesTheChangeOutAgain(Layer):
    """A second `train()` subtracts the change from W."""

    def train(self, mode: bool = True) -> Any:
        again = mode and self.training and self.added is not None
        super().train(mode)
        if again:
            self.weight.data = self.weight.data - self.change()
        self.added = self.weight.data
        return self


SOUND = {
    "a sound layer that keeps W": Layer,
    "a sound layer that forms the sum in float64": InDoublePrecision,
    "a sound layer with a random B, and with none of the usual attributes": KeepsACopyFromTheStart,
}
FAULTY = {
    "a layer whose eval() changes nothing": NeverMerges,
    "a layer that adds B A without s": ForgetsTheScaling,
    "a layer that stays merged": NeverUnmerges,
    "a layer that subtracts s B A again": Subtracts,
    "a layer that keeps s B A and subtracts it again": SubtractsWhatItAdded,
    "a layer that subtracts in float64, with the A and B of that moment": SubtractsInDoublePrecision,
    "a layer that merges once more at a second eval()": MergesAgain,
    "a layer that changes over at every call": Toggles,
    "a layer that subtracts once more at a second train()": TakesTheChangeOutAgain,
    "a layer whose eval() and train() return None": ReturnsNothing,
    "a layer whose train() alone returns None": TrainReturnsNothing,
    "a layer whose eval() returns the weight": EvalReturnsTheWeight,
}
VERSIONS: dict[str, Callable[..., Any]] = {**SOUND, **FAULTY}
