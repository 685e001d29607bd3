"""The LoRA product of a batch in which every row may use a different adapter, with a different rank.

    y_i += s_k B_k A_k x_i        where k is the adapter of row i

A_k and s_k B_k are rows of the pool (`page_pool.py`), not necessarily consecutive. There are two ways to compute this:

**Gather**, for rows of one token, as in decoding. Each row of the batch needs only the few rows of the pool that belong
to its adapter, and `pool_rows.py` multiplies them in place: `dot_products` computes A_k x_i, and `weighted_sums`
multiplies the result by s_k B_k. Nothing is copied or padded, and the work for row i depends only on the rank of its
own adapter. (BGMV of Punica, Chen et al. 2023, arXiv:2310.18547; MBGMV of S-LoRA.)

**Segments**, for many consecutive rows with the same adapter, as in a prompt: A and B are copied out of the pool, and
two dense products are computed (SGMV and MBGMM there). This is faster from `SEGMENT_FROM` rows on.

DoRA has a third part, a row g of the pool that is as wide as the output: g W x is added to the base's output W x before
the product is added (`adapter_reading.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_from_scratch.serving.pool_rows import dot_products, weighted_sums

# The minimum number of rows with the same adapter. On a CPU, with 32 rows and rank 8 in a layer from 768 to 2304,
# segments of 4 rows took 1.1 times as long as the gather, segments of 8 rows 0.7 times, and of 16 rows 0.5 times.
SEGMENT_FROM = 8


class PoolRows(NamedTuple):
    """The indices of the pool's rows that hold one LoRA in one layer."""

    A: Tensor  # (r,), rows of width `in`
    B: Tensor  # (r,), rows of width `out`: the columns of s B
    gain: Tensor  # (1,), a row of width `out`: g of DoRA; (0,) for LoRA


LayerRows = Mapping[str, PoolRows]  # layer name -> rows


@dataclass(frozen=True)
class LayerPlan:
    """Which rows of the pool each row of a batch is multiplied by, in one layer."""

    gathered: tuple[Tensor, Tensor, Tensor] | None  # for the first n rows: the ends of their lists, and rows of A and B
    segments: Sequence[tuple[slice, PoolRows]]
    gains: tuple[Tensor, Tensor] | None  # rows of the batch with DoRA, and for each the row of the pool with its g


def plan_layer(
    gathered: Sequence[LayerRows | None],
    segments: Sequence[tuple[slice, LayerRows]],
    layer: str,
) -> LayerPlan | None:
    """The plan for one layer, or None if no adapter in the batch changes it.

    Args:
        gathered: the adapter of each of the first n rows of the batch; None for a row without an adapter.
        segments: slices of the other rows that have an adapter, each with its adapter.
        layer: the name of the layer.
    """
    own = [rows.get(layer) if rows is not None else None for rows in gathered]
    present = [rows for rows in own if rows is not None]
    here = [(rows, adapter[layer]) for rows, adapter in segments if layer in adapter]
    gains = _plan_gains(own, here)
    if not present:
        return LayerPlan(None, here, gains) if here else None
    ends = [0]
    for rows in own:
        ends.append(ends[-1] + (len(rows.A) if rows is not None else 0))
    A, B = torch.cat([rows.A for rows in present]), torch.cat([rows.B for rows in present])
    return LayerPlan((torch.tensor(ends, device=A.device), A, B), here, gains)


def _plan_gains(
    own: Sequence[PoolRows | None], segments: Sequence[tuple[slice, PoolRows]]
) -> tuple[Tensor, Tensor] | None:
    numbers = [(row, rows.gain) for row, rows in enumerate(own) if rows is not None and len(rows.gain)]
    for place, rows in segments:
        if len(rows.gain):
            numbers += [(row, rows.gain) for row in range(place.start, place.stop)]
    if not numbers:
        return None
    gains = torch.cat([gain for _, gain in numbers])
    return torch.tensor([row for row, _ in numbers], device=gains.device), gains


def add_lora_(y: Tensor, x: Tensor, pool: Tensor, plan: LayerPlan, bias: Tensor | None = None) -> None:
    """Compute y_i += s_k B_k A_k x_i in place.

    Args:
        y: (N, out), the base layer's output.
        x: (N, in).
        pool: the whole pool, of any shape.
        plan: the plan for these N rows.
        bias: (out,), the base layer's bias, which DoRA does not scale.
    """
    A_rows, B_rows = pool.view(-1, x.shape[1]), pool.view(-1, y.shape[1])
    if plan.gains is not None:
        rows, gains = plan.gains
        own = y[rows]
        y[rows] = own + B_rows.index_select(0, gains) * (own if bias is None else own - bias)
    if plan.gathered is not None:
        ends, A, B = plan.gathered
        n = len(ends) - 1
        y[:n] += weighted_sums(dot_products(x[:n], A_rows, ends, A), B_rows, ends, B)
    for place, (A, B, _) in plan.segments:
        y[place].addmm_(x[place] @ A_rows.index_select(0, A).T, B_rows.index_select(0, B))
