"""Whose turn it is: of what takes minutes for each unit, `make test` does two units, other ones for each commit.

`make test-all` does all of them.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

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


STATE = state()
TWO = chosen([unit.number for unit in units()], 2)
