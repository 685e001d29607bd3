"""Two products of a batch with selected rows of a large matrix, which are read in place.

Each row x_i of the batch has its own list of rows p of the matrix P. The lists may have different lengths. They are
concatenated in `columns`; the list of row i extends from `ends[i]` to `ends[i + 1]`, as in a sparse matrix in CSR
format. Then

    dot_products     h = x_i . P_p          one number for each entry of the lists
    weighted_sums    y_i = sum of h P_p     over the entries of row i

are the two halves of a LoRA (x A^T and h B^T, `mixed_product.py`) and of attention (q K^T and the weights times V,
`paged_model.py`). No row of P is copied, and no list is padded.

Both use PyTorch's kernels: those for sparse matrices (sampled dense-dense product, SDDMM) and for embedding bags.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F


def dot_products(x: Tensor, rows: Tensor, ends: Tensor, columns: Tensor) -> Tensor:
    """x_i . P_p for each entry p of the list of row i.

    Args:
        x: (n, width).
        rows: P, (R, width), contiguous.
        ends: (n + 1,), from 0 to the number of entries.
        columns: (entries,), indices of rows of P.

    Returns:
        (entries,).
    """
    size = len(x), len(rows)
    pattern = torch.sparse_csr_tensor(ends, columns, x.new_zeros(len(columns)), size, check_invariants=False)
    products: Tensor = torch.sparse.sampled_addmm(pattern, x, rows.T, beta=0.0)
    return products.values()


def weighted_sums(weights: Tensor, rows: Tensor, ends: Tensor, columns: Tensor) -> Tensor:
    """The sum of the rows in the list of row i, each multiplied by its weight.

    Args:
        weights: (entries,).
        rows, ends, columns: as for `dot_products`.

    Returns:
        (n, width). The result for an empty list is zero.
    """
    return F.embedding_bag(columns, rows, ends, mode="sum", per_sample_weights=weights, include_last_offset=True)


with warnings.catch_warnings():  # PyTorch warns once that its sparse tensors are in beta
    warnings.simplefilter("ignore")
    dot_products(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([0, 1]), torch.tensor([0]))
