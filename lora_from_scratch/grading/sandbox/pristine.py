"""Restore the functions of PyTorch, NumPy and Python that a notebook has replaced, before an answer is tried.

A probe uses them in the same process as the learner's code: a `torch.equal` that always returns True would make wrong
answers look right. Restoring defeats simple tricks and reports honest accidents. It is not a security boundary: code in
the same process can always do more.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import os
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
# Operators that are used to copy a value out of the sandbox.
LOOKS = tuple(f"aten::{name}" for name in ("_to_copy", "alias", "clone", "contiguous", "copy_", "detach", "permute"))
OPERATORS = ("aten/", "prims/", "prim/", "quantized/")
TORCH = os.path.dirname(torch.__file__) + os.sep
RECURSION = 3_000
SHOWN = 20


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Disable any `TorchFunctionMode` or `TorchDispatchMode` that a notebook has left active."""
    functions = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    dispatched = [torch._C._pop_torch_dispatch_stack(None) for _ in range(torch._C._len_torch_dispatch_stack())]
    try:
        with torch._C.DisableTorchFunctionSubclass():
            yield
    finally:
        for mode in reversed(functions):
            torch._C._push_on_torch_function_stack(mode)
        for mode in reversed(dispatched):
            torch._C._push_on_torch_dispatch_stack(mode)


class Pristine:
    """Remembers functions and classes, and restores them."""

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
        self.kernels = frozenset(torch.library._impls)

    def restore(self) -> list[str]:
        """Restore what was replaced; returns the names, at most `SHOWN`."""
        changed = []
        sys.settrace(None)
        sys.setprofile(None)
        sys.setrecursionlimit(RECURSION)
        for name, owner in self.owners:
            now = vars(owner)
            for attribute, value in self.kept[id(owner)].items():
                if (found := now.get(attribute)) is not value:
                    if not _is_pytorchs(found):
                        changed.append(f"{name}.{attribute}")
                    (type if isinstance(owner, type) else ModuleType).__setattr__(owner, attribute, value)
            for attribute in self._in_front(owner):
                changed.append(f"{name}.{attribute}")
                (type if isinstance(owner, type) else ModuleType).__delattr__(owner, attribute)
        for value, code, defaults, keywords in self.codes.values():
            if (value.__code__, value.__defaults__, value.__kwdefaults__) != (code, defaults, keywords):
                changed.append(f"{value.__module__}.{value.__qualname__}")
                value.__code__, value.__defaults__, value.__kwdefaults__ = code, defaults, keywords
        return [*self._take_kernels_out(), *changed][:SHOWN]

    def _take_kernels_out(self) -> list[str]:
        """Remove kernels that a notebook has registered for PyTorch's own operators."""
        new = {name for name in set(torch.library._impls) - self.kernels if _is_a_notebooks(name)}
        for library in [one for one in gc.get_objects() if type(one) is torch.library.Library] if new else []:
            if new & library._op_impls:
                library._destroy()
        lasting = {name for name in LOOKS if _foreign_lines(name)}
        return sorted({"torch.ops." + ".".join(name.split("/")[:2]) for name in new} | lasting)

    def _in_front(self, owner: Any) -> list[str]:
        """Attributes added to a class that hide inherited ones, or to a module that hide builtins."""
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
        """The callable attributes: functions, methods, classes. Other values may change for good reasons."""
        for name, value in vars(owner).items():
            called = callable(value) or isinstance(value, property | staticmethod | classmethod)
            if called and not isinstance(value, ModuleType) and (not name.startswith("__") or isinstance(owner, type)):
                yield name, value


def _is_a_notebooks(kernel: str) -> bool:
    """Whether a kernel for one of PyTorch's operators ("aten/equal/CPU") was registered by a file outside PyTorch."""
    if not kernel.startswith(OPERATORS):
        return False
    space, name, key = kernel.split("/")
    return any(line.startswith((f"{key}:", f"{key}[alias]:")) for line in _foreign_lines(f"{space}::{name}"))


def _foreign_lines(operator: str) -> list[str]:
    """The lines of the dispatcher's dump for kernels that neither PyTorch's C++ nor its Python code registered."""
    lines = torch._C._dispatch_dump(operator).splitlines()
    return [line for line in lines if ": registered at " in line and TORCH not in line and ".cpp:" not in line]


def _is_pytorchs(value: Any) -> bool:
    """Whether PyTorch itself made the replacement, as when its default dtype is set or its compiler is imported."""
    value = getattr(value, "__func__", value)
    if isinstance(value, FunctionType):
        return value.__code__.co_filename.startswith(TORCH)
    return isinstance(value, type) and value.__module__.partition(".")[0] == "torch"
