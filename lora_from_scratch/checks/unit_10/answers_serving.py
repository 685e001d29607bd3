"""Unit 10, fine-tuning with LoRA: mistakes that people make, and other right ways. Switching, and mixed batches."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.serving.batched_lora import check_fit

# --- switch_task -------------------------------------------------------------------------------------


def fits(model: nn.Module, old: dict, new: dict) -> dict:
    modules = dict(model.named_modules())
    check_fit("old", old, modules)
    check_fit("new", new, modules)
    return modules


def laid(layer: nn.Module, change: Tensor) -> Tensor:
    """The change (out, in), in the layout of the layer's weight."""
    return change.T if isinstance(layer, Conv1D) else change


@right("switch_task")
@torch.no_grad()
def one_sum_a_layer(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for name in set(old) | set(new):
        weight = modules[name].weight
        change = 0
        if name in new:
            change = change + new[name][1] @ new[name][0]
        if name in old:
            change = change - old[name][1] @ old[name][0]
        weight += laid(modules[name], change)


@right("switch_task")
def past_autograd_in_double_precision(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for factors, sign in ((new, 1), (old, -1)):
        for name, (A, B) in factors.items():
            layer = modules[name]
            layer.weight.data = (layer.weight.data.double() + laid(layer, sign * B.double() @ A.double())).float()


@wrong(
    "switch_task",
    "You add the new LoRA and leave the old one in the weights: the model now mixes both tasks.",
)
@torch.no_grad()
def the_old_one_stays(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for name, (A, B) in new.items():
        modules[name].weight += laid(modules[name], B @ A)


@wrong("switch_task", "You remove the old LoRA and do not add the new one: the result is the base.")
@torch.no_grad()
def the_new_one_is_missing(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for name, (A, B) in old.items():
        modules[name].weight -= laid(modules[name], B @ A)


@wrong("switch_task", "You add the old LoRA once more. The weights already contain it: subtract it.")
@torch.no_grad()
def adds_both(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for factors in (old, new):
        for name, (A, B) in factors.items():
            modules[name].weight += laid(modules[name], B @ A)


@wrong("switch_task", "Your signs are reversed: the new LoRA is subtracted and the old one added.")
@torch.no_grad()
def the_wrong_way_round(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for factors, sign in ((old, 1), (new, -1)):
        for name, (A, B) in factors.items():
            modules[name].weight += sign * laid(modules[name], B @ A)


@wrong(
    "switch_task",
    "You subtract the factors from each other first. (B' - B)(A' - A) is not B'A' - BA: expand it on paper.",
)
@torch.no_grad()
def difference_of_the_factors(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for name in dict.fromkeys([*old, *new]):
        layer = modules[name]
        if name in old and name in new and old[name][0].shape == new[name][0].shape:
            change = (new[name][1] - old[name][1]) @ (new[name][0] - old[name][0])
        else:
            change = sum(s * f[name][1] @ f[name][0] for s, f in ((1, new), (-1, old)) if name in f)
        layer.weight += laid(layer, change)


@wrong(
    "switch_task",
    "You visit only the layers of the new LoRA. What the old one changed elsewhere stays in the model.",
)
@torch.no_grad()
def only_the_new_ones_layers(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for name, (A, B) in new.items():
        change = B @ A
        if name in old:
            change = change - old[name][1] @ old[name][0]
        modules[name].weight += laid(modules[name], change)


@wrong(
    "switch_task",
    "If a layer is in both LoRAs, only one of the two changes its weight. Such a layer needs a subtraction *and* an "
    "addition.",
)
@torch.no_grad()
def either_or(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    both = {name: (-1, *factors) for name, factors in old.items()} | {n: (1, *factors) for n, factors in new.items()}
    for name, (sign, A, B) in both.items():
        modules[name].weight += sign * laid(modules[name], B @ A)


@wrong(
    "switch_task",
    "A square `Conv1D` gets the transpose of its change. Its weight is (in, out), and if both are equal there is no "
    "error.",
)
@torch.no_grad()
def turned_only_where_it_must_be(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for factors, sign in ((old, -1), (new, 1)):
        for name, (A, B) in factors.items():
            change, weight = sign * B @ A, modules[name].weight
            weight += change if change.shape == weight.shape else change.T


@wrong(
    "switch_task",
    "You put new parameters into the layers. An optimiser, or anyone else who holds the old ones, then holds "
    "parameters that the model no longer uses: change their values in place.",
)
@torch.no_grad()
def new_parameters(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for factors, sign in ((old, -1), (new, 1)):
        for name, (A, B) in factors.items():
            layer = modules[name]
            layer.weight = nn.Parameter(layer.weight + sign * laid(layer, B @ A))


@wrong(
    "switch_task",
    "When you raise an error, the model is already half changed. Check everything first, then change the weights.",
)
@torch.no_grad()
def looks_too_late(model: nn.Module, old: dict, new: dict) -> None:
    modules = dict(model.named_modules())
    for factors, sign in ((old, -1), (new, 1)):
        for name, (A, B) in factors.items():
            check_fit("one", {name: (A, B)}, modules)
            modules[name].weight += sign * laid(modules[name], B @ A)


@wrong(
    "switch_task",
    "You skip layers that the model does not have. Then half an adapter is in the model, without an error.",
)
@torch.no_grad()
def passes_over_what_does_not_fit(model: nn.Module, old: dict, new: dict) -> None:
    modules = dict(model.named_modules())
    for factors, sign in ((old, -1), (new, 1)):
        for name, (A, B) in factors.items():
            if name in modules and (A.shape[1], B.shape[0]) == (modules[name].in_features, modules[name].out_features):
                modules[name].weight += sign * laid(modules[name], B @ A)


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
