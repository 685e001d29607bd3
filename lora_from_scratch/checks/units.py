"""The exercises and predictions of every unit, in the order of the course.

Unit NN is the folder `unit_NN` beside this file. Its `exercises.py` defines `TITLE`, `EXERCISES` (a list of `Exercise`)
and `PREDICTIONS` (a list of `Prediction`); its `answers*.py` are the bank (see `bank`). Names are unique in the course.

Instructors can add units, or answers to existing ones, in a folder with the same layout that is named by the
environment variable `LORA_FROM_SCRATCH_UNITS`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lora_from_scratch.checks.exercise import Exercise, Prediction

FOLDER = "LORA_FROM_SCRATCH_UNITS"
PACKAGE = Path(__file__).resolve().parent
UNIT_FOLDERS = "unit_??"


@dataclass(frozen=True)
class Unit:
    """A unit of the course: its number ("01"), title, exercises and predictions."""

    number: str
    title: str
    exercises: tuple[Exercise, ...]
    predictions: tuple[Prediction, ...]

    @property
    def checked(self) -> tuple[Exercise | Prediction, ...]:
        """The exercises, then the predictions."""
        return self.exercises + self.predictions


@functools.cache
def units() -> tuple[Unit, ...]:
    """All units that have checks, in order."""
    modules = {file.parent.name.removeprefix("unit_"): load(file) for file in unit_files("exercises.py")}
    found = [
        Unit(number, module.TITLE, tuple(module.EXERCISES), tuple(module.PREDICTIONS))
        for number, module in sorted(modules.items())
    ]
    names = [item.name for unit in found for item in unit.checked]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two exercises or predictions have the same name: {', '.join(sorted(twice))}")
    return tuple(found)


def unit_files(pattern: str, unit: str = UNIT_FOLDERS) -> list[Path]:
    """The matching files in the units' folders: first the package's, then those in the instructor's folder.

    Args:
        pattern: pattern for the file name: "exercises.py", "answers*.py".
        unit: pattern for the folder name: "unit_09"; by default, all units.
    """
    own = os.environ.get(FOLDER)
    folders = [PACKAGE, Path(own)] if own else [PACKAGE]
    return [file for folder in folders for file in sorted(folder.glob(f"{unit}/{pattern}"))]


def load(file: Path) -> ModuleType:
    """Import a file from a unit's folder: the package's under its usual module name, an instructor's by its path."""
    if file.is_relative_to(PACKAGE):
        return importlib.import_module(f"lora_from_scratch.checks.{file.parent.name}.{file.stem}")
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def names() -> frozenset[str]:
    """The names of all exercises and predictions."""
    return frozenset(item.name for unit in units() for item in unit.checked)


def find(name: str) -> tuple[Unit, Exercise | Prediction]:
    """The exercise or prediction of this name, and its unit.

    Raises:
        ValueError: there is none; the message suggests similar names.
    """
    everything = {item.name: (unit, item) for unit in units() for item in unit.checked}
    if name not in everything:
        near = difflib.get_close_matches(str(name), everything, n=3)
        meant = f"; did you mean {' or '.join(repr(other) for other in near)}?" if near else ""
        raise ValueError(f"there is no exercise {name!r}{meant}")
    return everything[name]
