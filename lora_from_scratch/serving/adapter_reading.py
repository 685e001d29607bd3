"""What serving needs of an adapter directory, ours or PEFT's: A, s B and, for a DoRA, g of each layer.

Whatever merges to W + s B A can share a batch: LoRA (also rsLoRA and LoRA+), PiSSA, AdaLoRA, and other methods here
whose layers make an A and a B. DoRA merges to (m / ||V||) (W + s B A). With g = m / ||V|| - 1 for each output, that is

    y = W x + b + g W x + (1 + g) s B A x

so that one more row of numbers is enough for it. What else can be trained (biases, embeddings, whole modules, prompts)
would be another base model for these rows, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.adapter_files import PREFIX, read_adapter, refuse_misfits
from lora_from_scratch.methods.dora import DoRALinear
from lora_from_scratch.methods.lora import LoRA, LoRALinear, lora_layers, lora_scaling
from lora_from_scratch.methods.lora_peft import targets_in_peft
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.pissa import PiSSA, as_lora
from lora_from_scratch.methods.placement import by_pattern
from lora_from_scratch.methods.registry import load_adapter, method_classes
from lora_from_scratch.support.linear_layers import in_and_out


class LayerFactors(NamedTuple):
    """One LoRA in one layer, as it is stored in the pool: in rows."""

    A: Tensor  # (r, in)
    B: Tensor  # (r, out): s B transposed
    gain: Tensor | None = None  # (out,): g of a DoRA


AdapterFactors = dict[str, LayerFactors]  # by the name of the layer

MOST_RECIPES = 1000  # that are remembered


class AdapterReader:
    """Reads adapters for one model.

    What a configuration means for the model's layers is worked out once and remembered: thousands of adapters are
    usually trained with a few recipes.

    Args:
        model: not adapted; it stays as it is.
    """

    def __init__(self, model: GPT2) -> None:
        self.model = model
        self.recipes: dict[str, Recipe] = {}  # by the text of the configuration

    @torch.no_grad()
    def read(self, directory: str | Path) -> AdapterFactors:
        """Read an adapter directory. The weights are mapped into memory, and of a LoRA no layer is built.

        Raises:
            FileNotFoundError: there is no such directory, or a file is not in it.
            ValueError: damaged, made for another model, or of a method that cannot share a batch.
        """
        try:
            config, tensors = read_adapter(directory)
            text = json.dumps(config, sort_keys=True)
            recipe = self.recipes.get(text)
            if recipe is None and _is_plain_lora(config):
                recipe, fitted = _lora_recipe(self.model, config, tensors)
                as_in_file = all(tensors.get(name) is tensor for name, tensor in fitted.items())
                if as_in_file and len(self.recipes) < MOST_RECIPES:
                    self.recipes[text] = recipe
                tensors = fitted
            return _of_any_method(self.model, directory) if recipe is None else recipe.factors(tensors)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{directory}: ")) from None


@dataclass(frozen=True)
class Recipe:
    """What the configuration of a LoRA means for a model: by the name of the layer, its scaling and its shape."""

    scalings: Mapping[str, float]
    shapes: Mapping[str, Size]  # of each tensor that the file must have, by its name there

    def factors(self, tensors: Mapping[str, Tensor]) -> AdapterFactors:
        refuse_misfits(self.shapes, tensors)
        return {
            name: LayerFactors(tensors[f"{PREFIX}{name}.lora_A.weight"], s * tensors[f"{PREFIX}{name}.lora_B.weight"].T)
            for name, s in self.scalings.items()
        }


def _is_plain_lora(config: Mapping[str, Any]) -> bool:
    """Whether `LoRA` itself is the method that reads it."""
    classes = sorted(method_classes().values(), key=lambda cls: -len(cls.__mro__))  # a variant is asked first
    return next((cls for cls in classes if cls.peft_type and cls.reads(config)), None) is LoRA


def _lora_recipe(
    model: GPT2, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Recipe, dict[str, Tensor]]:
    """The recipe, and the file's tensors, changed where our LoRA has other ranges (a negative alpha)."""
    method, state = LoRA.from_adapter(config, tensors, model)
    _refuse_other_parts(method)
    scalings, shapes = {}, {}
    for name in targets_in_peft(config, model):
        inputs, outputs = in_and_out(model.get_submodule(name))
        rank = by_pattern(method.rank_pattern, name, method.rank)
        scalings[name] = lora_scaling(rank, by_pattern(method.alpha_pattern, name, method.alpha), method.rslora)
        shapes[f"{PREFIX}{name}.lora_A.weight"] = Size((rank, inputs))
        shapes[f"{PREFIX}{name}.lora_B.weight"] = Size((outputs, rank))
    return Recipe(scalings, shapes), {f"{PREFIX}{name}.weight": tensor for name, tensor in state.items()}


def _of_any_method(model: GPT2, directory: str | Path) -> AdapterFactors:
    """Adapt a second model, which shares the weights of the first one, and take the factors out of its layers."""
    with torch.device("meta"):  # shapes without memory
        twin = GPT2(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    method = load_adapter(twin, directory)
    if isinstance(method, PiSSA):
        recipe, tensors = _lora_recipe(model, *as_lora(method, twin))
        return recipe.factors(tensors)
    layers = lora_layers(twin)
    learned = {name for name in method.trainable(twin) if not any(name.startswith(f"{layer}.") for layer in layers)}
    if not all(_is_served(layer) for layer in layers.values()) or not layers:
        raise ValueError(_refusal(method, "its change of a weight is not s B A"))
    _refuse_other_parts(method)
    if learned and not _made_by_layers(method):
        raise ValueError(_refusal(method, f"it also trains {sorted(learned)[0]}"))
    return {name: _of_layer(layer) for name, layer in layers.items()}


def _made_by_layers(method: Method) -> bool:
    """Whether what is trained outside the layers is only what they make their factors of (Tied-LoRA, VeRA)."""
    return not isinstance(method, LoRA)


def _is_served(layer: LoRALinear) -> bool:
    """Whether a layer adds s B A x with the A and B of `factors`, or is a DoRA's."""
    own = LoRALinear
    kind = type(layer)
    return kind is DoRALinear or (kind.middle, kind.combine, kind.change, kind.forward) == (
        own.middle,
        own.combine,
        own.change,
        own.forward,
    )


def _of_layer(layer: LoRALinear) -> LayerFactors:
    A, B = layer.factors()
    B = layer.scaling * B.T
    if not isinstance(layer, DoRALinear):
        return LayerFactors(A, B)
    ratio = layer.lora_magnitude / layer.norms().clamp_min(torch.finfo(torch.float32).tiny)  # m / ||V||
    return LayerFactors(A, ratio * B, ratio - 1)


def _refuse_other_parts(method: Method) -> None:
    """A LoRA may train biases, modules and embeddings as well."""
    for name in ("bias", "modules_to_save", "trainable_token_indices"):
        value = getattr(method, name, None)
        if value and value != "none":
            raise ValueError(_refusal(method, f"it has {name}={value!r}"))


def _refusal(method: Method, why: str) -> str:
    return (
        f"an adapter of the method {method.name} cannot share a batch with others here: {why}; merge it into the model"
    )
