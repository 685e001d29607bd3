"""Reading what the server needs from an adapter directory, ours or PEFT's: A and s B of each layer, and g for DoRA.

Any method that merges to W + s B A can share a batch: LoRA (also rsLoRA and LoRA+), PiSSA, AdaLoRA, and other methods
of this package whose layers compute an A and a B. DoRA merges to (m / ||V||) (W + s B A). With g = m / ||V|| - 1 for
each output, this is

    y = W x + b + g W x + (1 + g) s B A x

so DoRA needs one additional row of numbers. An adapter that also trains biases, embeddings, whole modules or prompts
would need a base model of its own, and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from lora_from_scratch.methods.adapter_files import PREFIX, read_adapter, refuse_misfits
from lora_from_scratch.methods.dora import DoRALinear
from lora_from_scratch.methods.lora import LoRA, LoRALinear, lora_layers, lora_scaling
from lora_from_scratch.methods.lora_peft import targets_in_peft
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.pissa import PiSSA, as_lora
from lora_from_scratch.methods.placement import by_pattern, linear_layers
from lora_from_scratch.methods.registry import load_adapter, method_classes
from lora_from_scratch.models.checkpoint import LanguageModel
from lora_from_scratch.serving.shared_weights import twin_of
from lora_from_scratch.support.linear_layers import in_and_out
from lora_from_scratch.support.wrapped import unwrapped


class LayerFactors(NamedTuple):
    """One LoRA in one layer, in the layout in which the pool stores it: as rows."""

    A: Tensor  # (r, in)
    B: Tensor  # (r, out): s B transposed
    gain: Tensor | None = None  # (out,): g, for DoRA only


AdapterFactors = dict[str, LayerFactors]  # layer name -> factors

MOST_RECIPES = 1000  # the maximum number of cached recipes


class AdapterReader:
    """Reads adapters for one model.

    The layers that a configuration selects are determined once and cached, because even thousands of adapters usually
    share a few configurations.

    Args:
        model: a model without adapters; it is not modified.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = unwrapped(model)
        self.layers = linear_layers(self.model)  # those that an adapter may change, by name
        self.recipes: dict[str, Recipe] = {}  # configuration as JSON -> recipe

    @torch.no_grad()
    def read(self, directory: str | Path) -> AdapterFactors:
        """Read an adapter directory. The weights are memory-mapped, and a LoRA is read without building its layers.

        Raises:
            FileNotFoundError: the directory or one of its files does not exist.
            ValueError: the adapter is damaged, was made for another model, or uses a method that cannot share a batch.
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
            factors = _of_any_method(self.model, directory) if recipe is None else recipe.factors(tensors)
            if others := factors.keys() - self.layers.keys():
                raise ValueError(f"the adapter changes {min(others)}, which all requests share")
            return factors
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{directory}: ")) from None


@dataclass(frozen=True)
class Recipe:
    """The scalings and tensor shapes that a LoRA configuration implies for a model."""

    scalings: Mapping[str, float]  # layer name -> s
    shapes: Mapping[str, Size]  # name in the file -> shape, for every required tensor

    def factors(self, tensors: Mapping[str, Tensor]) -> AdapterFactors:
        refuse_misfits(self.shapes, tensors)
        return {
            name: LayerFactors(tensors[f"{PREFIX}{name}.lora_A.weight"], s * tensors[f"{PREFIX}{name}.lora_B.weight"].T)
            for name, s in self.scalings.items()
        }


def _is_plain_lora(config: Mapping[str, Any]) -> bool:
    """Whether the configuration belongs to `LoRA` itself, not to a variant of it."""
    classes = sorted(method_classes().values(), key=lambda cls: -len(cls.__mro__))  # try variants before LoRA
    return next((cls for cls in classes if cls.peft_type and cls.reads(config)), None) is LoRA


def _lora_recipe(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Recipe, dict[str, Tensor]]:
    """The recipe and the file's tensors, converted where our LoRA allows fewer values (no negative alpha)."""
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


def _of_any_method(model: nn.Module, directory: str | Path) -> AdapterFactors:
    """Adapt a second model that shares the weights of the first, and extract the factors from its layers."""
    twin = twin_of(model)
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
    """Whether the parameters trained outside the layers only serve to compute their factors (Tied-LoRA, VeRA)."""
    return not isinstance(method, LoRA)


def _is_served(layer: LoRALinear) -> bool:
    """Whether a layer adds s B A x, with A and B from `factors`, or is a DoRA layer."""
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
    """Refuse a LoRA that also trains biases, modules or embeddings."""
    for name in ("bias", "modules_to_save", "trainable_token_indices"):
        value = getattr(method, name, None)
        if value and value != "none":
            raise ValueError(_refusal(method, f"it has {name}={value!r}"))


def _refusal(method: Method, why: str) -> str:
    return (
        f"an adapter of the method {method.name} cannot share a batch with others here: {why}; merge it into the model"
    )
