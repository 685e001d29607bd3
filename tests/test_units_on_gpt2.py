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

import nbformat
import pytest
import torch

from lora_from_scratch.gpt2.checkpoint import load_tokenizer, save_gpt2
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.grading.building import execution
from lora_from_scratch.grading.building.execution import SETTINGS, execute
from tests.tiny_course import ROOT

FINE_TUNING = ("04", "05", "06", "07", "08", "09", "10", "11", "13", "14")
SLOW = ("13", "14")  # minutes each, narrow or not: nine trainings, and a hundred texts written
STEPS = {"unit_11": "4"}  # a matrix B that has seen one step of Adam need not have its full rank
CHOSEN = os.environ.get("LORA_FROM_SCRATCH_TEST_WIDTH", "")  # GPT-2 small: 768


@pytest.fixture(scope="module")
def random_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of GPT-2 small's shape but for the width, with the bundled model's vocabulary and random weights."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(n_embd=int(CHOSEN or 144), vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=0)
    assert (config.n_layer, config.n_head, config.n_positions) == (12, 12, 1024)
    model = GPT2(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a trained model has no biases of zero
                parameter.normal_(std=0.02)
    save_gpt2(model, tokenizer, folder)
    return folder


def unit_to_run(unit: str) -> Any:
    marks = [getattr(pytest.mark, f"unit_{unit}")]
    if unit in SLOW and not CHOSEN:
        marks.append(pytest.mark.skip(reason="takes minutes; `make test-gpt2` runs it"))
    return pytest.param(f"unit_{unit}", marks=marks)


@pytest.mark.parametrize("name", [unit_to_run(unit) for unit in FINE_TUNING])
def test_a_fine_tuning_unit_runs_on_a_random_gpt2(
    name: str, random_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "SECONDS_A_CELL", 3600)
    solved = nbformat.read(ROOT / "solutions" / name / f"{name}.ipynb", as_version=4)
    execute(solved, settings=dict(zip(SETTINGS, (str(random_gpt2), STEPS.get(name, "1")), strict=True)))
    for cell in solved.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"{cell.source}\n{output.ename}: {output.evalue}"
    assert all(cell.execution_count for cell in solved.cells if cell.cell_type == "code"), "not all cells have run"
