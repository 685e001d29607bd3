"""The product of a batch in which every row may want another LoRA, of another rank, straight from the pool.

    y_i += s_k B_k A_k x_i        where k is the adapter of row i

A_k and s_k B_k are rows of the pool (`page_pool.py`), wherever there was room. Two ways to compute it:

**Gather**, for rows of one token, as in decoding. Each row of the batch meets few rows of the pool, those of its own
adapter, and `pool_rows.py` multiplies them where they are: `dot_products` gives A_k x_i, and `weighted_sums` multiplies
the result by s_k B_k. Nothing is copied and no rank is padded; the work of row i is that of its own rank. (BGMV of
Punica, Chen et al. 2023, arXiv:2310.18547; MBGMV of S-LoRA.)

**Segments**, for many consecutive rows of one adapter, as in a prompt: its A and B are copied out of the pool, and two
dense products do the rest (SGMV and MBGMM there). From `SEGMENT_FROM` rows on this is faster.

A DoRA has a third part, a row g of the pool as wide as the output: with it the base's output W x is changed by g W x
before the product is added (`adapter_reading.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_from_scratch.serving.pool_rows import dot_products, weighted_sums

# Rows of one adapter. On a CPU, with 32 rows and rank 8 in a layer from 768 to 2304, segments of 4 rows took 1.1 of the
# time of the gather, of 8 rows 0.7, and of 16 rows 0.5.
SEGMENT_FROM = 8


class PoolRows(NamedTuple):
    """Where the parts of one LoRA in one layer are: numbers of rows of the pool."""

    A: Tensor  # (r,), rows of width `in`
    B: Tensor  # (r,), rows of width `out`: the columns of s B
    gain: Tensor  # (1,), a row of width `out`: g of a DoRA; (0,) for a LoRA


LayerRows = Mapping[str, PoolRows]  # by the name of the layer


@dataclass(frozen=True)
class LayerPlan:
    """Which rows of a batch meet which rows of the pool in one layer."""

    gathered: tuple[Tensor, Tensor, Tensor] | None  # for the first n rows: the ends of their lists, and rows of A and B
    segments: Sequence[tuple[slice, PoolRows]]
    gains: tuple[Tensor, Tensor] | None  # rows of the batch, and for each of them the row of the pool that is its g


def plan_layer(
    gathered: Sequence[LayerRows | None],
    segments: Sequence[tuple[slice, LayerRows]],
    layer: str,
) -> LayerPlan | None:
    """The plan of one layer; None: no adapter of the batch changes it.

    Args:
        gathered: the adapters of the first n rows of the batch; None: none.
        segments: the other rows that have an adapter.
        layer: its name.
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
    """y_i += s_k B_k A_k x_i, in place.

    Args:
        y: (N, out), the base's output.
        x: (N, in).
        pool: the whole pool, any shape.
        plan: for these N rows.
        bias: (out,) of the base, which a DoRA does not scale.
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
