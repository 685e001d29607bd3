"""Unit 09, LoRA in a whole model: mistakes that people make, and other right ways."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import copy
import re

from torch import nn

from lora_from_scratch.checks.bank import right, wrong

# --- inject_lora ----------------------------------------------------------------------------------


@right("inject_lora")
def walks_down_the_name(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        *path, child = name.split(".")
        parent = model
        for step in path:
            parent = getattr(parent, step)
        parent._modules[child] = layer


@right("inject_lora")
def looks_for_the_holder(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    for prefix, parent in list(model.named_modules()):
        for child in list(dict(parent.named_children())):
            name = f"{prefix}.{child}" if prefix else child
            if name in layers:
                setattr(parent, child, layers[name])
    return model


@right("inject_lora")
def pytorchs_own_function(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name in layers:
        model.set_submodule(name, layers[name])


@right("inject_lora")
def from_the_root_downwards(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for child, module in list(model._modules.items()):
        below = {
            name.removeprefix(f"{child}."): layer for name, layer in layers.items() if name.startswith(f"{child}.")
        }
        from_the_root_downwards(module, below)
        if child in layers:
            model._modules[child] = layers[child]


@wrong(
    "inject_lora",
    "You set an attribute of the model whose name contains dots. The layer is registered and counted, but never "
    "called: which module calls the old layer?",
)
def a_name_with_dots(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        model._modules[name] = layer


@wrong(
    "inject_lora",
    "You match the last part of the name, so every layer with that last part is replaced. A full name identifies one "
    "layer.",
)
def everything_of_that_name(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        child = name.rpartition(".")[2]
        for parent in [module for module in model.modules() if module not in layers.values()]:
            if child in dict(parent.named_children()):
                setattr(parent, child, layer)


@wrong(
    "inject_lora",
    "You compare the ends of the names: a short name such as `attn` is also the end of `h.0.attn`. A full name "
    "identifies one layer.",
)
def the_end_of_a_name(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    new = {id(layer) for layer in layers.values()}
    for full, module in list(model.named_modules()):
        for name, layer in layers.items():
            if full.endswith(name) and id(module) not in new:
                parent, _, child = full.rpartition(".")
                setattr(model.get_submodule(parent), child, layer)


@wrong(
    "inject_lora",
    "You put a new layer around the given one, or build one of your own. Put in the very layer that is given.",
)
def wrapped_once_more(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    looks_for_the_holder(model, {name: nn.Sequential(layer) for name, layer in layers.items()})


@wrong(
    "inject_lora",
    "Modules that are not named are replaced as well: you rebuild or copy the model around the new layers.",
)
def copies_of_all_others(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for child, module in list(model.named_children()):
        setattr(model, child, copy.deepcopy(module))
    looks_for_the_holder(model, layers)


@wrong(
    "inject_lora",
    "You split the name at its first dot. The module that holds the layer is everything before the last dot.",
)
def cut_at_the_first_dot(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, child = name.partition(".")
        if child:
            getattr(model, parent)._modules[child] = layer
        else:
            setattr(model, parent, layer)


@wrong(
    "inject_lora",
    "The name of a layer that the model itself holds has no dot. Yours is lost in that case: the module that holds it "
    "is the model.",
)
def only_names_with_dots(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, dot, child = name.rpartition(".")
        if dot:
            setattr(model.get_submodule(parent), child, layer)


@wrong(
    "inject_lora",
    "The given model is unchanged: you replace the layers of a copy, or only assign to a local variable.",
)
def of_a_copy(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    model = copy.deepcopy(model)
    looks_for_the_holder(model, layers)
    return model


@wrong(
    "inject_lora",
    "You insert copies of the layers. The caller, and an optimiser that has the layers' parameters, then hold other "
    "tensors than the model.",
)
def copies_of_the_layers(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    looks_for_the_holder(model, copy.deepcopy(layers))


@wrong("inject_lora", "Only the first of the layers is inserted: is there a `return` or a `break` inside the loop?")
def only_the_first(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    looks_for_the_holder(model, dict(list(layers.items())[:1]))


@wrong(
    "inject_lora",
    "You load the new layer's weights into the old layer. The old layer is still in the model, and it does not compute "
    "LoRA.",
)
def copies_weights(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        model.get_submodule(name).load_state_dict(layer.state_dict(), strict=False)


# --- mark_only_lora_as_trainable ------------------------------------------------------------------


def last(name: str) -> str:
    return name.split(".")[-1]


@right("mark_only_lora_as_trainable")
def everything_off_then_some_on(model: nn.Module) -> None:
    model.requires_grad_(False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("lora_A", "lora_B"):
                parameter.requires_grad = True


@right("mark_only_lora_as_trainable")
def by_a_pattern(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = re.fullmatch(r"(.+\.)?lora_[AB]", name) is not None
    return model


@right("mark_only_lora_as_trainable")
def module_by_module_and_down(model: nn.Module) -> None:
    for name, parameter in model._parameters.items():
        if parameter is not None:
            parameter.requires_grad = name in {"lora_A", "lora_B"}
    for child in model.children():
        module_by_module_and_down(child)


@right("mark_only_lora_as_trainable")
def two_groups_of_parameters(model: nn.Module) -> None:
    ours, rest = nn.ParameterList(), nn.ParameterList()
    for name, parameter in dict(model.named_parameters()).items():
        (ours if ("." + name).endswith((".lora_A", ".lora_B")) else rest).append(parameter)
    ours.requires_grad_(True)
    rest.requires_grad_(False)


@wrong(
    "mark_only_lora_as_trainable",
    "Everything is frozen now, including A and B: there is nothing left to train. If you look for layers of your own "
    "class: LoRA layers may be of other classes, so go by the names of the parameters.",
)
def freezes_everything(model: nn.Module) -> None:
    model.requires_grad_(False)


@wrong(
    "mark_only_lora_as_trainable",
    "You freeze the others, but never unfreeze A and B. If they were frozen before, they remain frozen.",
)
def switches_nothing_on(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if last(name) not in ("lora_A", "lora_B"):
            parameter.requires_grad = False


@wrong(
    "mark_only_lora_as_trainable",
    "You unfreeze A and B but freeze nothing: the base is trained as well, and that is full fine-tuning.",
)
def freezes_nothing(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if last(name) in ("lora_A", "lora_B"):
            parameter.requires_grad = True


@wrong(
    "mark_only_lora_as_trainable",
    'You look for "lora" anywhere in the name. "exploration" contains it too, and so does every parameter of a '
    "module with such a name: look at the last part only.",
)
def lora_anywhere(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora" in name


@wrong(
    "mark_only_lora_as_trainable",
    'You look for "lora_" anywhere in the name, as loralib does. That also matches a module or a parameter whose '
    "name only begins that way: the last part has to equal one of the two names.",
)
def lora_underscore_anywhere(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name


@wrong(
    "mark_only_lora_as_trainable", "You train B only. A is trained as well (LoRA-FA is the variant that trains only B)."
)
def b_only(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = last(name) == "lora_B"


@wrong(
    "mark_only_lora_as_trainable",
    'You ask whether the name ends in "lora_A" or "lora_B". So does the name "no_lora_B": the whole last part, after '
    "the last dot, has to be equal.",
)
def a_name_that_ends_so(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith(("lora_A", "lora_B"))


@wrong(
    "mark_only_lora_as_trainable",
    'You look for a dot before "lora_A" or "lora_B". If the model is itself a LoRA layer, its parameters have names '
    "without a dot.",
)
def with_a_dot_before_it(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith((".lora_A", ".lora_B"))


@wrong(
    "mark_only_lora_as_trainable",
    "One of the parts of the name is lora_A or lora_B, but not the last: a module may have such a name too.",
)
def any_part_of_the_name(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not {"lora_A", "lora_B"}.isdisjoint(name.split("."))


@wrong("mark_only_lora_as_trainable", "You train A only. Then B stays zero, and so does B A.")
def a_only(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = last(name) == "lora_A"


@wrong(
    "mark_only_lora_as_trainable",
    "The biases are still trained. That is a method of its own (BitFit); here only A and B are trained.",
)
def biases_too(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = last(name) in ("lora_A", "lora_B", "bias")


@wrong("mark_only_lora_as_trainable", "The flags are inverted: what should be trained is frozen, and the reverse.")
def the_wrong_way_round(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = last(name) not in ("lora_A", "lora_B")


@wrong(
    "mark_only_lora_as_trainable",
    "No flag of the model has changed. If you set them on the tensors of `state_dict()`: these share memory with the "
    "parameters, but they are not the parameters.",
)
def on_the_state_dict(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        tensor.requires_grad = last(name) in ("lora_A", "lora_B")
