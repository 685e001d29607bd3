"""Unit 09, saving LoRA: mistakes that people make, and other right ways."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.checks.unit_09.answers_model import last
from lora_from_scratch.methods.lora import LoRALinear

# --- lora_state_dict ------------------------------------------------------------------------------


@right("lora_state_dict")
def a_filtered_state_dict(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if last(name) in {"lora_A", "lora_B"}}


@right("lora_state_dict")
def layer_by_layer(model: nn.Module) -> dict[str, object]:
    found = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if name.removeprefix(prefix).removeprefix(".") in ("lora_A", "lora_B"):
                found[name] = parameter.data
    return found


@right("lora_state_dict")
def by_a_pattern_without_gradients(model: nn.Module) -> dict[str, Tensor]:
    with torch.no_grad():
        pairs = list(model.named_parameters())
        return dict((name, p.clone()) for name, p in pairs if re.search(r"(^|\.)lora_[AB]$", name))


@right("lora_state_dict")
def everything_then_the_rest_taken_out(model: nn.Module) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for name in list(state):
        if "." + name != f".{name}".rpartition(".")[0] + ".lora_" + name[-1] or name[-1] not in "AB":
            del state[name]
    return state


@wrong("lora_state_dict", "You save the whole model. Of 350 GB, only 35 MB are new: everyone has the base already.")
def the_whole_model(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


@wrong(
    "lora_state_dict",
    "You go by `requires_grad`. That tells you what is trained at the moment, not what was learned: if it is frozen, "
    "nothing would be saved, and if the base is trained, all of it would be.",
)
def whatever_is_trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@wrong(
    "lora_state_dict",
    "You use the last part of the name as the key. Every layer has a lora_A, so each one overwrites the one before.",
)
def short_names(model: nn.Module) -> dict[str, Tensor]:
    return {last(n): p.detach() for n, p in model.named_parameters() if last(n) in ("lora_A", "lora_B")}


@wrong(
    "lora_state_dict",
    "Only B is saved. It started from zero and was trained, but it is useless without its A.",
)
def the_bs_only(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if last(n) == "lora_B"}


@wrong(
    "lora_state_dict",
    'You look for "lora" anywhere in the name, which also matches modules whose names only contain it.',
)
def lora_anywhere_in_the_name(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if "lora" in n}


@wrong(
    "lora_state_dict",
    'You look for "lora_" anywhere in the name, which also matches a module or parameter whose name only begins that '
    "way.",
)
def lora_underscore_anywhere_in_the_name(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}


@wrong(
    "lora_state_dict",
    "Your tensors are still attached to the autograd graph: detach them before they are saved.",
)
def still_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if last(n) in ("lora_A", "lora_B")}


@wrong("lora_state_dict", "The keys no longer contain the parameter's own name: is it A or B?")
def names_of_the_layers(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {n.rpartition(".")[0]: p.detach() for n, p in named if last(n) in ("lora_A", "lora_B")}


@wrong(
    "lora_state_dict",
    "You save the product, which is as large as the weight itself. Save the two thin factors.",
)
def the_products(model: nn.Module) -> dict[str, Tensor]:
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear))
    return {n: (m.scaling * m.factors()[1] @ m.factors()[0]).detach() for n, m in layers}


@wrong("lora_state_dict", "The order is not the model's: the names come in alphabetical order.")
def in_alphabetical_order(model: nn.Module) -> dict[str, Tensor]:
    return dict(sorted(a_filtered_state_dict(model).items()))


@wrong("lora_state_dict", "The order is not the model's: all A come first, and all B after them.")
def all_the_as_first(model: nn.Module) -> dict[str, Tensor]:
    return dict(sorted(a_filtered_state_dict(model).items(), key=lambda pair: pair[0][-1]))


@wrong("lora_state_dict", "Your tensors are in float32, whatever they are in the model.")
def always_in_float32(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.float() for name, t in a_filtered_state_dict(model).items()}


@wrong(
    "lora_state_dict",
    'You ask whether the name ends in "lora_A" or "lora_B". So does the name "no_lora_B": the whole last part, after '
    "the last dot, has to be equal.",
)
def names_that_end_so(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))}


@wrong(
    "lora_state_dict",
    "You freeze what you save: `requires_grad_(False)` changes the model's own parameter. `.detach()` leaves it as it "
    "is.",
)
def freezes_what_it_saves(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.requires_grad_(False) for n, p in model.named_parameters() if last(n) in ("lora_A", "lora_B")}


@wrong("lora_state_dict", caught_by="another type")
def a_list_of_tensors(model: nn.Module) -> list[Tensor]:
    return [p.detach() for n, p in model.named_parameters() if last(n) in ("lora_A", "lora_B")]
