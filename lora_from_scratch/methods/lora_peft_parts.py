"""What PEFT trains beside a LoRA, and hyperparameters that ours does not allow, in terms of our LoRA.

Everything here computes what PEFT computes. What amounts to a trained bias or embedding is read as one, so that
training it further trains the whole bias or embedding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.placement import by_pattern, ends_with
from lora_from_scratch.methods.trained_parts import is_tied
from lora_from_scratch.support.linear_layers import in_and_out, is_linear

TOKENS, EMBEDDING_A, EMBEDDING_B = ".token_adapter.trainable_tokens_delta", ".lora_embedding_A", ".lora_embedding_B"
LORA_BIAS, BASE_BIAS, BASE_WEIGHT = ".lora_B.bias", ".base_layer.bias", ".base_layer.weight"


def parts_from_peft(
    arguments: Mapping[str, Any], config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Take biases, modules and embeddings out of the tensors of an adapter file.

    Args:
        arguments: of our `LoRA`, as far as they are known.
        config: PEFT's.
        tensors: by PEFT's names.
        model: not adapted yet.

    Returns:
        The arguments; the state of the parts that are trained in full, by our names; and the other tensors.

    Raises:
        ValueError: a tensor belongs to a module that the model does not have, or needs a bias that is not there.
    """
    arguments, state, rest = dict(arguments), {}, {}
    names = {key: key.removeprefix(adapter_files.PREFIX) for key in tensors}
    for key, tensor in tensors.items():
        name = names[key]
        if name.endswith(BASE_WEIGHT):
            continue  # PEFT adds the frozen weight of an adapted embedding or output head
        if name.endswith(TOKENS):
            module = name.removesuffix(TOKENS)
            arguments["trainable_token_indices"] = _indices(config, module)
            state[f"{module}.trainable_tokens_delta"] = tensor
        elif name.endswith(EMBEDDING_B):
            module = name.removesuffix(EMBEDDING_B)
            A = tensors[f"{adapter_files.PREFIX}{module}{EMBEDDING_A}"]  # (r, V)
            scaling = _scaling(arguments, module, len(A))
            weight = _module(model, module).weight.detach()
            change = scaling * (tensor.float() @ A.float()).T  # (V, d)
            state[_train(arguments, model, module)] = (weight.float() + change).to(weight.dtype)
        elif not name.endswith(EMBEDDING_A):
            rest[key] = tensor
    rest = _take_biases(arguments, state, rest, model)
    return arguments, state, _take_modules(arguments, state, rest, model)


def _take_biases(
    arguments: dict[str, Any], state: dict[str, Tensor], tensors: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """Biases of the base, and those of B (`lora_bias`): s times a bias of B is a change of the base's."""
    rest = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(adapter_files.PREFIX)
        if name.endswith(BASE_BIAS):
            state[f"{name.removesuffix(BASE_BIAS)}.base.bias"] = tensor
        elif arguments["bias"] == "all" and name.endswith("bias") and not name.endswith(LORA_BIAS):
            state[name] = tensor
        else:
            rest[key] = tensor
    for key in [key for key in rest if key.endswith(LORA_BIAS)]:
        module = key.removeprefix(adapter_files.PREFIX).removesuffix(LORA_BIAS)
        bias = getattr(_module(model, module), "bias", None)
        if not isinstance(bias, Tensor):
            raise ValueError(f"{adapter_files.WEIGHTS_FILE} has {key!r}, and {module} has no bias to add it to")
        scaling = _scaling(arguments, module, len(rest[f"{adapter_files.PREFIX}{module}.lora_A.weight"]))
        place = f"{module}.base.bias"
        state[place] = state.get(place, bias.detach()) + scaling * rest.pop(key).to(bias)
        arguments["bias"] = "lora_only" if arguments["bias"] == "none" else arguments["bias"]
    return rest


def _take_modules(
    arguments: Mapping[str, Any], state: dict[str, Tensor], tensors: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """The tensors of `modules_to_save`."""
    saved = {
        name: module
        for name, module in model.named_modules()
        if any(ends_with(name, end) for end in arguments["modules_to_save"])
    }
    rest = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(adapter_files.PREFIX)
        module = next((module for module in saved if name.startswith(f"{module}.")), None)
        if module is None:
            rest[key] = tensor
        else:
            copied = ".copy" if is_tied(model, saved[module]) else ""
            state[f"{module}{copied}{name.removeprefix(module)}"] = tensor
    return rest


def _train(arguments: dict[str, Any], model: nn.Module, module: str) -> str:
    """Train an embedding in full; return the name that its weight has then."""
    arguments["modules_to_save"] = (*arguments["modules_to_save"], module)
    return f"{module}.copy.weight" if is_tied(model, _module(model, module)) else f"{module}.weight"


def _module(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{adapter_files.WEIGHTS_FILE} has tensors of {name!r}, which this model does not have; "
            "were they made for another one?"
        ) from None


def _indices(config: Mapping[str, Any], module: str) -> list[int]:
    """The token ids whose rows are trained; PEFT gives them for the token embedding, or by the end of a name."""
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if ends_with(module, name)), None)
    if not isinstance(given, list):
        raise ValueError(f"{adapter_files.CONFIG_FILE}: trainable_token_indices gives no ids for {module}")
    return given


def _scaling(arguments: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = by_pattern(arguments["alpha_pattern"], module, arguments["alpha"])
    return float(alpha / (math.sqrt(rank) if arguments["rslora"] else rank))


def fit_hyperparameters(
    arguments: Mapping[str, Any], state: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An equal LoRA whose hyperparameters are in our ranges: alpha above 0, dropout below 1, ranks that fit.

    A negative alpha turns the sign of B and an alpha of 0 makes B zero. A rank above the smaller side of a matrix is
    more than any change of it can have: the product is kept as it is and factored into itself and the identity.
    Dropout of 1 lets nothing through in training, so it can have trained nothing; it is left out.
    """
    arguments, state = dict(arguments), dict(state)
    if arguments["dropout"] == 1:
        arguments["dropout"] = 0.0
    ranks, alphas = {}, {}
    layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    for name in layers.keys() & {key.removesuffix(".lora_A") for key in state if f"{key[:-1]}B" in state}:
        A, B = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        alpha = by_pattern(arguments["alpha_pattern"], name, arguments["alpha"])
        most = min(in_and_out(layers[name]))
        if not _is_number(alpha) or (alpha > 0 and len(A) <= most):
            continue
        scaling, rank = abs(_scaling(arguments, name, len(A))), len(A)
        B = B * ((alpha > 0) - (alpha < 0))
        if rank > most:
            product, rank = (B.double() @ A.double()).to(A), most  # (out, in)
            identity = torch.eye(most).to(A)
            A, B = (identity, product) if product.shape[1] == most else (product, identity)
        state[f"{name}.lora_A"], state[f"{name}.lora_B"] = A, B
        pattern = re.escape(name)
        ranks[pattern] = rank
        alphas[pattern] = (scaling or 1.0) * (math.sqrt(rank) if arguments["rslora"] else rank)
    if _is_number(arguments["alpha"]) and arguments["alpha"] <= 0:
        arguments["alpha"] = abs(arguments["alpha"]) or arguments["rank"]
    positive = {p: alpha for p, alpha in arguments["alpha_pattern"].items() if not _is_number(alpha) or alpha > 0}
    arguments["rank_pattern"] = ranks | dict(arguments["rank_pattern"])
    arguments["alpha_pattern"] = alphas | positive
    return arguments, state


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
