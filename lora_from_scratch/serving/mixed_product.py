"""The product of a batch in which every row may want another LoRA, of another rank, straight from the pool.

    y_i += s_k B_k A_k x_i        where k is the adapter of row i

A_k and s_k B_k are rows of the pool (`page_pool.py`), wherever there was room. Two ways to compute it:

**Gather**, for rows of one token, as in decoding. Each row of the batch meets few rows of the pool: those of its
adapter. So the numbers A_k x_i of all rows are a sparse matrix, with one row per row of the batch, one column per row
of the pool, and r_k entries in row i. The shrink computes just these entries of x P^T, and the expand multiplies this
sparse matrix by the pool:

    H = (x P^T) at the entries of the pattern        sampled dense-dense product (SDDMM)
    y = y + H' P                                      sparse-dense product; H' has the entries of H at the rows of B

No matrix is copied and no rank is padded; the work of row i is that of its own rank. (This is BGMV of Punica, Chen et
al. 2023, arXiv:2310.18547, and MBGMV of S-LoRA, with the kernels for sparse matrices that PyTorch has on every device.)

**Segments**, for many consecutive rows of one adapter, as in a prompt: its A and B are copied out of the pool, and two
dense products do the rest (SGMV and MBGMM there). From `SEGMENT_FROM` rows on this is faster.

A DoRA has a third part, a row g of the pool as wide as the output: with it the base's output W x is changed by g W x
before the product is added (`adapter_reading.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SEGMENT_FROM = 8  # rows of one adapter; for fewer the gather is faster (`benchmarks/serving.py`)


class PoolRows(NamedTuple):
    """Where the parts of one LoRA in one layer are: numbers of rows of the pool."""

    A: Tensor  # (r,), rows of width `in`
    B: Tensor  # (r,), rows of width `out`: the columns of s B
    gain: Tensor  # (1,), a row of width `out`: g of a DoRA; (0,) for a LoRA


LayerRows = Mapping[str, PoolRows]  # by the name of the layer


@dataclass(frozen=True)
class LayerPlan:
    """Which rows of a batch meet which rows of the pool in one layer."""

    pattern: Tensor | None  # sparse (n, rows of width `in`): the entries of H, for the first n rows of the batch
    columns: Tensor | None  # (entries,) the rows of width `out` that they are multiplied by
    segments: Sequence[tuple[slice, PoolRows]]
    gains: tuple[Tensor, Tensor] | None  # rows of the batch, and for each of them the row of the pool that is its g


def plan_layer(
    gathered: Sequence[LayerRows | None],
    segments: Sequence[tuple[slice, LayerRows]],
    layer: str,
    pool: Tensor,
    inputs: int,
) -> LayerPlan | None:
    """The plan of one layer; None: no adapter of the batch changes it.

    Args:
        gathered: the adapters of the first n rows of the batch; None: none.
        segments: the other rows that have an adapter.
        layer: its name.
        pool: the whole pool.
        inputs: the width of the layer's input.
    """
    own = [rows.get(layer) if rows is not None else None for rows in gathered]
    present = [rows for rows in own if rows is not None]
    here = [(rows, adapter[layer]) for rows, adapter in segments if layer in adapter]
    gains = _plan_gains(own, here)
    if not present:
        return LayerPlan(None, None, here, gains) if here else None
    ends = [0]
    for rows in own:
        ends.append(ends[-1] + (len(rows.A) if rows is not None else 0))
    columns = torch.cat([rows.A for rows in present])
    ends_there = torch.tensor(ends, device=pool.device)
    pattern = sparse(ends_there, columns, pool.new_zeros(ends[-1]), pool.numel() // inputs)
    return LayerPlan(pattern, torch.cat([rows.B for rows in present]), here, gains)


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
    if plan.pattern is not None:
        n = len(plan.pattern)
        H = torch.sparse.sampled_addmm(plan.pattern, x[:n], A_rows.T, beta=0.0)
        H = sparse(H.crow_indices(), plan.columns, H.values(), len(B_rows))
        y[:n] = torch.addmm(y[:n], H, B_rows)
    for place, (A, B, _) in plan.segments:
        y[place].addmm_(x[place] @ A_rows.index_select(0, A).T, B_rows.index_select(0, B))


def sparse(ends: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """A sparse (rows, width) matrix, stored row by row: row i has the entries from `ends[i]` to `ends[i + 1]`."""
    return torch.sparse_csr_tensor(ends, columns, values, (len(ends) - 1, width), check_invariants=False)


with warnings.catch_warnings():  # PyTorch warns once that its sparse tensors are in beta
    warnings.simplefilter("ignore")
    sparse(torch.zeros(1, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0), 0)
