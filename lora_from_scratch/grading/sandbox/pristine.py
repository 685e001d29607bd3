"""PyTorch, numpy and Python as they were before a notebook ran: put back before an answer is tried.

A probe uses them beside the learner's code: `torch.equal` that always says yes would make wrong answers look right.
This keeps simple tricks from working and tells honest accidents. It is no wall: what runs in the same process can
always do more.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

MODULES = (
    "builtins",
    "copy",
    "contextlib",
    "functools",
    "io",
    "itertools",
    "json",
    "math",
    "numpy",
    "numpy.linalg",
    "operator",
    "os",
    "random",
    "safetensors.torch",
    "signal",
    "time",
    "traceback",
    "warnings",
    "torch",
    "torch.autograd",
    "torch.linalg",
    "torch.nn",
    "torch.nn.functional",
    "torch.nn.init",
    "torch.random",
)
CLASSES = (torch.Tensor, torch.nn.Parameter, torch.nn.Module, torch.Generator)
RECURSION = 3_000
SHOWN = 20


class Pristine:
    """Remembers what functions and classes there are, and puts them back."""

    def __init__(self, package: str) -> None:
        self.owners: list[tuple[str, Any]] = [(name, sys.modules[name]) for name in MODULES if name in sys.modules]
        self.owners += [(name, module) for name, module in sys.modules.items() if name.partition(".")[0] == package]
        self.owners += [(f"{kind.__module__}.{kind.__name__}", kind) for kind in self._classes()]
        self.kept = {id(owner): dict(self._attributes(owner)) for _, owner in self.owners}
        self.names = {id(owner): frozenset(vars(owner)) for _, owner in self.owners}
        self.codes = {
            id(value): (value, value.__code__, value.__defaults__, value.__kwdefaults__)
            for kept in self.kept.values()
            for value in kept.values()
            if isinstance(value, FunctionType)
        }

    def restore(self) -> list[str]:
        """Put back what is not as it was; the names of it, the first `SHOWN`."""
        changed = []
        sys.settrace(None)
        sys.setprofile(None)
        sys.setrecursionlimit(RECURSION)
        for name, owner in self.owners:
            now = vars(owner)
            for attribute, value in self.kept[id(owner)].items():
                if (found := now.get(attribute)) is not value:
                    # PyTorch itself wraps `torch.manual_seed` when its compiler is imported: put back, not told.
                    if (name, attribute) != ("torch", "manual_seed") or not hasattr(found, "__wrapped__"):
                        changed.append(f"{name}.{attribute}")
                    (type if isinstance(owner, type) else ModuleType).__setattr__(owner, attribute, value)
            for attribute in self._in_front(owner):
                changed.append(f"{name}.{attribute}")
                (type if isinstance(owner, type) else ModuleType).__delattr__(owner, attribute)
        for value, code, defaults, keywords in self.codes.values():
            if (value.__code__, value.__defaults__, value.__kwdefaults__) != (code, defaults, keywords):
                changed.append(f"{value.__module__}.{value.__qualname__}")
                value.__code__, value.__defaults__, value.__kwdefaults__ = code, defaults, keywords
        return changed[:SHOWN]

    def _in_front(self, owner: Any) -> list[str]:
        """What was added to a class and hides what it inherits, or to a module and hides what Python has."""
        hidden = {n for base in owner.__mro__[1:] for n in vars(base)} if isinstance(owner, type) else vars(builtins)
        new = vars(owner).keys() - self.names[id(owner)]
        return sorted(name for name in new if name in hidden and not name.startswith("__"))

    @staticmethod
    def _classes() -> Iterator[type]:
        yield from CLASSES
        for value in vars(torch.nn).values():
            if isinstance(value, type) and value not in CLASSES:
                yield value

    @staticmethod
    def _attributes(owner: Any) -> Iterator[tuple[str, Any]]:
        """What is called: functions, methods, classes. Values may change for good reasons."""
        for name, value in vars(owner).items():
            called = callable(value) or isinstance(value, property | staticmethod | classmethod)
            if called and not isinstance(value, ModuleType) and (not name.startswith("__") or isinstance(owner, type)):
                yield name, value
