"""Whose turn it is: of what takes minutes for all units, `make test` does a part, another one for each commit.

It also tries the answers of every unit whose code has changed since they were last tried (see `benchmarks.bank_seeds`).
`make test-all` does everything.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.bank_seeds import tried
from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.grading.building.dependencies import RECORD
from tests.tiny_course import ROOT


def state() -> str:
    """What is committed: the same in every process of a run."""
    try:
        command = ["git", "rev-parse", "HEAD^{tree}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # a copy without git
        return (ROOT / RECORD).read_text(encoding="utf-8")


def chosen(numbers: Sequence[str], count: int) -> set[str]:
    """So many of these units, or all if there are fewer."""
    return set(random.Random(STATE).sample(numbers, min(count, len(numbers))))


def marks(number: str, now: bool) -> list[Any]:
    """The marks of a test of a unit: `make test` does it now, or only `make test-all`."""
    return [getattr(pytest.mark, f"unit_{number}"), *[pytest.mark.slow] * (not now)]


def in_turn(unit: Unit) -> Any:
    """The unit as a parameter of a test that `make test` does for two units."""
    return pytest.param(unit, id=f"unit_{unit.number}", marks=marks(unit.number, unit.number in TWO))


def bank_marks(number: str, exercise: str) -> list[Any]:
    """The marks of a test of an exercise's bank."""
    return marks(number, exercise in TEN or not tried(number))


STATE = state()
TEN = chosen([exercise.name for unit in units() for exercise in unit.exercises], 10)
TWO = chosen([unit.number for unit in units()], 2)
