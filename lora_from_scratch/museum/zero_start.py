"""A ReLoRA layer whose A is zero while its B is zero, so that the whole first cycle trains nothing.

The fault is that of Guitaricet/relora (176f376, `peft_pretraining/relora.py`; issue 18, open since 2024): to start as
the pretrained model, the constructor sets A to zero, but B is zero already. The gradient of each factor is a product
with the other one, so both gradients are exactly zero until the first restart draws A anew. The authors' script trains
embeddings and normalisation in full beside the LoRA, so its loss falls all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FaultyReLoRALayer(nn.Module):
    """A frozen linear layer that is trained by ReLoRA: y = W x + s B A x."""

    W: Tensor

    def __init__(self, W: Tensor, rank: int, scaling: float = 1.0) -> None:
        super().__init__()
        out_features, in_features = W.shape
        self.scaling = scaling
        self.register_buffer("W", W.clone())
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)
        # At the start the layer has to compute exactly what W computes, so there must not be an update yet.
        nn.init.zeros_(self.A)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W.T + self.scaling * (x @ self.A.T @ self.B.T)

    @torch.no_grad()
    def restart(self) -> None:
        self.W.addmm_(self.B, self.A, alpha=self.scaling)
        bound = self.W.shape[1] ** -0.5
        self.A.uniform_(-bound, bound)
        self.B.zero_()


class ReLoRALayer(nn.Module):
    """A frozen linear layer that is trained by ReLoRA: y = W x + s B A x (Lialin et al. 2023, arXiv:2307.05695).

    A new layer computes W x. Its first gradient is not zero, so not both of A and B start at zero. The random numbers
    of the start are drawn anew for every layer, from PyTorch's own generator; how they are distributed is up to you.

    Args:
        W: (out, in), the pretrained weight. The layer has a copy of its own.
        rank: r.
        scaling: s.

    Attributes:
        W: a buffer, (out, in): it gets no gradient, and it is in the layer's `state_dict`.
        A: a parameter, (r, in).
        B: a parameter, (out, r).
    """

    W: Tensor

    def __init__(self, W: Tensor, rank: int, scaling: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("W", W.detach().clone())
        self.scaling = scaling
        self.A = nn.Parameter(torch.empty(rank, W.shape[1]))
        self.B = nn.Parameter(torch.empty(W.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W.T + self.scaling * (x @ self.A.T @ self.B.T)

    @torch.no_grad()
    def restart(self) -> None:
        """End a cycle (algorithm 1): W becomes W + s B A, and A and B start again as in a new layer.

        So what the layer computes stays the same. The random numbers of the new start are others than before. W, A and
        B are changed in place: an optimiser holds A and B. No gradient is recorded.
        """
        self.W += self.scaling * (self.B @ self.A)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)


def test_relora_layer(ReLoRALayer: Callable[..., Any]) -> None:
    """A test of a `ReLoRALayer`, in the manner of pytest: an AssertionError if the layer does not do what it should.

    - A sound layer passes, however its random numbers are drawn, and whichever of A and B starts at zero. It also
      passes if only one of the two is trained.
    - A layer fails if it does not compute W x at the start.
    - A layer fails if no gradient reaches A or B at the start: all of them are zero or None.
    - A layer fails if a restart changes what it computes, with a scaling other than 1 too.
    - A layer fails if no gradient reaches A or B after a restart.
    - A layer fails if A or B is the same after a restart as before.

    Args:
        ReLoRALayer: a class that is made as `ReLoRALayer(W, rank, scaling)`. It has `W`, `A`, `B`, `restart()` and a
            `forward`, and you may use nothing else of it.
    """
    torch.manual_seed(0)
    W, x = torch.randn(6, 5), torch.randn(4, 5)

    def learns(layer: Any) -> bool:
        layer.zero_grad()
        layer(x).square().sum().backward()
        return any(factor.grad is not None and bool(factor.grad.any()) for factor in (layer.A, layer.B))

    layer = ReLoRALayer(W, 2, 0.5)
    unchanged = torch.allclose(layer(x), x @ W.T, atol=1e-5)
    assert unchanged, "a new layer does not compute W x"
    moving = learns(layer)
    assert moving, "no gradient reaches A or B at the start"
    with torch.no_grad():  # as after some steps
        layer.A.normal_()
        layer.B.normal_()
        before, A, B = layer(x), layer.A.clone(), layer.B.clone()
    layer.restart()
    kept = torch.allclose(layer(x), before, atol=1e-4)
    assert kept, "a restart changes what the layer computes"
    again = learns(layer)
    assert again, "no gradient reaches A or B after a restart"
    new = not torch.equal(layer.A, A) and not torch.equal(layer.B, B)
    assert new, "A or B is the same after a restart"
