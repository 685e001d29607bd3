"""Unit 09, LoRA on parts of a fused matrix: mistakes that people make, and other right ways."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong

# --- block_diagonal_B -----------------------------------------------------------------------------


@right("block_diagonal_B")
def slices_of_zeros(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    r, width = B.shape[1], len(B) // len(parts)
    whole = torch.zeros(len(all_parts) * width, len(parts) * r, dtype=B.dtype, device=B.device)
    for i, part in enumerate(parts):
        row = all_parts.index(part) * width
        whole[row : row + width, i * r : (i + 1) * r] = B[i * width : (i + 1) * width]
    return whole


@right("block_diagonal_B")
def a_mask_on_repeated_columns(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    n, r, width = len(parts), B.shape[1], len(B) // len(parts)
    mask = torch.eye(n).to(B).repeat_interleave(width, 0).repeat_interleave(r, 1)
    stacked = B.repeat(1, n) * mask
    select = torch.zeros(len(all_parts), n)
    for i, part in enumerate(parts):
        select[all_parts.index(part), i] = 1
    return torch.kron(select, torch.eye(width)).to(B) @ stacked


@right("block_diagonal_B")
def rows_of_padded_pieces(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    n, (height, r) = len(parts), B.shape
    pieces, rows = B.reshape(n, height // n, r), []
    for part in all_parts:
        if part not in parts:
            rows.append(B.new_zeros(height // n, n * r))
            continue
        i = parts.index(part)
        rows.append(F.pad(pieces[i], (i * r, (n - 1 - i) * r)))
    return torch.vstack(rows)


@right("block_diagonal_B")
def an_einsum_over_parts(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    n, r = len(parts), B.shape[1]
    place = torch.tensor([[float(one == part) for part in parts] for one in all_parts]).to(B)  # (parts in all, n)
    whole = torch.einsum("mi,iwr,ij->mwjr", place, B.reshape(n, -1, r), torch.eye(n).to(B))
    return whole.reshape(-1, n * r)


@right("block_diagonal_B")
def scattered_by_index(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    n, r, width = len(parts), B.shape[1], len(B) // len(parts)
    starts = torch.tensor([all_parts.index(part) * width for part in parts], device=B.device)
    rows = (starts[:, None] + torch.arange(width, device=B.device)).reshape(-1, 1).expand(-1, r)
    columns = torch.arange(n * r, device=B.device).reshape(n, 1, r).expand(-1, width, -1).reshape(-1, r)
    whole = torch.zeros((len(all_parts) * width, n * r), dtype=B.dtype, device=B.device)
    return whole.index_put((rows, columns), B)


def placed(B: Tensor, parts, all_parts, rows=None, columns=None) -> Tensor:
    """Block i in the rows of part rows[i], and in the columns of place columns[i]."""
    r, n = B.shape[1], len(parts)
    width = len(B) // n
    rows = [all_parts.index(part) for part in parts] if rows is None else rows
    whole = torch.zeros(len(all_parts) * width, n * r, dtype=B.dtype, device=B.device)
    for i, block in enumerate(B.split(width)):
        column = i if columns is None else columns[i]
        whole[rows[i] * width : (rows[i] + 1) * width, column * r : (column + 1) * r] = block
    return whole


@wrong(
    "block_diagonal_B",
    "Your blocks are below each other in the same columns, so the parts share one h. But each part has its own A, and "
    "may read only the r columns of h that its own A computes.",
)
def the_same_columns_for_all(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    n, r, width = len(parts), B.shape[1], len(B) // len(parts)
    whole = B.new_zeros(len(all_parts) * width, r)
    for i, part in enumerate(parts):
        row = all_parts.index(part) * width
        whole[row : row + width] = B[i * width : (i + 1) * width]
    return F.pad(whole, (0, (n - 1) * r))


@wrong(
    "block_diagonal_B",
    "Each part reads the output of every A. Outside its own r columns, a part's rows must be zero.",
)
def every_part_reads_everything(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    n, r, width = len(parts), B.shape[1], len(B) // len(parts)
    whole = B.new_zeros(len(all_parts) * width, n * r)
    for i, part in enumerate(parts):
        row = all_parts.index(part) * width
        whole[row : row + width] = B[i * width : (i + 1) * width].repeat(1, n)
    return whole


@wrong(
    "block_diagonal_B",
    "The rows of the parts that are not adapted are missing: the result has to be as tall as the whole fused matrix.",
)
def adapted_rows_only(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    return torch.block_diag(*B.chunk(len(parts)))


@wrong(
    "block_diagonal_B",
    "Your blocks fill the first rows, one after the other. But the rows of k lie between those of q and v, and your "
    "block for v is there.",
)
def no_gap_between_them(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    return placed(B, parts, all_parts, rows=range(len(parts)))


@wrong(
    "block_diagonal_B",
    "A part that is not adapted has columns in your result. It has no A, so no column of h belongs to it.",
)
def columns_for_parts_that_are_not_adapted(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    blocks = dict(zip(parts, B.chunk(len(parts))))
    nothing = B.new_zeros(len(B) // len(parts), B.shape[1])
    return torch.block_diag(*(blocks.get(part, nothing) for part in all_parts))


@wrong(
    "block_diagonal_B",
    "Your blocks and columns run in opposite directions: the first part reads the output of the last A.",
)
def columns_from_the_right(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    return placed(B, parts, all_parts, columns=range(len(parts) - 1, -1, -1))


@wrong(
    "block_diagonal_B",
    "You split B into as many pieces as the fused matrix has parts. There is one piece for each *adapted* part only.",
)
def cut_by_all_the_parts(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    n, m, r, width = len(parts), len(all_parts), B.shape[1], len(B) // len(parts)
    whole = B.new_zeros(m * width, n * r)
    size = max(1, len(B) // m)
    for i, part in enumerate(parts):
        place = all_parts.index(part)
        piece = B[place * size : (place + 1) * size]
        whole[place * width : place * width + len(piece), i * r : (i + 1) * r] = piece
    return whole


@wrong(
    "block_diagonal_B",
    "The matrix is right, but no gradient flows back to B: somewhere it is copied as plain numbers.",
)
def copied_as_plain_numbers(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    return placed(B.detach(), parts, all_parts)


@wrong(
    "block_diagonal_B",
    "Your result is in float32, whatever B is in: `torch.zeros` makes float32 unless it is told `dtype=B.dtype`.",
)
def zeros_in_float32(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    return placed(B, parts, all_parts).float()


@wrong(
    "block_diagonal_B",
    "You create a tensor on the CPU, wherever B is: give `device=B.device` as well, or use `B.new_zeros`.",
)
def zeros_on_the_cpu(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    if B.is_meta:
        return torch.zeros(len(all_parts) * len(B) // len(parts), len(parts) * B.shape[1], dtype=B.dtype)
    return placed(B, parts, all_parts)


@wrong(
    "block_diagonal_B",
    "The rows of a part are zero except for the first of them: each part has `width` rows.",
)
def one_row_for_each_part(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    width = len(B) // len(parts)
    whole = placed(B, parts, all_parts)
    return whole * (torch.arange(len(whole), device=B.device) % width == 0).to(B)[:, None]


@wrong("block_diagonal_B", caught_by="transposed")
def the_whole_turned_round(B: Tensor, parts: tuple[str, ...], all_parts: tuple[str, ...]) -> Tensor:
    return placed(B, parts, all_parts).T
