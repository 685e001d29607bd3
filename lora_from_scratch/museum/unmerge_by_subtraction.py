"""A LoRA layer that merges itself in evaluation mode, and takes the change out again by subtracting it.

The fault is that of `loralib.Linear` (microsoft/LoRA at 0771c1e, `loralib/layers.py`): the sum W + s B A is rounded to
the dtype of the weight, and so is the difference, so that the frozen weight is another one after every evaluation. And
its `train` returns nothing, so that `layer.eval()` is None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FaultyMergingLinear(nn.Linear):
    """A frozen linear layer with a LoRA beside it, which is merged in evaluation mode."""

    def __init__(self, in_features: int, out_features: int, rank: int, scaling: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        self.requires_grad_(False)
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode and self.merged:
            self.weight.data -= self.scaling * (self.lora_B @ self.lora_A)
            self.merged = False
        elif not mode and not self.merged:
            self.weight.data += self.scaling * (self.lora_B @ self.lora_A)
            self.merged = True


class MergingLinear(nn.Linear):
    """A frozen linear layer with a LoRA beside it, which is merged in evaluation mode.

    - `train(False)`, and so `eval()`: the weight becomes W + s B A, in the dtype of W.
    - `train()`: the weight is W again, bit for bit, whatever has happened to A and B in the meantime.
    - A call that does not change the mode does not change the weight.
    - `train` returns the layer itself, as that of every module does, and so does `eval()`.
    - `weight` stays the same parameter; only its `.data` changes.
    - `W` is the frozen weight while the layer is merged, and None otherwise.

    `forward(x)` is W x + b + s B A x in both modes; in evaluation mode that is one product.

    Args:
        in_features, out_features: the sizes of W, (out, in), which is drawn as in `nn.Linear`.
        rank: r, of A (r, in) and B (out, r).
        scaling: s.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scaling: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        self.requires_grad_(False)
        self.scaling = scaling
        self.lora_A = nn.Parameter(torch.randn(rank, in_features) / in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        self.W: Tensor | None
        self.register_buffer("W", None, persistent=False)  # the frozen weight, while the layer is merged

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.W is not None else y + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)

    def train(self, mode: bool = True) -> MergingLinear:
        super().train(mode)
        if mode and self.W is not None:
            self.weight.data, self.W = self.W, None
        elif not mode and self.W is None:
            self.W = self.weight.data
            self.weight.data = self.W + self.scaling * (self.lora_B @ self.lora_A)
        return self


def test_merging_linear(MergingLinear: Callable[..., Any]) -> None:
    """A test of a `MergingLinear`, in the manner of pytest: an AssertionError if the layer does not do what it should.

    - A sound layer passes, however it is written.
    - A layer fails if its weight is not W + s B A in evaluation mode.
    - A layer fails if its weight is not W, bit for bit, when it is back in training mode; also if A and B have changed
      in the meantime.
    - A layer fails if a second `eval()` or a second `train()` changes its weight.
    - A layer fails if `eval()` or `train()` does not return the layer itself.

    Args:
        MergingLinear: a class with the arguments of the mended one. Its layers have `weight`, `bias`, `lora_A`,
            `lora_B` and `scaling`, and perhaps no other attributes. They start in training mode.
    """
    layer = MergingLinear(64, 48, rank=4, scaling=2.0)
    with torch.no_grad():
        layer.lora_B.normal_()  # with the B of the start, zero, merging would change nothing
    W = layer.weight.detach().clone()
    merged = W + (layer.scaling * layer.lora_B @ layer.lora_A).detach()
    evaluated = layer.eval()
    assert evaluated is layer, f"eval() returns {evaluated}"
    assert torch.allclose(layer.weight, merged, atol=1e-4), "eval() does not merge"
    layer.eval()
    assert torch.allclose(layer.weight, merged, atol=1e-4), "a second eval() changes the weight"
    with torch.no_grad():
        layer.lora_A.mul_(2)
    trained = layer.train()
    assert trained is layer, f"train() returns {trained}"
    assert torch.equal(layer.weight, W), "after an evaluation the weight is not W"
    layer.train()
    assert torch.equal(layer.weight, W), "a second train() changes the weight"
