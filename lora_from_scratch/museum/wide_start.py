"""A LoRA layer that stores A the other way round, so that A starts several times too wide.

The fault is that of rasbt/LLMs-from-scratch (28c65cd, appendix E): A is stored as (in, r), and `kaiming_uniform_` takes
the second axis of a matrix for its number of inputs. The bound is 1/sqrt(r) then, instead of 1/sqrt(in). The layer
starts as the base model and trains, but with another best learning rate, which also depends on r and on the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FaultyLoRALayer(nn.Module):
    """The low-rank path of LoRA, alpha / r x A B: the change that is added to the output of a frozen layer."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scaling = alpha / rank
        self.A = nn.Parameter(torch.empty(in_features, rank))
        self.B = nn.Parameter(torch.zeros(rank, out_features))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # uniform between -1/sqrt(in) and 1/sqrt(in), as in nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * (x @ self.A @ self.B)


def test_lora_start(LoRALayer: Callable[..., Any]) -> None:
    """A test of how a `LoRALayer` starts, in the manner of pytest: an AssertionError if it starts in a wrong way.

    - A sound layer passes: its B is zero, and the entries of its A have the standard deviation 1 / sqrt(3 in), as
      uniform numbers between -1/sqrt(in) and 1/sqrt(in) do. It passes whichever way round it stores A and B, and
      whichever distribution the numbers come from.
    - A layer fails if its A is wider or narrower, by a factor of 1.4 or more.
    - A layer fails if the width of its A is right for some layers only: it depends on something else than in.
    - A layer fails if its B is not zero.

    Args:
        LoRALayer: a class that is made as `LoRALayer(in_features, out_features, rank, alpha)`. It has `A` and `B`, and
            you may use nothing else of it. Its random numbers come from PyTorch's own generator.
    """
    torch.manual_seed(0)
    for in_features, out_features, rank in ((2000, 30, 4), (300, 500, 25)):
        layer = LoRALayer(in_features, out_features, rank, 16)
        width = layer.A.std().item() * math.sqrt(3 * in_features)
        assert 0.8 < width < 1.25, f"A is {width:.1f} times as wide as it should be, with {in_features} inputs"
        assert not layer.B.any(), "B is not zero"
