"""What a classifier has forgotten, picture by picture."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def forgotten(before: Tensor, after: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The share of what a classifier knew that it no longer knows, for each class.

    A picture was known if it was classified correctly before the fine-tuning. It is forgotten if it was known and is
    now classified wrongly. A picture that was not known before does not count, whatever it is classified as now.

    Args:
        before: the predicted class of each picture before the fine-tuning (N,).
        after: the predicted class of each picture after it (N,).
        labels: the right class of each picture (N,), integers from 0 to `classes` - 1.
        classes: C, the number of classes.

    Returns:
        (C,): for each class, the number of its forgotten pictures, divided by the number of its known ones. NaN for a
            class of which no picture was known.
    """
    known = before == labels
    lost = known & (after != labels)
    of_class = F.one_hot(labels, classes).float()  # (N, C)
    return torch.einsum("n,nc->c", lost.float(), of_class) / torch.einsum("n,nc->c", known.float(), of_class)
