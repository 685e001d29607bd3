"""How PEFT writes a LoRA and its relatives: the names of its hyperparameters, and of its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.lora_peft_parts import fit_hyperparameters, parts_from_peft
from lora_from_scratch.methods.placement import (
    compile_pattern,
    ends_with,
    find_targets,
    linear_layers,
    matches_end,
    output_head,
)
from lora_from_scratch.methods.trained_parts import BIAS
from lora_from_scratch.support.linear_layers import is_conv1d, is_linear

_LORA_UNDERSTOOD = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "bias",
    "init_lora_weights",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "lora_bias",
)
# `fan_in_fan_out` speaks of the base weight, and PEFT ignores `use_qalora` on any layer but GPTQ's; the rest matters
# only where a feature that we refuse is on, or before the first step.
_LORA_HARMLESS = (
    "fan_in_fan_out",
    "megatron_core",
    "use_qalora",
    "qalora_group_size",
    "runtime_config",
    "loftq_config",
    "eva_config",
)
# That make PEFT add nothing to the adapter. ("SEQ_CLS" adds the classifier, which is trained.)
_TASK_TYPES = ("CAUSAL_LM", None, "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
# Ways to begin. The others ("pissa", "olora", ...) change the base weights as well.
_LORA_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def task_type_of(model: nn.Module) -> str | None:
    """PEFT's name for what a model does with text; None: it does something else, and PEFT wraps it as it is."""
    if isinstance(model, GPT2):
        return "CAUSAL_LM"
    generates = getattr(model, "can_generate", None)  # of transformers
    if not callable(generates) or not generates() or getattr(model, "main_input_name", "") != "input_ids":
        return None
    return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"


def lora_to_peft(method: Any, model: nn.Module, layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's fields and tensors for a LoRA.

    Args:
        method: a `LoRA`.
        model: that is adapted by it.
        layers: its `LoRALinear` in the model, by the names of the layers that they wrap.

    PEFT has no LoRA on a part of a fused matrix. n LoRAs of rank r on n parts are one LoRA of rank n r on the
    whole, with the A stacked and the B on a block diagonal; its alpha is n alpha (rsLoRA: sqrt(n) alpha), so that
    the scaling stays. That is what is written, and what is read back is that LoRA: equal, but free to fill the
    zeros when it is trained further.
    """
    task_type = task_type_of(model)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        **({"task_type": task_type} if task_type else {}),
        "r": method.rank,
        "lora_alpha": method.alpha,
        "target_modules": method.targets if isinstance(method.targets, str) else list(method.targets),
    }
    if method.targets == "all-linear" and not task_type and output_head(model) is not None:
        config["target_modules"] = list(layers)  # PEFT leaves a classifier out for a task type that would train it
    if any(is_conv1d(layer.base) for layer in layers.values()):
        config["fan_in_fan_out"] = True  # GPT-2's Conv1D keeps its weight as (in, out)
    patterns: dict[str, dict[str, Any]] = {
        "rank_pattern": dict(method.rank_pattern),
        "alpha_pattern": dict(method.alpha_pattern),
    }
    if any(layer.parts for layer in layers.values()):
        count = {name: max(1, len(layer.parts)) for name, layer in layers.items()}  # n
        ranks = {name: layer.rank * count[name] for name, layer in layers.items()}
        growth = {name: math.sqrt(n) if method.rslora else n for name, n in count.items()}
        alphas = {name: _tidy(layer.alpha * growth[name]) for name, layer in layers.items()}
        config["target_modules"] = list(layers)
        config["r"], config["lora_alpha"] = next(iter(ranks.values())), next(iter(alphas.values()))
        patterns["rank_pattern"] = {name: rank for name, rank in ranks.items() if rank != config["r"]}
        patterns["alpha_pattern"] = {name: alpha for name, alpha in alphas.items() if alpha != config["lora_alpha"]}
    optional = {"lora_dropout": method.dropout, "use_rslora": method.rslora, **patterns}
    config.update({name: value for name, value in optional.items() if value})
    tensors = {}
    for name, layer in layers.items():
        A, B = layer.factors()
        tensors[f"{adapter_files.PREFIX}{name}.lora_A.weight"] = A  # (r, in), whatever `fan_in_fan_out` says
        tensors[f"{adapter_files.PREFIX}{name}.lora_B.weight"] = B  # (out, r)
    parts = {"bias": method.bias, "modules_to_save": list(method.modules_to_save)}
    parts["trainable_token_indices"] = list(method.trainable_token_indices)
    config.update({name: value for name, value in parts.items() if value and value != "none"})
    return config, tensors | _parts_to_peft(method.trainable(model))


def _parts_to_peft(trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is trained beside A and B, under PEFT's names: biases, and modules to save."""
    others = {name: tensor for name, tensor in trained.items() if ".lora_" not in f".{name}"}
    return {adapter_files.PREFIX + _part_in_peft(name): tensor for name, tensor in others.items()}


def _part_in_peft(name: str) -> str:
    name = name.replace(".base.bias", ".base_layer.bias").replace(".copy.", ".")
    return name.replace(".trainable_tokens_delta", ".token_adapter.trainable_tokens_delta")


def lora_from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of `LoRA` and its state under our names, for a model that is not adapted yet.

    What a person types is taken strictly, what PEFT wrote generously: as in PEFT, names and patterns that match nothing
    are ignored as long as another one matches, and values that do not affect the result may be anything.

    Raises:
        ValueError: a field or a tensor that a LoRA does not have here.
    """
    adapter_files.refuse_unknown_fields(config, _LORA_UNDERSTOOD, _LORA_HARMLESS)
    adapter_files.refuse_other_values(config, "bias", BIAS)
    adapter_files.refuse_other_values(config, "init_lora_weights", _LORA_INITS)
    adapter_files.refuse_other_values(config, "task_type", _TASK_TYPES)
    targets = config.get("target_modules")
    if not isinstance(targets, str | list) or not targets:
        raise ValueError(
            f"{adapter_files.CONFIG_FILE}: target_modules must be names or a regular expression, got {targets!r}"
        )
    names = targets_in_peft(config, model)
    if not _means(model, targets, names):
        targets = names
    arguments = {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "targets": targets,
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": config.get("use_rslora", False),
        "bias": config.get("bias", "none"),
        "modules_to_save": config.get("modules_to_save") or (),
    }
    for name in ("rank_pattern", "alpha_pattern"):
        values = config.get(name) or {}
        if not isinstance(values, dict):
            raise ValueError(
                f"{adapter_files.CONFIG_FILE}: {name} must be an object of names and numbers, got {values!r}"
            )
        arguments[name] = {
            pattern: value for pattern, value in values.items() if any(matches_end(pattern, target) for target in names)
        }
    arguments, state, rest = parts_from_peft(arguments, config, tensors, model)
    return fit_hyperparameters(arguments, state | lora_state_from_peft(rest), model)


def targets_in_peft(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The linear layers that PEFT adapts, by the rules of its `check_target_module_exists`."""
    targets: Any = config["target_modules"]
    excluded, layers = config.get("exclude_modules"), config.get("layers_to_transform")
    if targets == "all-linear":
        names = list(linear_layers(model))
    else:
        names = [name for name, module in model.named_modules() if is_linear(module) and _is_one_of(name, targets)]
    if not names:
        find_targets(model, targets)  # its message names what the model has
    saved = [rf"(.*\.)?{name}(\..*)?" for name in config.get("modules_to_save") or ()]
    names = [name for name in names if not any(compile_pattern(pattern).fullmatch(name) for pattern in saved)]
    names = [name for name in names if not (excluded and _is_one_of(name, excluded))]
    if layers is not None and layers != [] and isinstance(targets, list):
        layers = [layers] if isinstance(layers, int) else layers
        if not isinstance(layers, list):
            raise ValueError(
                f"{adapter_files.CONFIG_FILE}: layers_to_transform must be numbers of blocks, got {layers!r}"
            )
        patterns = config.get("layers_pattern") or r"[^.]*"
        patterns = [patterns] if isinstance(patterns, str) else patterns
        names = [name for name in names if layer_index(name, patterns) in layers]
    if not names:
        raise ValueError(f"{adapter_files.CONFIG_FILE}: no layer is left of target_modules={targets!r}")
    return names


def _is_one_of(name: str, targets: Sequence[str] | str) -> bool:
    """Whether a module's name matches one regular expression, or ends with one of several names."""
    if isinstance(targets, str):
        return compile_pattern(targets).fullmatch(name) is not None
    return any(ends_with(name, target) for target in targets)


def _means(model: nn.Module, targets: Sequence[str] | str, names: Sequence[str]) -> bool:
    """Whether these targets mean exactly the layers of these names here too."""
    try:
        return find_targets(model, targets) == dict.fromkeys(names, ())
    except ValueError:
        return False


def lora_state_from_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter file under the names that they have in the model.

    PEFT puts a prefix (`base_model.model.`) before a module's name, and a suffix (`.weight`) after lora_A and lora_B:

        base_model.model.transformer.h.0.attn.c_attn.lora_A.weight   ->   transformer.h.0.attn.c_attn.lora_A

    A is (r, in) and B is (out, r) in both, also where the base weight is a Conv1D's and so (in, out).

    Args:
        tensors: by PEFT's names. The name of a module may be anything.

    Returns:
        The same tensors, in the same order.

    Raises:
        ValueError: a name that is not made like this. It belongs to something that a plain LoRA does not have, such as
            the `lora_magnitude_vector` of DoRA, and without it the adapter would be another one.
    """
    state = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(adapter_files.PREFIX).removesuffix(".weight")
        if key != f"{adapter_files.PREFIX}{name}.weight" or not name.endswith((".lora_A", ".lora_B")):
            raise ValueError(
                f"{adapter_files.WEIGHTS_FILE} has {key!r}; "
                f"a LoRA has only names like {adapter_files.PREFIX}(module).lora_A.weight"
            )
        state[name] = tensor
    return state


def layer_index(module: str, patterns: Sequence[str] = (r"[^.]*",)) -> int | None:
    """The number of the block that a module is in, as PEFT's `layers_to_transform` counts.

    Args:
        patterns: what stands before the number, regular expressions; any name by default.
    """
    found = (compile_pattern(rf"(?:.*?\.)?{pattern}\.(\d+)\..*").fullmatch(module) for pattern in patterns)
    match = next((match for match in found if match), None)
    return int(match[1]) if match else None


def _tidy(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
