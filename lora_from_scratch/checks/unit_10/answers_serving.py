"""Unit 10, fine-tuning with LoRA: mistakes that people make, and other right ways. Switching."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.serving.batched_lora import check_fit
from lora_from_scratch.support.linear_layers import in_and_out

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
            change = change + new[name][1].float() @ new[name][0].float()
        if name in old:
            change = change - old[name][1].float() @ old[name][0].float()
        weight.copy_(weight.float() + laid(modules[name], change))


@right("switch_task")
def past_autograd_in_double_precision(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for name, layer in modules.items():
        if name in old or name in new:
            total = layer.weight.data.double()
            for factors, sign in ((new, 1), (old, -1)):
                if name in factors:
                    A, B = factors[name]
                    total = total + laid(layer, sign * B.double() @ A.double())
            layer.weight.data = total.to(layer.weight.dtype)


@right("switch_task")
@torch.no_grad()
def one_product_of_stacked_factors(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for name in {**new, **old}:
        pairs = [(A, s * B) for s, f in ((-1, old), (1, new)) for A, B in [f.get(name, (None, None))] if A is not None]
        A, B = torch.cat([A.float() for A, _ in pairs]), torch.cat([B.float() for _, B in pairs], dim=1)
        weight = modules[name].weight
        weight.copy_(laid(modules[name], laid(modules[name], weight.float()) + B @ A))


@right("switch_task")
def numpy_sums_of_outer_products(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    totals = {}
    for sign, factors in ((-1.0, old), (1.0, new)):
        for name, (A, B) in factors.items():
            for a, b in zip(A.detach().double().numpy(), B.detach().double().numpy().T):
                totals[name] = totals.get(name, 0) + sign * np.outer(b, a)
    for name, total in totals.items():
        change = total.T if isinstance(modules[name], Conv1D) else total
        data = modules[name].weight.data
        data[:] = data.double() + torch.from_numpy(np.ascontiguousarray(change))


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
    "You check only the new LoRA with `check_fit`. The old one may not fit the model either.",
)
@torch.no_grad()
def checks_only_the_new_one(model: nn.Module, old: dict, new: dict) -> None:
    fits(model, {}, new)
    known = dict(model.named_modules())
    one_sum_a_layer(model, {name: f for name, f in old.items() if name in known and laid_fits(known[name], f)}, new)


def laid_fits(layer: nn.Module, factors: tuple) -> bool:
    return (factors[0].shape[1], factors[1].shape[0]) == in_and_out(layer)


@wrong(
    "switch_task",
    "You check only the old LoRA with `check_fit`. The new one may not fit the model either.",
)
@torch.no_grad()
def checks_only_the_old_one(model: nn.Module, old: dict, new: dict) -> None:
    fits(model, old, {})
    known = dict(model.named_modules())
    one_sum_a_layer(model, old, {name: f for name, f in new.items() if name in known and laid_fits(known[name], f)})


@wrong(
    "switch_task",
    "You multiply B and A in the dtype that they have. In bfloat16 that rounds the product: turn them into float32 "
    "first, and round only the sum.",
)
@torch.no_grad()
def multiplies_in_bfloat16(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for name in {**old, **new}:
        weight = modules[name].weight
        total = weight.float()
        for factors, sign in ((old, -1), (new, 1)):
            if name in factors:
                total = total + laid(modules[name], sign * (factors[name][1] @ factors[name][0]).float())
        weight.copy_(total)


@wrong(
    "switch_task",
    "Where a layer is in both LoRAs, you round twice: after removing the old one, and again after adding the new one. "
    "Form the whole sum in float32 first.",
)
@torch.no_grad()
def rounds_in_between(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for factors, sign in ((old, -1), (new, 1)):
        for name, (A, B) in factors.items():
            weight = modules[name].weight
            weight.copy_(weight.float() + laid(modules[name], sign * B.float() @ A.float()))


@wrong(
    "switch_task",
    "The change of a `Linear` is transposed. Its weight is (out, in), as B A is; only a `Conv1D` has (in, out).",
)
@torch.no_grad()
def transposes_always(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for factors, sign in ((old, -1), (new, 1)):
        for name, (A, B) in factors.items():
            modules[name].weight += sign * (B @ A).T


@wrong(
    "switch_task",
    "The given model is unchanged: you change a copy of it, or compute sums that you put nowhere.",
)
def of_a_copy(model: nn.Module, old: dict, new: dict) -> nn.Module:
    model = copy.deepcopy(model)
    one_sum_a_layer(model, old, new)
    return model


@wrong(
    "switch_task",
    "You scale the change once more. The given B already contains s.",
)
@torch.no_grad()
def scales_again(model: nn.Module, old: dict, new: dict) -> None:
    modules = fits(model, old, new)
    for factors, sign in ((old, -1), (new, 1)):
        for name, (A, B) in factors.items():
            modules[name].weight += sign * laid(modules[name], B @ A) / len(A)


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
