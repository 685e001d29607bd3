"""Adapter directories that PEFT reads and writes: `adapter_config.json` and `adapter_model.safetensors`.

The first half knows files and fields and serves every method. After it comes what is particular to one
method, in plain dictionaries: how PEFT names its hyperparameters and its tensors. Checked with peft 0.21.

Three rules. Only what differs from PEFT's defaults is written, because older releases refuse fields that they
do not know. A field that would change the arithmetic and is not supported is refused by name. What PEFT itself
writes when a feature is off (null, false, an empty list) is read without complaint, known feature or not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_from_scratch.support.files import write_directory_atomically

if TYPE_CHECKING:
    from lora_from_scratch.gpt2.config import GPT2Config
    from lora_from_scratch.methods.lora import LoRA, LoRALinear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

PREFIX = "base_model.model."  # PEFT's wrapper and its tuner, in front of the name of every module

# Fields of every PEFT configuration that say nothing about the arithmetic.
_HARMLESS = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
    "peft_version",
}


# --- Files and fields, for every method --------------------------------------------------------------


def write_adapter(directory: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files: whole or not at all, and the same bytes for the same adapter.

    Raises:
        OSError: the place cannot be written.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(folder: Path) -> None:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        try:
            save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"cannot write {directory}/{WEIGHTS_FILE}: {_first_line(error)}") from None

    write_directory_atomically(directory, write)


def read_adapter(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read both files.

    Raises:
        FileNotFoundError: the directory or one of the files is not there.
        ValueError: one of them is damaged.
    """
    config_file, weights_file = Path(directory) / CONFIG_FILE, Path(directory) / WEIGHTS_FILE
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"there is no adapter directory {directory}")
    for file in (config_file, weights_file):
        if not file.exists():
            raise FileNotFoundError(f"{directory} is not an adapter directory: {file.name} is not in it")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{CONFIG_FILE} is not a readable JSON file: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE} must hold one JSON object, got a {type(config).__name__}")
    try:
        return config, load_file(weights_file)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{WEIGHTS_FILE} is damaged: {_first_line(error)}") from None


def refuse_unknown_fields(
    config: Mapping[str, Any], understood: Collection[str], harmless: Collection[str] = ()
) -> None:
    """Stop at a field that could change the arithmetic and that nobody here looks at.

    Args:
        config: what `adapter_config.json` holds.
        understood: the fields that the method reads.
        harmless: fields that can have any value without changing what the adapter computes.

    Raises:
        ValueError: names the field, its value and the fields that are understood.
    """
    for name, value in config.items():
        known = name in understood or name in harmless or name in _HARMLESS
        if not known and not _is_off(value):
            raise ValueError(
                f"{CONFIG_FILE} has {name}={value!r}, which is not supported; "
                f"it has to be absent or null. Supported fields: {', '.join(sorted(understood))}"
            )


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- LoRA and rsLoRA -----------------------------------------------------------------------------------

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
)
# `fan_in_fan_out` speaks of the base weight; the rest matters only where a feature that we refuse is on,
# or before the first step.
_LORA_HARMLESS = ("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config")
# Ways to begin. The others ("pissa", "olora", ...) change the base weights as well.
_LORA_INITS = (True, False, "gaussian", "eva", "orthogonal")


def lora_to_peft(method: LoRA, layers: Mapping[str, LoRALinear]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's fields and tensors for a LoRA whose layers are given by name.

    PEFT has no LoRA on a part of a fused matrix. n LoRAs of rank r on n parts are one LoRA of rank n r on the
    whole, with the A stacked and the B on a block diagonal; its alpha is n alpha (rsLoRA: sqrt(n) alpha), so that
    the scaling stays. That is what is written, and what is read back is that LoRA: equal, but free to fill the
    zeros when it is trained further.
    """
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": method.rank,
        "lora_alpha": method.alpha,
        "target_modules": method.targets if isinstance(method.targets, str) else list(method.targets),
        "fan_in_fan_out": True,  # GPT-2's Conv1D keeps its weight as (in, out)
    }
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
        tensors[f"{PREFIX}{name}.lora_A.weight"] = A  # (r, in), whatever `fan_in_fan_out` says
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B  # (out, r)
    return config, tensors


def lora_from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], list[int] | None, dict[str, Tensor]]:
    """The arguments of `LoRA`, the layers it is limited to (None: all), and its state under our names.

    Raises:
        ValueError: a field or a tensor that a plain LoRA does not have.
    """
    refuse_unknown_fields(config, _LORA_UNDERSTOOD, _LORA_HARMLESS)
    _refuse_other_values(config, "bias", ("none",))
    _refuse_other_values(config, "init_lora_weights", _LORA_INITS)
    _refuse_other_values(config, "task_type", ("CAUSAL_LM", None))
    targets = config.get("target_modules")
    if not isinstance(targets, str | list) or not targets:
        raise ValueError(f"{CONFIG_FILE}: target_modules must be names or a regular expression, got {targets!r}")
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or None
    if layers is not None and not isinstance(layers, list):
        raise ValueError(f"{CONFIG_FILE}: layers_to_transform must be numbers of blocks, got {layers!r}")
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for name, pattern in patterns.items():
        if not isinstance(pattern, dict):
            raise ValueError(f"{CONFIG_FILE}: {name} must be an object of names and numbers, got {pattern!r}")
    arguments = {
        "rank": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "targets": targets,
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": config.get("use_rslora", False),
        **patterns,
    }
    return arguments, layers, lora_state_from_peft(tensors)


def lora_state_from_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter file under the names that they have in the model.

    PEFT writes "base_model.model." (`PREFIX`) in front of a module's name, and ".weight" behind lora_A and lora_B:

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
        name = key.removeprefix(PREFIX).removesuffix(".weight")
        if key != f"{PREFIX}{name}.weight" or not name.endswith((".lora_A", ".lora_B")):
            raise ValueError(f"{WEIGHTS_FILE} has {key!r}; a LoRA has only names like {PREFIX}(module).lora_A.weight")
        state[name] = tensor
    return state


def layer_index(module: str) -> int | None:
    """The number of the block that a module is in, as PEFT's `layers_to_transform` counts: the first in its name."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return int(found[1]) if found else None


def _refuse_other_values(config: Mapping[str, Any], name: str, allowed: Sequence[Any]) -> None:
    if config.get(name, allowed[0]) not in allowed:
        wanted = ", ".join(repr(value) for value in allowed)
        raise ValueError(f"{CONFIG_FILE} has {name}={config[name]!r}, which is not supported; supported: {wanted}")


def _tidy(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


# --- Soft prompt and prefix ----------------------------------------------------------------------------

_PROMPT_KEY = "prompt_embeddings"
# What a field of the base model's is called in PEFT and in our config; None in a file says nothing.
_MODEL_FIELDS = {"token_dim": "n_embd", "num_layers": "n_layer", "num_attention_heads": "n_head"}
_PROMPT_UNDERSTOOD = ("num_virtual_tokens", "num_transformer_submodules", *_MODEL_FIELDS)
# How the prompt began, and the MLP that PEFT itself throws away when it saves.
_PROMPT_HARMLESS = (
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "prefix_projection",
    "encoder_hidden_size",
    "init_weights",
)


def virtual_tokens_to_peft(
    peft_type: str, length: int, embeddings: Tensor, model: GPT2Config
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's fields and its one tensor for a soft prompt (P, d) or a folded prefix (P, 2 L d)."""
    config = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1,
        **{theirs: getattr(model, ours) for theirs, ours in _MODEL_FIELDS.items()},
    }
    return config, {_PROMPT_KEY: embeddings}


def virtual_tokens_from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: GPT2Config
) -> tuple[int, Tensor]:
    """How many virtual tokens there are, and the tensor.

    Raises:
        ValueError: a field that is not supported, a prompt made for another model, or other tensors.
    """
    refuse_unknown_fields(config, _PROMPT_UNDERSTOOD, _PROMPT_HARMLESS)
    _refuse_other_values(config, "task_type", ("CAUSAL_LM", None))
    _refuse_other_values(config, "num_transformer_submodules", (1, None))
    for theirs, ours in _MODEL_FIELDS.items():
        given, own = config.get(theirs), getattr(model, ours)
        if given is not None and given != own:
            raise ValueError(f"{CONFIG_FILE} has {theirs}={given!r}: made for another model; this one has {own}")
    if set(tensors) != {_PROMPT_KEY}:
        raise ValueError(f"{WEIGHTS_FILE} must hold one tensor, {_PROMPT_KEY}; it holds {', '.join(tensors) or 'none'}")
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int):
        raise ValueError(f"{CONFIG_FILE}: num_virtual_tokens must be a whole number, got {length!r}")
    return length, tensors[_PROMPT_KEY]


# --- LLaMA-Adapter -------------------------------------------------------------------------------------

_GATE = "adaption_gate"


def llama_adapter_to_peft(length: int, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's fields and tensors: (module).adaption_prompt and (module).adaption_gate."""
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "task_type": "CAUSAL_LM",
        "target_modules": "attn",
        "adapter_len": length,
        "adapter_layers": sum(name.endswith(_GATE) for name in state),
    }
    return config, {f"{PREFIX}{name}": tensor for name, tensor in state.items()}


def llama_adapter_from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of `LlamaAdapter`, and its state under our names. One gate for all heads, (1,), is PEFT's form.

    Raises:
        ValueError: a field that is not supported.
    """
    refuse_unknown_fields(config, ("adapter_len", "adapter_layers", "target_modules"))
    _refuse_other_values(config, "task_type", ("CAUSAL_LM", None))
    _refuse_other_values(config, "target_modules", ("attn", None))
    arguments = {
        "num_virtual_tokens": config.get("adapter_len"),
        "top_layers": config.get("adapter_layers"),
        "as_peft": any(name.endswith(_GATE) and tensor.shape == (1,) for name, tensor in tensors.items()),
    }
    return arguments, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
