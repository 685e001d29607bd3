"""Unit 09, LoRA in a whole model: mistakes that people make, and other right ways."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import copy
import re

from torch import Tensor, nn

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.methods.lora import LoRALinear

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
    "You set the flags on the tensors of `state_dict()`. They share memory with the parameters, but they are not the "
    "parameters: the flags of the model have not changed.",
)
def on_the_state_dict(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        tensor.requires_grad = last(name) in ("lora_A", "lora_B")


# --- lora_state_dict ------------------------------------------------------------------------------


@right("lora_state_dict")
def a_filtered_state_dict(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if last(name) in {"lora_A", "lora_B"}}


@right("lora_state_dict")
def layer_by_layer(model: nn.Module) -> dict[str, object]:
    found = {}
    for prefix, module in model.named_modules():
        if hasattr(module, "lora_B") and hasattr(module, "lora_A"):
            found |= {f"{prefix}.lora_{x}".strip("."): getattr(module, f"lora_{x}").detach().numpy() for x in "BA"}
    return found


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


@wrong("lora_state_dict", caught_by="another type")
def a_list_of_tensors(model: nn.Module) -> list[Tensor]:
    return [p.detach() for n, p in model.named_parameters() if last(n) in ("lora_A", "lora_B")]
