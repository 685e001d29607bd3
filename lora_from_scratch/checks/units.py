"""Which exercises and predictions there are: every unit's, in the order of the course.

A unit NN is a module `unit_NN.py` beside this file with `TITLE`, `EXERCISES` (a list of `Exercise`) and `PREDICTIONS`
(a list of `Prediction`). Names are unique in the whole course.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from dataclasses import dataclass

from lora_from_scratch.checks.exercise import Exercise, Prediction


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
    import lora_from_scratch.checks as package

    found = []
    for name in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        if name.startswith("unit_"):
            module = importlib.import_module(f"{package.__name__}.{name}")
            found.append(
                Unit(name.removeprefix("unit_"), module.TITLE, tuple(module.EXERCISES), tuple(module.PREDICTIONS))
            )
    names = [item.name for unit in found for item in unit.checked]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two exercises or predictions have the same name: {', '.join(sorted(twice))}")
    return tuple(found)


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
