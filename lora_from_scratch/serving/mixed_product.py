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
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PoolRows = tuple[Tensor, Tensor]  # of one LoRA in one layer: the rows of the pool that are A, and those that are s B^T
LayerRows = Mapping[str, PoolRows]  # by the name of the layer

SEGMENT_FROM = 8  # rows of one adapter; for fewer the gather is faster (`benchmarks/serving.py`)


@dataclass(frozen=True)
class LayerPlan:
    """Which rows of a batch meet which rows of the pool in one layer."""

    pattern: Tensor | None  # sparse (n, rows of width `in`): the entries of H, for the first n rows of the batch
    columns: Tensor | None  # (entries,) the rows of width `out` that they are multiplied by
    segments: Sequence[tuple[slice, PoolRows]]


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
    if not present:
        return LayerPlan(None, None, here) if here else None
    ends = [0]
    for rows in own:
        ends.append(ends[-1] + (len(rows[0]) if rows is not None else 0))
    columns = torch.cat([A for A, _ in present])
    pattern = sparse(torch.tensor(ends, device=pool.device), columns, pool.new_zeros(ends[-1]), pool.numel() // inputs)
    return LayerPlan(pattern, torch.cat([B for _, B in present]), here)


def add_lora_(y: Tensor, x: Tensor, pool: Tensor, plan: LayerPlan) -> None:
    """y_i += s_k B_k A_k x_i, in place.

    Args:
        y: (N, out), the base's output.
        x: (N, in).
        pool: the whole pool, any shape.
        plan: for these N rows.
    """
    A_rows, B_rows = pool.view(-1, x.shape[1]), pool.view(-1, y.shape[1])
    if plan.pattern is not None:
        n = len(plan.pattern)
        H = torch.sparse.sampled_addmm(plan.pattern, x[:n], A_rows.T, beta=0.0)
        H = sparse(H.crow_indices(), plan.columns, H.values(), len(B_rows))
        y[:n] = torch.addmm(y[:n], H, B_rows)
    for rows, (A, B) in plan.segments:
        y[rows].addmm_(x[rows] @ A_rows.index_select(0, A).T, B_rows.index_select(0, B))


def sparse(ends: Tensor, columns: Tensor, values: Tensor, width: int) -> Tensor:
    """A sparse (rows, width) matrix, stored row by row: row i has the entries from `ends[i]` to `ends[i + 1]`."""
    return torch.sparse_csr_tensor(ends, columns, values, (len(ends) - 1, width), check_invariants=False)


with warnings.catch_warnings():  # PyTorch warns once that its sparse tensors are in beta
    warnings.simplefilter("ignore")
    sparse(torch.zeros(1, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0), 0)
