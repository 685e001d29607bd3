"""LoReFT with dropout on the edited hidden state, that is, on the residual stream itself instead of on the edit.

The fault is that of stanfordnlp/pyreft (dafd099, `pyreft/interventions.py`) and of adapter-hub/adapters (88f18eb): what
an intervention returns, h and the change together, goes through the dropout. In training, entries of the hidden state
that the frozen blocks rely on become zero, and the others grow; in evaluation nothing is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FaultyEdit(nn.Module):
    """LoReFT's edit of hidden states, with dropout in training."""

    def __init__(self, width: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.empty(rank, width))
        self.W = nn.Parameter(torch.empty(rank, width))
        self.b = nn.Parameter(torch.zeros(rank))
        nn.init.orthogonal_(self.R)
        nn.init.normal_(self.W, std=width**-0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        z = h @ self.W.T + self.b - h @ self.R.T
        return self.dropout(h + z @ self.R)


class Edit(FaultyEdit):
    """The same without the fault: only the change is dropped, so a change of zero leaves h as it is."""

    def forward(self, h: Tensor) -> Tensor:
        z = h @ self.W.T + self.b - h @ self.R.T
        return h + self.dropout(z @ self.R)


def test_edit(Edit: Callable[..., Any]) -> None:
    """A test of an `Edit`, in the manner of pytest: an AssertionError if it does not do what it should.

    - A sound edit passes, whatever its dropout acts on: the entries of the change, its r coordinates, the change of a
      whole token, or the h that W and R are applied to.
    - An edit fails if it does not compute h + R^T (W h + b - R h) in evaluation mode.
    - An edit fails if nothing is dropped in training mode: two calls give the same.
    - An edit fails if its mean over many draws in training mode is not its result in evaluation mode.
    - An edit fails if it changes h in training mode although W h + b - R h is zero, because W = R and b = 0.
    - An edit fails if it writes into the h that it was given.

    Args:
        Edit: a class that is made as `Edit(width, rank, dropout)`. It has R (r, d), whose rows are orthonormal, W (r,
            d) and b (r,), which are parameters that you may set, and a `forward(h)` for h (..., d). It starts in
            training mode.
    """
    torch.manual_seed(0)
    edit, x = Edit(6, 2, 0.5), torch.randn(6)
    with torch.no_grad():
        edit.b.normal_()
        change = (edit.W @ x + edit.b - edit.R @ x) @ edit.R
        given = x.repeat(4000, 1)  # many draws in one call
        draws = edit(given)
        intact = torch.equal(given, x.repeat(4000, 1))
        assert intact, "the given h has changed"
        assert (draws != draws[0]).any(), "nothing is dropped in training mode"
        error = (draws.mean(dim=0) - x - change).norm() / change.norm()
        assert error < 0.2, "the mean in training mode is not the result in evaluation mode"
        off = (edit.eval()(x[None]) - x - change).norm() / change.norm()
        assert off < 0.01, "another result than h + R^T (W h + b - R h) in evaluation mode"
        edit.train()
        edit.W.copy_(edit.R)
        edit.b.zero_()
        kept = torch.allclose(edit(x.repeat(100, 1)), x, atol=1e-5)
        assert kept, "a change of zero changes h in training mode"
