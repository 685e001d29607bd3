"""Which methods there are, by name, and which of them wrote an adapter directory.

A method is a subclass of `Method` with a `name` in a file of this folder, or of a folder that the environment variable
LORA_FROM_SCRATCH_METHODS names. There is no list to add it to.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lora_from_scratch import methods
from lora_from_scratch.methods.adapter_files import CONFIG_FILE, read_adapter
from lora_from_scratch.methods.method import Method
from lora_from_scratch.support.wrapped import unwrapped


@functools.cache
def method_classes() -> Mapping[str, type[Method]]:
    """Every method by its name, in the order in which tables list them.

    Raises:
        ValueError: two methods have the same name.
    """
    found: list[type[Method]] = []
    for info in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"{methods.__name__}.{info.name}")
        found += [cls for cls in vars(module).values() if _is_method(cls) and cls.__module__ == module.__name__]
    found.sort(key=lambda cls: (cls.position, cls.name))
    by_name = {cls.name: cls for cls in found}
    for cls in found:
        if by_name[cls.name] is not cls:
            files = f"{cls.__module__} and {by_name[cls.name].__module__}"
            raise ValueError(f"two methods have the name {cls.name!r}, in {files}; rename one")
    return MappingProxyType(by_name)


def _is_method(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Method) and "name" in vars(thing)


def method_class(name: str) -> type[Method]:
    """The class of a method, by its name.

    Raises:
        ValueError: there is no method of that name.
    """
    if name not in method_classes():
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(method_classes())}")
    return method_classes()[name]


def for_training(cls: type[Method], seed: int = 0, **hyperparameters: Any) -> Method:
    """A method for a run that never undoes it: without a copy of the base, and with this seed, where it has them."""
    usual = {"seed": seed, "keep_base": False}
    return cls(**{f.name: usual[f.name] for f in fields(cls) if f.name in usual} | hyperparameters)


# --- Adapter directories -------------------------------------------------------------------------------


def load_adapter(model: nn.Module, directory: str | Path) -> Method:
    """Adapt `model` as described by a directory that `save` or PEFT wrote, and return the method.

    Raises:
        FileNotFoundError: there is no such directory, or a file is not in it.
        ValueError: damaged, of a method that is not here, or made for another model. The model is then as it was.
    """
    try:
        method, state = _read(Path(directory), unwrapped(model))
        method.adapt(model)
        try:
            method.load_state_dict(model, state)
        except ValueError:
            method.undo(model)
            raise
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return method


def _read(directory: Path, model: nn.Module) -> tuple[Method, dict[str, Tensor]]:
    """The method and the state that a directory holds."""
    classes = list(method_classes().values())
    if (directory / "config.json").exists() and not (directory / CONFIG_FILE).exists():
        whole = next(cls for cls in classes if cls.saves_model)
        return whole.from_checkpoint(directory)
    config, tensors = read_adapter(directory)
    classes.sort(key=lambda cls: -len(cls.__mro__))  # a variant is asked before the method that it is a variant of
    for cls in classes:
        if cls.peft_type and cls.reads(config):
            return cls.from_adapter(config, tensors, model)
    supported = ", ".join(dict.fromkeys(cls.peft_type for cls in method_classes().values() if cls.peft_type))
    raise ValueError(f"peft_type {config.get('peft_type')!r} is not supported; supported are {supported}")
