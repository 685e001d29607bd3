"""Which exercises and predictions there are: every unit's, in the order of the course.

A unit NN is a module `unit_NN.py` beside this file with `TITLE`, `EXERCISES` (a list of `Exercise`) and `PREDICTIONS`
(a list of `Prediction`). Names are unique in the whole course.

An instructor adds a unit by putting such a file into a folder that the environment variable
`LORA_FROM_SCRATCH_UNITS` names.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import os
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lora_from_scratch.checks.exercise import Exercise, Prediction

FOLDER = "LORA_FROM_SCRATCH_UNITS"
UNIT = re.compile(r"unit_\w\w")  # a file such as unit_06_probes.py is a part of one


@dataclass(frozen=True)
class Unit:
    """A unit of the course: its number ("01"), its title and what is checked in it."""

    number: str
    title: str
    exercises: tuple[Exercise, ...]
    predictions: tuple[Prediction, ...]

    @property
    def checked(self) -> tuple[Exercise | Prediction, ...]:
        """Everything that is checked: the exercises, then the predictions."""
        return self.exercises + self.predictions


@functools.cache
def units() -> tuple[Unit, ...]:
    """All units that have checks, in order."""
    modules = sorted(_modules(), key=lambda module: module.__name__.rpartition(".")[2])
    found = [
        Unit(module.__name__.rpartition("unit_")[2], module.TITLE, tuple(module.EXERCISES), tuple(module.PREDICTIONS))
        for module in modules
    ]
    names = [item.name for unit in found for item in unit.checked]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two exercises or predictions have the same name: {', '.join(sorted(twice))}")
    return tuple(found)


def _modules() -> list[ModuleType]:
    """The units' modules: the package's, and those of the instructor's folder."""
    import lora_from_scratch.checks as package

    names = [info.name for info in pkgutil.iter_modules(package.__path__) if UNIT.fullmatch(info.name)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    folder = os.environ.get(FOLDER)
    for file in Path(folder).glob("unit_??.py") if folder else []:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        modules.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(modules[-1])
    return modules


@functools.cache
def names() -> frozenset[str]:
    """The names of all exercises and predictions."""
    return frozenset(item.name for unit in units() for item in unit.checked)


def find(name: str) -> tuple[Unit, Exercise | Prediction]:
    """The exercise or prediction of that name, and its unit.

    Raises:
        ValueError: there is none; similar names are said.
    """
    everything = {item.name: (unit, item) for unit in units() for item in unit.checked}
    if name not in everything:
        near = difflib.get_close_matches(str(name), everything, n=3)
        meant = f"; did you mean {' or '.join(repr(other) for other in near)}?" if near else ""
        raise ValueError(f"there is no exercise {name!r}{meant}")
    return everything[name]
