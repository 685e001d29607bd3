"""Unit 01, rank: mistakes that people make, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.rank import row_echelon


@right("row_echelon")
def row_by_row_in_numpy(matrix: Tensor, tolerance: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    M = matrix.numpy().astype(np.float64)
    m, n = M.shape
    order = np.arange(n)
    if tolerance is None:
        tolerance = max(m, n) * torch.finfo(matrix.dtype).eps * np.abs(M).max()
    for k in range(min(m, n)):
        i, j = np.unravel_index(np.abs(M[k:, k:]).argmax(), M[k:, k:].shape)
        i, j = i + k, j + k
        if abs(M[i, j]) <= tolerance:
            M[k:] = 0
            break
        M[[k, i]] = M[[i, k]]
        M[:, [k, j]] = M[:, [j, k]]
        order[[k, j]] = order[[j, k]]
        for row in range(k + 1, m):
            M[row] -= M[row, k] / M[k, k] * M[k]
            M[row, k] = 0
    return M, order


@wrong("row_echelon", "You swap rows, but never columns: the largest entry may stand in another column.")
def swaps_rows_only(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    M = matrix.clone()
    m, n = M.shape
    for k in range(min(m, n)):
        row = k + int(M[k:, k].abs().argmax())
        if M[row, k].abs() <= 1e-12:
            continue
        M[[k, row]] = M[[row, k]]
        M[k + 1 :] -= torch.outer(M[k + 1 :, k] / M[k, k], M[k])
        M[k + 1 :, k] = 0
    return M, torch.arange(n)


@wrong("row_echelon", caught_by="changes its input")
def works_in_the_callers_matrix(matrix: Tensor, tolerance: float | None = None) -> tuple[Tensor, Tensor]:
    echelon, columns = row_echelon(matrix, tolerance)
    matrix.copy_(echelon)
    return matrix, columns
