"""Unit 10, many LoRAs in one batch: mistakes that people make, and other right ways."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong

# --- shrink ------------------------------------------------------------------------------------------


@right("shrink")
def row_by_row(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    h = torch.zeros(len(x), x.shape[1], A_T.shape[1])
    for row, adapter in enumerate(adapter_index.tolist()):
        for column, whose in enumerate(owner.tolist()):
            if whose == adapter:
                h[row, :, column] = x[row] @ A_T[:, column]
    return h


@right("shrink")
def by_where(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    h = torch.einsum("nti,ir->ntr", x, A_T)
    return torch.where(owner.view(1, 1, -1) == adapter_index.view(-1, 1, 1), h, torch.zeros_like(h))


@right("shrink")
def numpy_with_a_mask(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    own = np.equal.outer(adapter_index.numpy(), owner.numpy())
    h = np.tensordot(x.numpy(), A_T.numpy(), axes=1)
    h[~np.broadcast_to(own[:, None], h.shape)] = 0
    return torch.from_numpy(h)


@right("shrink")
def each_row_with_columns_of_zeros(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    masked = [A_T.masked_fill(owner != adapter, 0.0) for adapter in adapter_index]
    return torch.bmm(x, torch.stack(masked))


@wrong("shrink", "Every row keeps the results of all the adapters. Set those of the other adapters to zero.")
def no_mask(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    return x @ A_T


@wrong("shrink", "Your mask is inverted: each row keeps the results of the *other* adapters.")
def the_others_are_kept(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    return (x @ A_T) * (adapter_index[:, None] != owner)[:, None]


@wrong(
    "shrink",
    "You compare the adapter's number with the number of the column. That is right only if every rank is 1: `owner` "
    "says which adapter a column belongs to.",
)
def a_column_for_each_adapter(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    return (x @ A_T) * (adapter_index[:, None] == torch.arange(A_T.shape[1]))[:, None]


@wrong("shrink", "Row 0 gets adapter 0, row 1 adapter 1, ...: you do not use `adapter_index`.")
def the_rows_number(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    return (x @ A_T) * (torch.arange(len(x))[:, None] == owner)[:, None]


@wrong("shrink", "The first row decides for the whole batch. Every row has its own adapter.")
def one_adapter_for_the_batch(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    return (x @ A_T) * (adapter_index[0] == owner)


@wrong("shrink", "A row without an adapter gets the first one: -1 is not 0.")
def none_is_the_first(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    return (x @ A_T) * (adapter_index.clamp(min=0)[:, None] == owner)[:, None]


@wrong("shrink", "A row without an adapter gets the last one: in Python, index -1 is the last element.")
def none_is_the_last(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    adapters = int(owner.max()) + 1
    return (x @ A_T) * ((adapter_index % adapters)[:, None] == owner)[:, None]


@wrong("shrink", "A row without an adapter keeps everything. It has to be zero.")
def none_is_all(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    own = (adapter_index[:, None] == owner) | (adapter_index[:, None] < 0)
    return (x @ A_T) * own[:, None]


@wrong(
    "shrink",
    "You select the columns of A_T by the number of the adapter, as if each adapter had the same rank as the first. "
    "`owner` says which columns belong to which.",
)
def equal_ranks(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    rank = max(1, int((owner == owner[0]).sum()))
    return (x @ A_T) * (adapter_index[:, None] == torch.arange(len(owner)) // rank)[:, None]


@wrong(
    "shrink",
    "You add up the results of the row's own columns. Each of the R columns stays a number of its own.",
)
def summed_over_the_columns(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    return ((x @ A_T) * (adapter_index[:, None] == owner)[:, None]).sum(dim=-1)


@wrong("shrink", "Only the first token of a row is masked correctly. The mask applies to all of its tokens.")
def the_first_token_only(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    h = (x @ A_T) * (adapter_index[:, None] == owner)[:, None]
    h[:, 1:] = 0
    return h


# --- batched_lora ------------------------------------------------------------------------------------


def per_adapter(scaling: float | Tensor, K: int) -> Tensor:
    return scaling if isinstance(scaling, Tensor) else torch.full((K,), float(scaling))


def added_by(x: Tensor, A: Tensor, B: Tensor, s: Tensor) -> Tensor:
    return s * (x @ A.T @ B.T)


@right("batched_lora")
def one_row_at_a_time(x: Tensor, A_stack: Tensor, B_stack: Tensor, scaling: float | Tensor, adapter_index: Tensor):
    s = per_adapter(scaling, len(A_stack))
    result = torch.zeros(len(x), x.shape[1], B_stack.shape[1])
    for row, k in enumerate(adapter_index.tolist()):
        if k >= 0:
            result[row] = added_by(x[row], A_stack[k], B_stack[k], s[k])
    return result


@right("batched_lora")
def gathered(x: Tensor, A_stack: Tensor, B_stack: Tensor, scaling: float | Tensor, adapter_index: Tensor):
    s = per_adapter(scaling, len(A_stack))[adapter_index] * (adapter_index >= 0)
    h = torch.bmm(x, A_stack[adapter_index].mT)  # copies each row's own A
    return s[:, None, None] * torch.bmm(h, B_stack[adapter_index].mT)


@right("batched_lora")
def one_adapter_at_a_time(x: Tensor, A_stack: Tensor, B_stack: Tensor, scaling: float | Tensor, adapter_index: Tensor):
    s = per_adapter(scaling, len(A_stack))
    result = x.new_zeros(*x.shape[:2], B_stack.shape[1])
    for k in range(len(A_stack)):
        mine = adapter_index == k
        result[mine] = added_by(x[mine], A_stack[k], B_stack[k], s[k])
    return result


@right("batched_lora")
def an_einsum_with_a_table(x: Tensor, A_stack: Tensor, B_stack: Tensor, scaling: float | Tensor, adapter_index: Tensor):
    table = (adapter_index[:, None] == torch.arange(len(A_stack))).to(x)  # (n, K): 1 where the row has the adapter
    return torch.einsum("nk,nti,kri,kor->nto", table * per_adapter(scaling, len(A_stack)), x, A_stack, B_stack)


@right("batched_lora")
def whole_changes_of_the_weight(x: Tensor, A_stack: Tensor, B_stack: Tensor, scaling: float | Tensor, adapter_index):
    changes = per_adapter(scaling, len(A_stack))[:, None, None] * torch.matmul(B_stack, A_stack)
    changes = torch.cat([changes, torch.zeros_like(changes[:1])])  # what -1 is the index of
    return torch.stack([row @ changes[k].T for row, k in zip(x, adapter_index)])


@wrong("batched_lora", "A scaling of 0 is taken as if none had been given. With s = 0 nothing is added.")
def zero_is_no_scaling(x, A_stack, B_stack, scaling, adapter_index):
    scaling = scaling if isinstance(scaling, Tensor) else scaling or 1.0
    return gathered(x, A_stack, B_stack, scaling, adapter_index)


@wrong("batched_lora", "A scaling for each adapter is not used: only their mean is.")
def the_mean_of_the_scalings(x, A_stack, B_stack, scaling, adapter_index):
    return gathered(x, A_stack, B_stack, float(per_adapter(scaling, len(A_stack)).mean()), adapter_index)


@wrong("batched_lora", "You divide by the scaling. The result is multiplied by it.")
def divided_by_the_scaling(x, A_stack, B_stack, scaling, adapter_index):
    return gathered(x, A_stack, B_stack, 1 / per_adapter(scaling, len(A_stack)), adapter_index)


@wrong(
    "batched_lora",
    "A row with -1 gets the last adapter: as an index, -1 is the last element. Such a row gets no adapter.",
)
def none_is_the_last_adapter(x, A_stack, B_stack, scaling, adapter_index):
    s = per_adapter(scaling, len(A_stack))[adapter_index]
    h = torch.bmm(x, A_stack[adapter_index].mT)
    return s[:, None, None] * torch.bmm(h, B_stack[adapter_index].mT)


@wrong("batched_lora", "A row with -1 gets adapter 0. Such a row gets no adapter.")
def none_is_the_first_adapter(x, A_stack, B_stack, scaling, adapter_index):
    return gathered(x, A_stack, B_stack, scaling, adapter_index.clamp(min=0))


@wrong("batched_lora", "The scaling is missing: the result does not depend on s.")
def without_the_scaling(x, A_stack, B_stack, scaling, adapter_index):
    return gathered(x, A_stack, B_stack, 1.0, adapter_index)


@wrong("batched_lora", "The scaling is applied twice: once to A and once to B.")
def scaled_twice(x, A_stack, B_stack, scaling, adapter_index):
    return gathered(x, A_stack, B_stack, scaling * scaling, adapter_index)


@wrong(
    "batched_lora",
    "You index the scalings by row. They belong to the adapters: a row uses the scaling of its adapter.",
)
def scaled_by_row(x, A_stack, B_stack, scaling, adapter_index):
    s = per_adapter(scaling, len(A_stack))
    s = s[torch.arange(len(x)) % len(s)]
    return s[:, None, None] * gathered(x, A_stack, B_stack, 1.0, adapter_index)


@wrong("batched_lora", "Every adapter is scaled by the first adapter's scaling.")
def the_first_ones_scaling(x, A_stack, B_stack, scaling, adapter_index):
    return gathered(x, A_stack, B_stack, float(per_adapter(scaling, len(A_stack))[0]), adapter_index)


@wrong("batched_lora", "Every row gets the sum of all adapters. It must get only its own.")
def all_adapters_for_all_rows(x, A_stack, B_stack, scaling, adapter_index):
    return sum(gathered(x, A_stack, B_stack, scaling, torch.full_like(adapter_index, k)) for k in range(len(A_stack)))


@wrong(
    "batched_lora",
    "You assign the adapters in order, row 0 the first, row 1 the second. `adapter_index` says which row gets which.",
)
def in_the_order_of_the_rows(x, A_stack, B_stack, scaling, adapter_index):
    return gathered(x, A_stack, B_stack, scaling, torch.arange(len(x)) % len(A_stack))


@wrong(
    "batched_lora",
    "You arrange the B with `reshape`, which keeps the order of the values and mixes rows with columns. Swap the axes "
    "first.",
)
def reshaped_without_swapping(x, A_stack, B_stack, scaling, adapter_index):
    K, out, r = B_stack.shape
    s = per_adapter(scaling, K)[:, None, None]
    h = x @ A_stack.flatten(0, 1).T
    own = adapter_index[:, None] == torch.arange(K).repeat_interleave(r)
    return (h * own[:, None]) @ (s * B_stack).reshape(K * r, out)


@wrong(
    "batched_lora",
    "In your mask, the columns of h alternate between the adapters, 0, 1, 2, 0, 1, 2. The columns of one adapter are "
    "adjacent.",
)
def owners_in_turn(x, A_stack, B_stack, scaling, adapter_index):
    K, _, r = B_stack.shape
    s = per_adapter(scaling, K)[:, None, None]
    own = adapter_index[:, None] == torch.arange(K).repeat(r)
    return ((x @ A_stack.flatten(0, 1).T) * own[:, None]) @ (s * B_stack).mT.flatten(0, 1)


@wrong("batched_lora", "Each adapter overwrites the results of the one before; only the rows of the last one are left.")
def the_last_adapter_wins(x, A_stack, B_stack, scaling, adapter_index):
    K = len(A_stack)
    s = per_adapter(scaling, K)
    for k in range(K):
        result = added_by(x, A_stack[k], B_stack[k], s[k]) * (adapter_index == k)[:, None, None]
    return result


@wrong("batched_lora", "Your result contains x itself. Return only what the adapters add.")
def with_x(x, A_stack, B_stack, scaling, adapter_index):
    added = gathered(x, A_stack, B_stack, scaling, adapter_index)
    return added + x[..., : added.shape[-1]]
