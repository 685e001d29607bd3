"""Unit 07, adapters in a model: common mistakes, and alternative right answers."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.methods.adapters import (
    AdapterAfter,
    AdapterBeside,
    adapter_places,
    new_adapter,
    replace_module,
)

# --- insert_adapters ---------------------------------------------------------------------------------


def checked(model: nn.Module, width: int, variant: str, layers: tuple) -> list[str]:
    names = adapter_places(model.config.n_layer, variant, layers)
    if width < 1 or width > model.config.n_embd:
        raise ValueError("no such width")
    return names


def made(model: nn.Module, variant: str, width: int, scaling: float, generator) -> nn.Module:
    adapter = new_adapter(variant, model.config.n_embd, width, scaling, generator)
    return adapter.to(model.transformer.wte.weight)


def wrapped(variant: str, base: nn.Module, adapter: nn.Module) -> nn.Module:
    return {"parallel": AdapterBeside}.get(variant, AdapterAfter)(base, adapter)


@right("insert_adapters")
def through_the_blocks(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    places = checked(model, width, variant, layers)
    found = {}
    blocks = model.transformer.h
    for number, block in enumerate(blocks):
        for part in ("attn", "mlp"):
            name = f"transformer.h.{number}.{part}"
            if name in places:
                found[name] = made(model, variant, width, scaling, generator)
                setattr(block, part, wrapped(variant, getattr(block, part), found[name]))
        if f"transformer.h.{number}" in places:
            found[f"transformer.h.{number}"] = made(model, variant, width, scaling, generator)
            blocks[number] = wrapped(variant, block, found[f"transformer.h.{number}"])
    return found


@right("insert_adapters")
def all_made_first(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    places = checked(model, width, variant, layers)
    found = {name: made(model, variant, width, scaling, generator) for name in places}
    for name, adapter in found.items():
        replace_module(model, name, wrapped(variant, model.get_submodule(name), adapter))
    return found


@wrong("insert_adapters", "You create the adapters, but do not insert them: the model is unchanged.")
def never_put_in(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    return {name: made(model, variant, width, scaling, generator) for name in checked(model, width, variant, layers)}


@wrong(
    "insert_adapters",
    "You use the same adapter in every place: it is created once, before the loop. Each place needs its own.",
)
def one_for_all(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    places = checked(model, width, variant, layers)
    adapter = made(model, variant, width, scaling, generator)
    for name in places:
        replace_module(model, name, wrapped(variant, model.get_submodule(name), adapter))
    return dict.fromkeys(places, adapter)


@wrong("insert_adapters", "A parallel adapter runs in parallel with its module, but you put it after the module.")
def always_behind(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        found[name] = made(model, variant, width, scaling, generator)
        replace_module(model, name, AdapterAfter(model.get_submodule(name), found[name]))
    return found


@wrong(
    "insert_adapters", "The adapter replaces the pretrained module, which is lost. The two have to be wrapped together."
)
def in_place_of_the_base(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        found[name] = made(model, variant, width, scaling, generator)
        replace_module(model, name, Alone(found[name]))
    return found


class Alone(nn.Module):
    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor, *others: object) -> Tensor:
        return self.adapter(x)


@wrong("insert_adapters", "You insert adapters into every block, whatever `layers` says.")
def in_all_layers(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    checked(model, width, variant, layers)
    return all_made_first(model, width, variant, scaling=scaling, generator=generator)


@wrong("insert_adapters", "You do not pass the scaling on to the adapters.")
def loses_the_scaling(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    return all_made_first(model, width, variant, layers=layers, generator=generator)


@wrong(
    "insert_adapters",
    "You freeze the model. That is not this function's job: what is trained has to stay as it was.",
)
def freezes(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    checked(model, width, variant, layers)
    model.requires_grad_(False)
    return all_made_first(model, width, variant, scaling=scaling, layers=layers, generator=generator)


@wrong("insert_adapters", "You return the wrappers. Return the adapters, which hold what is trained.")
def returns_the_wrappers(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = all_made_first(model, width, variant, scaling=scaling, layers=layers, generator=generator)
    return {name: model.get_submodule(name) for name in found}


@wrong("insert_adapters", "You do not pass the generator on: the same seed gives different adapters each time.")
def draws_from_elsewhere(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    return all_made_first(model, width, variant, scaling=scaling, layers=layers)


@wrong(
    "insert_adapters",
    "Your adapters are float32, whatever the model's dtype. They need the dtype of their inputs.",
)
def always_float32(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        found[name] = new_adapter(variant, model.config.n_embd, width, scaling, generator)
        replace_module(model, name, wrapped(variant, model.get_submodule(name), found[name]))
    return found


@wrong("insert_adapters", "An invalid width has to raise a ValueError: here it is larger than the width of the model.")
def any_width(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in adapter_places(model.config.n_layer, variant, layers):
        found[name] = made(model, variant, width, scaling, generator)
        replace_module(model, name, wrapped(variant, model.get_submodule(name), found[name]))
    return found


@right("insert_adapters")
def with_one_parameter_as_a_model(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    if width not in range(1, model.config.n_embd + 1):
        raise ValueError("width")
    places, like = adapter_places(model.config.n_layer, variant, layers), next(model.parameters())
    adapters = {}
    for place in places:
        adapter = new_adapter(variant, model.config.n_embd, width, scaling, generator)
        adapters[place] = adapter.to(device=like.device, dtype=like.dtype)
        module = model.get_submodule(place)
        kind = AdapterBeside if variant == "parallel" else AdapterAfter
        replace_module(model, place, kind(module, adapters[place]))
    return adapters


@right("insert_adapters")
def through_the_parents_modules(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    adapters = {}
    for name in checked(model, width, variant, layers):
        *parents, child = name.split(".")
        parent = functools.reduce(getattr, parents, model)
        adapters[name] = made(model, variant, width, scaling, generator)
        parent._modules[child] = wrapped(variant, parent._modules[child], adapters[name])
    return adapters


def put_in(model, places, variant, width, scaling, generator):
    found = {}
    for name in places:
        found[name] = made(model, variant, width, scaling, generator)
        replace_module(model, name, wrapped(variant, model.get_submodule(name), found[name]))
    return found


@wrong(
    "insert_adapters",
    "You insert first and check the width afterwards. When the error comes, the model has been changed already.",
)
def checks_too_late(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = put_in(model, adapter_places(model.config.n_layer, variant, layers), variant, width, scaling, generator)
    if not 1 <= width <= model.config.n_embd:
        raise ValueError("width")
    return found


@wrong("insert_adapters", "You accept a width of 0: nothing could pass through such a bottleneck.")
def no_lower_limit(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    if width > model.config.n_embd:
        raise ValueError("width")
    return put_in(model, adapter_places(model.config.n_layer, variant, layers), variant, width, scaling, generator)


@wrong("insert_adapters", "You refuse a bottleneck as wide as the model. The upper limit is included.")
def narrower_than_the_model(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    if not 1 <= width < model.config.n_embd:
        raise ValueError("width")
    return put_in(model, adapter_places(model.config.n_layer, variant, layers), variant, width, scaling, generator)


@wrong("insert_adapters", "You refuse a bottleneck of width 1. The lower limit is included.")
def wider_than_one(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    if not 1 < width <= model.config.n_embd:
        raise ValueError("width")
    return put_in(model, adapter_places(model.config.n_layer, variant, layers), variant, width, scaling, generator)


@wrong("insert_adapters", "Your adapters stay on the CPU, wherever the model is. They belong on the model's device.")
def always_on_the_cpu(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        adapter = new_adapter(variant, model.config.n_embd, width, scaling, generator)
        found[name] = adapter.to(model.transformer.wte.weight.dtype)
        replace_module(model, name, wrapped(variant, model.get_submodule(name), found[name]))
    return found


@wrong("insert_adapters", "You wrap copies of the model's modules. The base has to be the same object as before.")
def wraps_copies(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        found[name] = made(model, variant, width, scaling, generator)
        replace_module(model, name, wrapped(variant, copy.deepcopy(model.get_submodule(name)), found[name]))
    return found


@wrong(
    "insert_adapters",
    "Every adapter starts with the same numbers: you create a new generator for each of them. They draw from one, one "
    "after the other.",
)
def a_generator_for_each(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        seed = 0 if generator is None else generator.initial_seed()
        found[name] = made(model, variant, width, scaling, torch.Generator().manual_seed(seed))
        replace_module(model, name, wrapped(variant, model.get_submodule(name), found[name]))
    return found


@wrong("insert_adapters", "You return the adapters in a list. Return a dictionary, by the names of their places.")
def returns_a_list(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    return list(put_in(model, checked(model, width, variant, layers), variant, width, scaling, generator).values())


@wrong("insert_adapters", "You insert the adapters but return nothing.")
def returns_nothing(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    put_in(model, checked(model, width, variant, layers), variant, width, scaling, generator)


@wrong("insert_adapters", "Your names are those of the adapters inside the wrappers. Use those of the places.")
def names_of_the_adapters(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = put_in(model, checked(model, width, variant, layers), variant, width, scaling, generator)
    return {f"{name}.adapter": adapter for name, adapter in found.items()}


@wrong("insert_adapters", 'You put all adapters in parallel. Only those of the variant "parallel" are.')
def always_beside(model, width=24, variant="houlsby", *, scaling=1.0, layers=(), generator=None):
    found = {}
    for name in checked(model, width, variant, layers):
        found[name] = made(model, variant, width, scaling, generator)
        replace_module(model, name, AdapterBeside(model.get_submodule(name), found[name]))
    return found


# --- remove_adapters ---------------------------------------------------------------------------------


@right("remove_adapters")
def one_at_a_time_until_none_is_left(model: nn.Module) -> None:
    while True:
        found = [name for name, module in model.named_modules() if isinstance(module, AdapterAfter)]
        if not found:
            return
        replace_module(model, found[0], model.get_submodule(found[0]).base)


@right("remove_adapters")
def by_walking_down(model: nn.Module) -> None:
    for name, child in list(model.named_children()):
        while isinstance(child, AdapterAfter):
            child = child.base
        setattr(model, name, child)
        by_walking_down(child)


def wrappers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdapterAfter)]


@wrong(
    "remove_adapters",
    "You disable the adapters but leave them in place. The model computes the same as before, but more slowly, and "
    "its parameters have different names.",
)
def silences(model: nn.Module) -> None:
    for _, wrapper in wrappers(model):
        for parameter in wrapper.adapter.parameters():
            parameter.data.zero_()


@wrong(
    "remove_adapters",
    "You put back copies. An optimiser, for instance, would still hold the old parameters: put back the same objects.",
)
def puts_back_copies(model: nn.Module) -> None:
    for name, wrapper in reversed(wrappers(model)):
        replace_module(model, name, copy.deepcopy(wrapper.base))


@wrong("remove_adapters", "You remove only the first one.")
def the_first_alone(model: nn.Module) -> None:
    for name, wrapper in wrappers(model)[:1]:
        replace_module(model, name, wrapper.base)


@wrong(
    "remove_adapters",
    "You leave the parallel ones: the type of an `AdapterBeside` is not `AdapterAfter`, but it is an instance of it.",
)
def of_the_very_type(model: nn.Module) -> None:
    for name, module in reversed(list(model.named_modules())):
        if type(module) is AdapterAfter:
            replace_module(model, name, module.base)


@wrong("remove_adapters", "You keep the adapter. Keep the base instead.")
def keeps_the_wrong_one(model: nn.Module) -> None:
    for name, wrapper in reversed(wrappers(model)):
        replace_module(model, name, Alone(wrapper.adapter))


@wrong(
    "remove_adapters",
    "If one adapter is inside another, you remove the outer one first, and then the name of the inner one no longer "
    "exists.",
)
def the_outer_ones_first(model: nn.Module) -> None:
    for name, wrapper in wrappers(model):
        replace_module(model, name, wrapper.base)


@wrong(
    "remove_adapters",
    "After one pass there are adapters left: a wrapper can contain another wrapper, and a wrapped block can contain "
    "some.",
)
def one_layer_of_them(model: nn.Module) -> None:
    gone: list[str] = []
    for name, wrapper in wrappers(model):
        if not any(name.startswith(f"{outer}.") for outer in gone):
            replace_module(model, name, wrapper.base)
            gone.append(name)


@wrong("remove_adapters", "You look only at the MLPs. Some variants also have adapters in other places.")
def of_the_mlps_alone(model: nn.Module) -> None:
    for block in model.transformer.h:
        while isinstance(getattr(block, "mlp", None), AdapterAfter):
            block.mlp = block.mlp.base


@right("remove_adapters")
def by_the_modules_dictionaries(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            while isinstance(child, AdapterAfter):
                child = child.base
            module._modules[name] = child


@right("remove_adapters")
def sorted_by_the_length_of_the_name(model: nn.Module) -> None:
    found = {name: module for name, module in model.named_modules() if isinstance(module, AdapterAfter)}
    for name in sorted(found, key=lambda name: name.count("."), reverse=True):
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_module(child, found[name].base)


@wrong("remove_adapters", "Without any adapter your code raises an error. Then there is simply nothing to do.")
def expects_adapters(model: nn.Module) -> None:
    if not wrappers(model):
        raise ValueError("this model has no adapters")
    one_at_a_time_until_none_is_left(model)


@wrong("remove_adapters", "You leave the sequential ones: `AdapterBeside` is only one of the two kinds of wrapper.")
def of_the_parallel_kind(model: nn.Module) -> None:
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, AdapterBeside):
            replace_module(model, name, module.base)


@wrong(
    "remove_adapters",
    "The given model still has all its adapters. Do you work on a copy, or take the bases without putting them in?",
)
def in_a_copy(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    one_at_a_time_until_none_is_left(other)
    return other


@wrong("remove_adapters", "You remove only what is behind attention and MLP. A whole block may be wrapped as well.")
def inside_the_blocks_only(model: nn.Module) -> None:
    for block in model.transformer.h:
        inner = block
        while isinstance(inner, AdapterAfter):
            inner = inner.base
        for part in ("attn", "mlp"):
            while isinstance(getattr(inner, part), AdapterAfter):
                setattr(inner, part, getattr(inner, part).base)
