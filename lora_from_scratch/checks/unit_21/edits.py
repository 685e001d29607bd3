"""Unit 21: edits with dropout on which the learner's test is tried, sound ones and faulty ones.

They use nothing of the exercises, whose solutions are missing where submissions are graded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OnTheChange(nn.Module):
    """A sound edit. The others change one thing."""

    def __init__(self, width: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.p = dropout
        rows = torch.linalg.qr(torch.randn(width, rank)).Q.T
        self.R = nn.Parameter(rows.contiguous())
        self.W = nn.Parameter(torch.randn(rank, width) * width**-0.5)
        self.b = nn.Parameter(torch.zeros(rank))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)

    def coordinates(self, h: Tensor) -> Tensor:
        """W h + b - R h."""
        return h @ self.W.T + self.b - h @ self.R.T

    def change(self, h: Tensor) -> Tensor:
        return self.coordinates(h) @ self.R

    def forward(self, h: Tensor) -> Tensor:
        return h + self.drop(self.change(h))


class OnTheCoordinates(OnTheChange):
    def forward(self, h: Tensor) -> Tensor:
        return h + self.drop(self.coordinates(h)) @ self.R


class OnWholeTokens(OnTheChange):
    def forward(self, h: Tensor) -> Tensor:
        return h + self.drop(torch.ones_like(h[..., :1])) * self.change(h)


class OnWhatIsRead(OnTheChange):
    """W and R are applied to the same dropped h."""

    def forward(self, h: Tensor) -> Tensor:
        return h + self.change(self.drop(h))


class OnEverything(OnTheChange):
    """The fault of the museum."""

    def forward(self, h: Tensor) -> Tensor:
        return self.drop(h + self.change(h))


class OnTheStream(OnTheChange):
    def forward(self, h: Tensor) -> Tensor:
        return self.drop(h) + self.change(h)


class OnWhatWReads(OnTheChange):
    def forward(self, h: Tensor) -> Tensor:
        return h + (self.drop(h) @ self.W.T + self.b - h @ self.R.T) @ self.R


class NeverDropped(OnTheChange):
    def drop(self, x: Tensor) -> Tensor:
        return x


class AlwaysDropped(OnTheChange):
    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, True)


class NotRescaled(OnTheChange):
    def drop(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) >= self.p) if self.training else x


class RescaledInEvaluation(OnTheChange):
    """As dropout was first described: nothing is rescaled in training, and everything in evaluation."""

    def drop(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) >= self.p) if self.training else x * (1 - self.p)


class RescaledTwice(OnTheChange):
    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training) / (1 - self.p if self.training else 1)


class WithoutTheDifference(OnTheChange):
    """DiReFT's formula."""

    def coordinates(self, h: Tensor) -> Tensor:
        return h @ self.W.T + self.b


class WithoutTheBias(OnTheChange):
    def coordinates(self, h: Tensor) -> Tensor:
        return h @ (self.W - self.R).T


class InPlace(OnTheChange):
    def forward(self, h: Tensor) -> Tensor:
        change = self.drop(self.change(h))
        h.data += change
        return h


SOUND: dict[str, type[nn.Module]] = {
    "the entries of the change are dropped": OnTheChange,
    "the r coordinates of the change are dropped": OnTheCoordinates,
    "the changes of whole tokens are dropped": OnWholeTokens,
    "the h that W and R are applied to is dropped": OnWhatIsRead,
}
FAULTY: dict[str, type[nn.Module]] = {
    "dropout on h and the change together": OnEverything,
    "dropout on h alone": OnTheStream,
    "W is applied to a dropped h, and R to the whole": OnWhatWReads,
    "nothing is ever dropped": NeverDropped,
    "dropout in evaluation mode too": AlwaysDropped,
    "what is kept is not rescaled": NotRescaled,
    "what is kept is rescaled in evaluation mode, not in training": RescaledInEvaluation,
    "what is kept is rescaled twice": RescaledTwice,
    "R h is not subtracted": WithoutTheDifference,
    "b is left out": WithoutTheBias,
    "the change is written into the given h": InPlace,
}
EDITS = SOUND | FAULTY
