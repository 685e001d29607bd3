"""The fine-tuning units run on another GPT-2 than the bundled one: the switch to the real one works.

The weights are random and each training has a step or four, so what the units say of their results is not looked at;
everything has to run to its end. One unit in turn (see `turns`) runs on a model of GPT-2 small's depth, number of heads
and context, of a fifth of its width. On GPT-2 small itself they take up to nine minutes each: one of them is part of
`make test-all`, and `make test-gpt2` runs all.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.units_on_gpt2 import FINE_TUNING, random_gpt2, run_unit
from lora_from_scratch.grading.building import execution
from tests import turns

SMALL, NARROW = 768, 144
QUICK = "08"
MINUTES = ("13", "14")  # each, narrow or not: nine trainings, and a hundred texts written
STEPS = {"11": 4}  # a matrix B that has seen one step of Adam need not have its full rank
ALL_ON_SMALL = "LORA_FROM_SCRATCH_TEST_GPT2" in os.environ


@pytest.fixture(scope="module")
def model_of_width(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    @functools.cache
    def model(width: int) -> Path:
        folder = tmp_path_factory.mktemp("gpt2")
        random_gpt2(folder, width)
        return folder

    return model


def runs() -> Iterator[Any]:
    """The unit, the model's width, and which run it belongs to."""
    narrow = [] if ALL_ON_SMALL else [unit for unit in FINE_TUNING if unit not in MINUTES]
    in_turn = turns.chosen(narrow, 1)
    for unit in narrow:
        yield pytest.param(unit, NARROW, marks=turns.marks(unit, unit in in_turn), id=f"unit_{unit}")
    for unit in FINE_TUNING if ALL_ON_SMALL else [QUICK]:
        yield pytest.param(unit, SMALL, marks=turns.marks(unit, ALL_ON_SMALL), id=f"unit_{unit}-small")


@pytest.mark.parametrize(("unit", "width"), list(runs()))
def test_a_fine_tuning_unit_runs_on_a_random_gpt2(
    unit: str, width: int, model_of_width: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "SECONDS_A_CELL", 3600)
    run_unit(f"unit_{unit}", model_of_width(width), STEPS.get(unit, 1))  # raises what a cell raises
