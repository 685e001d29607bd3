"""Unit 22, serving a thousand adapters: mistakes that people make, and other right ways. The two products."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.serving.reference_products import gather_product, segment_product

# --- gather_product ----------------------------------------------------------------------------------


@right("gather_product")
def one_row_at_a_time(x, A, B, tables):
    return torch.stack([(A[table] @ x_i) @ B[table] for x_i, table in zip(x, tables)])


@right("gather_product")
def one_cell_at_a_time(x, A, B, tables):
    y = torch.zeros(len(x), B.shape[1])
    for i, table in enumerate(tables):
        for p in table.tolist():
            y[i] += (A[p] @ x[i]) * B[p]
    return y


@right("gather_product")
def in_numpy(x, A, B, tables):
    x, A, B = x.numpy(), A.numpy(), B.numpy()
    row = np.repeat(np.arange(len(x)), [len(table) for table in tables])
    cell = np.concatenate([table.numpy() for table in tables]).astype(int)
    h = np.einsum("ec,ec->e", x[row], A[cell])
    y = np.zeros((len(x), B.shape[1]), dtype=np.float32)
    np.add.at(y, row, h[:, None] * B[cell])
    return torch.from_numpy(y)


@right("gather_product")
def padded_with_a_cell_of_zeros(x, A, B, tables):
    longest = max(len(table) for table in tables)
    A = torch.cat([A, torch.zeros(1, A.shape[1])])
    B = torch.cat([B, torch.zeros(1, B.shape[1])])
    padded = torch.full((len(x), longest), len(A) - 1)
    for i, table in enumerate(tables):
        padded[i, : len(table)] = table
    h = torch.einsum("ni,nri->nr", x, A[padded])
    return torch.einsum("nr,nro->no", h, B[padded])


@right("gather_product")
def rows_of_one_rank_together(x, A, B, tables):
    y = torch.zeros(len(x), B.shape[1])
    for rank in {len(table) for table in tables} - {0}:
        rows = [i for i, table in enumerate(tables) if len(table) == rank]
        own = torch.stack([tables[i] for i in rows])  # (rows, rank)
        h = torch.bmm(A[own], x[rows].unsqueeze(2))
        y[rows] = torch.bmm(h.mT, B[own]).squeeze(1)
    return y


@wrong(
    "gather_product",
    "You multiply every row by all cells, and then set the others to zero. Cells that nobody uses may be NaN, and 0 "
    "times NaN is NaN.",
)
def all_cells_and_a_mask(x, A, B, tables):
    own = torch.zeros(len(x), len(A))
    for i, table in enumerate(tables):
        own[i, table] = 1
    return ((x @ A.T) * own) @ B


@wrong(
    "gather_product",
    "You use one table for all rows, that of the first row. Each row has its own adapter.",
)
def the_first_table_for_all(x, A, B, tables):
    return x @ A[tables[0]].T @ B[tables[0]]


@wrong("gather_product", "You use only as many cells of each row as the smallest adapter has. Ranks differ.")
def the_smallest_rank(x, A, B, tables):
    rank = min((len(table) for table in tables if len(table)), default=0)
    return gather_product(x, A, B, [table[:rank] for table in tables])


@wrong(
    "gather_product",
    "You pad shorter tables with the cells of another adapter: the extra cells of the longest table are added to rows "
    "with a smaller rank.",
)
def padded_with_another_adapter(x, A, B, tables):
    longest = max(tables, key=len)
    return gather_product(x, A, B, [torch.cat([t, longest[len(t) :]]) if len(t) else t for t in tables])


@wrong(
    "gather_product",
    "You take cells that follow each other from the first one of each table. The cells of an adapter may be anywhere.",
)
def consecutive_cells(x, A, B, tables):
    own = [(table[:1] + torch.arange(len(table))) % len(A) if len(table) else table for table in tables]
    return gather_product(x, A, B, own)


@wrong(
    "gather_product",
    "If several entries belong to one row, you keep only one of them: `y[row] += ...` with repeated numbers in `row` "
    "does not add up. `index_add` does.",
)
@changed(
    gather_product,
    ("return y.index_add(0, row, h[:, None] * B[cell])", "y[row] += h[:, None] * B[cell]\n    return y"),
)
def without_adding_up(): ...


@wrong("gather_product", "Every row gets the sum over the cells of all rows. The sum is over its own cells.")
def cells_of_all_rows(x, A, B, tables):
    cell = torch.cat(list(tables))
    return (x @ A[cell].T) @ B[cell]


@wrong("gather_product", "You take the mean over the cells of an adapter. It is the sum.")
def the_mean(x, A, B, tables):
    ranks = torch.tensor([max(1, len(table)) for table in tables])
    return gather_product(x, A, B, tables) / ranks[:, None]


@wrong("gather_product", "You leave rows without an adapter out of the result. Their result is zero.")
def without_empty_rows(x, A, B, tables):
    kept = [i for i, table in enumerate(tables) if len(table)]
    return gather_product(x, A, B, tables)[kept]


@wrong(
    "gather_product",
    "Of two rows with the same adapter, you compute only the first. Several rows may have the same adapter.",
)
def each_adapter_once(x, A, B, tables):
    seen, y = set(), gather_product(x, A, B, tables)
    for i, table in enumerate(tables):
        name = tuple(table.tolist())
        if name in seen:
            y[i] = 0
        seen.add(name)
    return y


@wrong("gather_product", "Your rows without an adapter keep x, or something else that is not zero.")
def one_where_there_is_no_adapter(x, A, B, tables):
    y = gather_product(x, A, B, tables)
    y[[len(table) == 0 for table in tables]] = 1
    return y


@wrong("gather_product", "Your result has one axis for the rows and one for the outputs, but in the wrong order.")
def transposed(x, A, B, tables):
    return gather_product(x, A, B, tables).T


@wrong("gather_product", "You return the inner products A_p . x_i. They are to be multiplied by B_p and added up.")
@changed(gather_product, ("return y.index_add(0, row, h[:, None] * B[cell])", "return h"))
def only_the_first_half(): ...


@wrong("gather_product", caught_by="changes its input")
def cleared_in_place(x, A, B, tables):
    y = gather_product(x, A, B, tables)
    A.nan_to_num_()
    x.mul_(2)
    return y


# --- segment_product ---------------------------------------------------------------------------------


@right("segment_product")
def sorted_and_split(x, adapters, adapter_index):
    order = adapter_index.argsort(stable=True)
    numbers, lengths = adapter_index[order].unique_consecutive(return_counts=True)
    y = torch.zeros(len(x), adapters[0][1].shape[0])
    for k, rows in zip(numbers.tolist(), order.split(lengths.tolist())):
        if k != -1:
            A, B, s = adapters[k]
            y[rows] = torch.einsum("ni,ri->nr", x[rows], A) @ (s * B).T
    return y


@right("segment_product")
def rows_in_a_dictionary(x, adapters, adapter_index):
    rows = {}
    for i, k in enumerate(adapter_index.tolist()):
        rows.setdefault(k, []).append(i)
    rows.pop(-1, None)
    y = torch.zeros(len(x), adapters[0][1].shape[0])
    for k, own in rows.items():
        A, B, s = adapters[k]
        y.index_add_(0, torch.tensor(own), torch.nn.functional.linear(torch.nn.functional.linear(x[own], s * A), B))
    return y


@wrong(
    "segment_product",
    "You form B A of each adapter, which is as large as the layer's weight. Multiply x by A first: what comes out has "
    "only r numbers for each row.",
)
def by_the_update(x, adapters, adapter_index):
    y = torch.zeros(len(x), adapters[0][1].shape[0])
    for k in set(adapter_index.tolist()) - {-1}:
        A, B, s = adapters[k]
        own = torch.nonzero(adapter_index == k).flatten()
        y[own] = x[own] @ (s * (B @ A)).T
    return y


@right("segment_product")
def in_numpy_for_each_number(x, adapters, adapter_index):
    x, index = x.numpy(), adapter_index.numpy()
    y = np.zeros((len(x), adapters[0][1].shape[0]), dtype=np.float32)
    for k in np.unique(index[index >= 0]):
        A, B, s = adapters[k]
        own = np.where(index == k)[0]
        y[own] = s * (x[own] @ A.numpy().T) @ B.numpy().T
    return torch.from_numpy(y)


@right("segment_product")
def a_run_after_the_other(x, adapters, adapter_index):
    """The rows are brought into the order of their adapters, and the results back into theirs."""
    order = sorted(range(len(x)), key=adapter_index.tolist().__getitem__)
    parts, start = [], 0
    for k, count in zip(*(one.tolist() for one in adapter_index.unique(return_counts=True)), strict=True):
        own, start = x[order[start : start + count]], start + count
        parts.append(own.new_zeros(count, len(adapters[0][1])))
        if k >= 0:
            A, B, s = adapters[k]
            parts[-1] = torch.mm(torch.mm(own * s, A.mT), B.mT)
    return torch.cat(parts)[torch.tensor(order).argsort()]


@wrong("segment_product", "The scaling is missing: s_k does not occur in your result.")
@changed(segment_product, ("scaling * (x[own] @ A.T @ B.T)", "x[own] @ A.T @ B.T"))
def without_the_scaling(): ...


@wrong("segment_product", "The result is multiplied by the scaling twice.")
@changed(segment_product, ("scaling * (x[own]", "scaling**2 * (x[own]"))
def scaled_twice(): ...


@wrong("segment_product", "You use the scaling of one adapter for all of them. Each has its own.")
@changed(segment_product, ("scaling * (x[own]", "adapters[0][2] * (x[own]"))
def the_scaling_of_the_first(): ...


@wrong(
    "segment_product",
    "The result is right, but you multiply one row after the other. Multiply all rows of an adapter together.",
)
def row_by_row(x, adapters, adapter_index):
    y = torch.zeros(len(x), adapters[0][1].shape[0])
    for i, k in enumerate(adapter_index.tolist()):
        if k >= 0:
            A, B, s = adapters[k]
            y[i] = s * (B @ (A @ x[i]))
    return y


@wrong(
    "segment_product",
    "You multiply runs of neighbouring rows. Rows with the same adapter may be apart, and are multiplied together.",
)
def runs_of_neighbours(x, adapters, adapter_index):
    y, start = torch.zeros(len(x), adapters[0][1].shape[0]), 0
    numbers, lengths = adapter_index.unique_consecutive(return_counts=True)
    for k, length in zip(numbers.tolist(), lengths.tolist()):
        if k >= 0:
            A, B, s = adapters[k]
            y[start : start + length] = s * (x[start : start + length] @ A.T @ B.T)
        start += length
    return y


@wrong(
    "segment_product",
    "You multiply for every adapter there is, also for those that no row of the batch has. There may be a thousand.",
)
@changed(
    segment_product,
    ("for k in adapter_index.unique().tolist():", "for k in range(len(adapters)):"),
)
def every_adapter(): ...


@wrong(
    "segment_product",
    "The rows of your result are sorted by adapter. Put each result into the row of x that it belongs to.",
)
def left_in_order_of_the_adapters(x, adapters, adapter_index):
    return segment_product(x, adapters, adapter_index)[adapter_index.argsort(stable=True)]


@wrong(
    "segment_product",
    "Rows without an adapter get the last adapter: in Python -1 is the last entry of a list.",
)
@changed(segment_product, ("if k >= 0:", "if True:"))
def minus_one_is_the_last(): ...


@wrong("segment_product", "You leave out adapter 0. The numbers are counted from 0, and -1 is no adapter.")
@changed(segment_product, ("if k >= 0:", "if k > 0:"))
def counted_from_one(): ...


@wrong("segment_product", "You use only the first row of each A and the first column of each B, or as many as fit all.")
def the_smallest_common_rank(x, adapters, adapter_index):
    rank = min(len(A) for A, _, _ in adapters)
    return segment_product(x, [(A[:rank], B[:, :rank], s) for A, B, s in adapters], adapter_index)


@wrong("segment_product", "You leave rows without an adapter out of the result. Their result is zero.")
def only_rows_with_an_adapter(x, adapters, adapter_index):
    return segment_product(x, adapters, adapter_index)[adapter_index >= 0]


@wrong("segment_product", "You multiply all rows by one adapter, that of the first row.")
def one_adapter_for_all(x, adapters, adapter_index):
    return segment_product(x, adapters, torch.full_like(adapter_index, max(0, int(adapter_index[0]))))


@wrong("segment_product", "Your result has one axis for the rows and one for the outputs, but in the wrong order.")
def the_wrong_way_round(x, adapters, adapter_index):
    return segment_product(x, adapters, adapter_index).T


@wrong("segment_product", caught_by="changes its input")
def scaled_in_place(x, adapters, adapter_index):
    y = segment_product(x, adapters, adapter_index)
    x *= 2
    return y
