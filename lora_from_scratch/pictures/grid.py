"""Draw several pictures in a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.support.plotting import styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def picture_grid(axes: Axes, pictures: Tensor, columns: int, *, title: str = "") -> None:
    """Draw pictures (N, H, W) with values from 0, white, to 1, black, in rows of so many, with grey frames."""
    missing = pictures.new_zeros(-len(pictures) % columns, *pictures.shape[1:])  # to fill the last row
    framed = F.pad(torch.cat([pictures, missing]), (1, 1, 1, 1), value=0.5)
    rows = framed.unflatten(0, (-1, columns)).transpose(1, 2).flatten(2).flatten(0, 1)  # (rows * H, columns * W)
    axes.imshow(rows.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_axis_off()
    axes.set_title(title)
