"""Unit 26: mistakes that people make, and other right ways. LoRA on any model."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import re

from torch import nn

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.lora_by_name import add_lora

# --- add_lora ----------------------------------------------------------------------------------------


@right("add_lora")
def name_by_name(model, targets, make_layer):
    names = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if targets == "all-linear":
            get = getattr(model, "get_output_embeddings", None)
            if get is not None and get() is module:
                continue
            names.append(name)
        else:
            for target in targets:
                if name == target or name.endswith("." + target):
                    names.append(name)
                    break
    if targets != "all-linear":
        for target in targets:
            if not [name for name in names if f".{name}".endswith(f".{target}")]:
                raise ValueError(target)
    for parameter in model.parameters():
        parameter.requires_grad = False
    for name in names:
        *path, last = name.split(".")
        parent = model
        for part in path:
            parent = getattr(parent, part)
        setattr(parent, last, make_layer(getattr(parent, last)))
    return names


@right("add_lora")
def with_parts_of_names(model, targets, make_layer):
    def is_meant(name, target):
        wanted = target.split(".")
        return name.split(".")[-len(wanted) :] == wanted

    everything = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(targets, str):
        head = model.get_output_embeddings() if "get_output_embeddings" in dir(model) else object()
        chosen = [name for name in everything if model.get_submodule(name) is not head]
    else:
        found = {target: [name for name in everything if is_meant(name, target)] for target in targets}
        if not all(found.values()):
            raise ValueError("a name matches no layer")
        chosen = sorted({name for names in found.values() for name in names}, key=everything.index)
    model.requires_grad_(False)
    for name in chosen:
        parent, _, child = name.rpartition(".")
        place = model.get_submodule(parent)
        place._modules[child] = make_layer(place._modules[child])
    return chosen


@right("add_lora")
def with_a_pattern(model, targets, make_layer):
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if targets == "all-linear":
        if hasattr(model, "get_output_embeddings"):
            layers = {name: layer for name, layer in layers.items() if id(layer) != id(model.get_output_embeddings())}
    else:
        patterns = [re.compile(rf"(.*\.)?{re.escape(target)}") for target in targets]
        if not all(any(pattern.fullmatch(name) for name in layers) for pattern in patterns):
            raise ValueError("a name matches no layer")
        layers = {name: layer for name, layer in layers.items() if any(p.fullmatch(name) for p in patterns)}
    model.requires_grad_(False)
    for name, layer in layers.items():
        model.set_submodule(name, make_layer(layer))
    return list(layers)


@right("add_lora")
def through_parents(model, targets, make_layer):
    head = getattr(model, "get_output_embeddings", lambda: None)()
    places, hit = [], set()
    for path, parent in model.named_modules():
        for child, module in parent.named_children():
            full = f"{path}.{child}" if path else child
            if type(module) is nn.Linear:
                if targets == "all-linear":
                    meant = module is not head
                else:
                    matching = {t for t in targets if full == t or full.endswith(f".{t}")}
                    hit |= matching
                    meant = bool(matching)
                if meant:
                    places.append((full, parent, child))
    if targets != "all-linear" and set(targets) - hit:
        raise ValueError(f"nothing is called {(set(targets) - hit).pop()}")
    order = [name for name, _ in model.named_modules()]
    model.requires_grad_(False)
    for _, parent, child in places:
        setattr(parent, child, make_layer(getattr(parent, child)))
    return sorted((full for full, _, _ in places), key=order.index)


@wrong("add_lora", "You replace the output head as well. With all-linear it is left out.")
@changed(add_lora, ("if module is not head]", "]"))
def the_head_too(): ...


@wrong("add_lora", "You recognise the head by a name. Models call it differently: ask `get_output_embeddings()`.")
@changed(add_lora, ("if module is not head]", 'if not ends_with(name, "lm_head")]'))
def a_head_by_its_name(): ...


@wrong("add_lora", "You leave out the last layer, whatever it is. A model without the method has no head to leave out.")
@changed(
    add_lora, ("chosen = [name for name, module in linear.items() if module is not head]", "chosen = list(linear)[:-1]")
)
def without_the_last_layer(): ...


@wrong("add_lora", "You expect `get_output_embeddings` of every model. A classifier does not have it.")
@changed(add_lora, ('getattr(model, "get_output_embeddings", None)', "model.get_output_embeddings"))
def every_model_has_a_head(): ...


@wrong(
    "add_lora",
    "You choose every name that ends with the letters of a target. The target has to be the whole name, or to come "
    "after a dot.",
)
@changed(
    add_lora,
    ("if any(ends_with(name, target) for target in targets)", "if any(name.endswith(target) for target in targets)"),
)
def the_last_letters(): ...


@wrong("add_lora", "You choose every name that contains a target anywhere. It has to stand at the end.")
@changed(
    add_lora,
    ("if any(ends_with(name, target) for target in targets)", "if any(target in name for target in targets)"),
)
def anywhere_in_the_name(): ...


@wrong("add_lora", "You compare only the last part of the name. A target may have several parts, as in attn.k_proj.")
@changed(
    add_lora,
    (
        "if lost := [target for target in targets if not any(ends_with(name, target) for name in linear)]:",
        "if lost := [t for t in targets if t not in {name.split('.')[-1] for name in linear}]:",
    ),
    ("if any(ends_with(name, target) for target in targets)", "if name.split('.')[-1] in targets"),
)
def one_part_of_the_name(): ...


@wrong("add_lora", "You choose modules that are no `nn.Linear`, such as an embedding or a convolution.")
@changed(add_lora, ("if isinstance(module, nn.Linear)}", 'if hasattr(module, "weight")}'))
def everything_with_a_weight(): ...


@wrong("add_lora", "The old weights are still trained. Only what `make_layer` adds should be.")
@changed(add_lora, ("    model.requires_grad_(False)\n", ""))
def nothing_is_frozen(): ...


@wrong("add_lora", "You freeze only the layers that you replace. The rest of the model is trained along.")
@changed(
    add_lora,
    ("    model.requires_grad_(False)\n", "    for name in chosen:\n        linear[name].requires_grad_(False)\n"),
)
def only_the_replaced_are_frozen(): ...


@wrong("add_lora", "You freeze the model after the replacement, and with it what `make_layer` has added.")
def frozen_last(model, targets, make_layer):
    names = add_lora(model, targets, make_layer)
    model.requires_grad_(False)
    return names


@wrong("add_lora", "A name that matches nothing should raise a ValueError: a typing error would train less than meant.")
@changed(
    add_lora,
    (
        "if lost := [target for target in targets if not any(ends_with(name, target) for name in linear)]:",
        "if lost := []:",
    ),
)
def no_error(): ...


@wrong("add_lora", "You raise the error only if nothing at all is chosen. Each name has to match a layer.")
@changed(
    add_lora,
    (
        "if lost := [target for target in targets if not any(ends_with(name, target) for name in linear)]:",
        "if lost := targets if not any(ends_with(n, t) for t in targets for n in linear) else []:",
    ),
)
def an_error_if_nothing_matches(): ...


@wrong("add_lora", "After the error the model has changed: look at the names before you freeze or replace anything.")
def an_error_too_late(model, targets, make_layer):
    model.requires_grad_(False)
    return add_lora(model, targets, make_layer)


@wrong("add_lora", "You call `make_layer` again for a layer that two targets mean, so that it is wrapped twice.")
def target_by_target(model, targets, make_layer):
    if targets == "all-linear":
        return add_lora(model, targets, make_layer)
    chosen = {target: [] for target in targets}
    for target in targets:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and f".{name}".endswith(f".{target}"):
                chosen[target].append(name)
        if not chosen[target]:
            raise ValueError(target)
    order = [name for name, _ in model.named_modules()]
    model.requires_grad_(False)
    for names in chosen.values():
        for name in names:
            model.set_submodule(name, make_layer(model.get_submodule(name)))
    return sorted({name for names in chosen.values() for name in names}, key=order.index)


@wrong("add_lora", "The names that you return are in another order than in `model.named_modules()`.")
def sorted_by_name(model, targets, make_layer):
    return sorted(add_lora(model, targets, make_layer))


@wrong("add_lora", "You return something else than the list of names.")
def returns_the_model(model, targets, make_layer):
    add_lora(model, targets, make_layer)
    return model


@wrong("add_lora", "You make the new layers and do not put them into the model.")
@changed(
    add_lora,
    (
        "inject_lora(model, {name: make_layer(linear[name]) for name in chosen})",
        "[make_layer(linear[name]) for name in chosen]",
    ),
)
def made_and_forgotten(): ...
