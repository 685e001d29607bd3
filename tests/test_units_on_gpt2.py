"""The fine-tuning units run on another GPT-2 than the bundled one: the switch to the real one works.

The weights are random and each training has a step or four, so what the units say of their results is not looked at;
everything has to run to its end. GPT-2 small itself takes ten minutes a unit and more: `make test-gpt2` runs all of
them on it. The other tests run most of them on a model of its depth, number of heads and context, of a fifth of its
width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.units_on_gpt2 import FINE_TUNING, random_gpt2, run_unit
from lora_from_scratch.grading.building import execution

SLOW = ("13", "14")  # minutes each, narrow or not: nine trainings, and a hundred texts written
STEPS = {"unit_11": 4}  # a matrix B that has seen one step of Adam need not have its full rank
CHOSEN = os.environ.get("LORA_FROM_SCRATCH_TEST_WIDTH", "")  # GPT-2 small: 768


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    random_gpt2(folder, width=int(CHOSEN or 144))
    return folder


def unit_to_run(unit: str) -> Any:
    marks = [getattr(pytest.mark, f"unit_{unit}")]
    if unit in SLOW and not CHOSEN:
        marks.append(pytest.mark.skip(reason="takes minutes; `make test-gpt2` runs it"))
    return pytest.param(f"unit_{unit}", marks=marks)


@pytest.mark.parametrize("name", [unit_to_run(unit) for unit in FINE_TUNING])
def test_a_fine_tuning_unit_runs_on_a_random_gpt2(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "SECONDS_A_CELL", 3600)
    run_unit(name, model, STEPS.get(name, 1))  # raises what a cell raises
