"""Adapter directories that PEFT reads and writes: `adapter_config.json` and `adapter_model.safetensors`.

This file handles files and fields for every method. How PEFT names a method's hyperparameters and tensors is in the
method's own file, or in `lora_peft.py` and `prompt_peft.py`. Checked with peft 0.21.

Three rules. Only what differs from PEFT's defaults is written, because older releases refuse fields that they
do not know. A field that would change the arithmetic and is not supported is refused by name. What PEFT itself
writes when a feature is off (null, false, an empty list) is read without complaint, known feature or not.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Size, Tensor

from lora_from_scratch.support.files import write_directory_atomically

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


def refuse_other_values(config: Mapping[str, Any], name: str, allowed: Sequence[Any]) -> None:
    """Stop at a field whose value is not one of those allowed, of which the first is the default.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    if config.get(name, allowed[0]) not in allowed:
        wanted = ", ".join(repr(value) for value in allowed)
        raise ValueError(f"{CONFIG_FILE} has {name}={config[name]!r}, which is not supported; supported: {wanted}")


def refuse_misfits(expected: Mapping[str, Size], state: Mapping[str, Tensor]) -> None:
    """Check that `state` has exactly the tensors that are expected.

    Raises:
        ValueError: names what is missing, unexpected and of another shape, in one line.
    """
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": misshapen,
    }
    said = [f"{len(names)} {problem} ({_some(names)})" for problem, names in problems.items() if names]
    if said:
        raise ValueError(f"the tensors do not fit this model; were they made for another one? {'; '.join(said)}")


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
