"""The two products of `mixed_product.py`, written to be read: with a gather for few rows, with segments for many.

    y_i = s_k B_k A_k x_i        where k is the adapter of row i, of rank r_k

Both are in use on GPUs: the gather as BGMV (Punica, Chen et al. 2023, arXiv:2310.18547) and, for ranks that differ, as
MBGMV (S-LoRA, Sheng et al. 2023, arXiv:2311.03285); the segments as SGMV (Punica). `mixed_product.py` computes the same
with PyTorch's sparse kernels, and without copying the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_product(x: Tensor, A: Tensor, B: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """The LoRA product of a batch whose rows have adapters of different ranks: y_i = sum of (A_p . x_i) B_p.

    A and B hold the factors of all adapters in numbered cells: a cell p consists of the rows A_p and B_p. An adapter of
    rank r has r cells, which may be anywhere. The sum for row i is over the cells p of its own adapter, which are
    `tables[i]`. Two rows may have the same adapter. Other cells may contain anything, even NaN.

    Args:
        x: (n, in).
        A: (cells, in): the rows of the A of all adapters.
        B: (cells, out): the columns of their s B, as rows. They contain the scaling already.
        tables: the cells of each row's adapter, n tensors of integers. An empty one: no adapter, and y_i is zero.

    Returns:
        (n, out).
    """
    ranks = torch.tensor([len(table) for table in tables])
    row = torch.arange(len(x)).repeat_interleave(ranks)  # (entries,): the row of x that each entry belongs to
    cell = torch.cat(list(tables))  # (entries,)
    h = (x[row] * A[cell]).sum(dim=1)  # (entries,)
    y = x.new_zeros(len(x), B.shape[1])
    return y.index_add(0, row, h[:, None] * B[cell])


def segment_product(x: Tensor, adapters: Sequence[tuple[Tensor, Tensor, float]], adapter_index: Tensor) -> Tensor:
    """The LoRA product of a batch in which many rows have the same adapter: y_i = s_k B_k A_k x_i.

    Rows with the same adapter are multiplied together, wherever they are in the batch. So there are at most two matrix
    products for each adapter that occurs in the batch, however many rows it has, and none for other adapters. With few
    rows, no intermediate result has as many numbers as the layer's weight, (out, in).

    Args:
        x: (n, in).
        adapters: (A_k, B_k, s_k) of each adapter, A_k (r_k, in) and B_k (out, r_k). Their ranks r_k may differ.
        adapter_index: (n,), the number k of each row's adapter, counted from 0. -1: no adapter, and y_i is zero.

    Returns:
        (n, out).
    """
    y = x.new_zeros(len(x), adapters[0][1].shape[0])
    for k in adapter_index.unique().tolist():
        if k >= 0:
            A, B, scaling = adapters[k]
            own = adapter_index == k
            y[own] = scaling * (x[own] @ A.T @ B.T)
    return y
