"""The fine-tuning units run on a model of GPT-2 small's shape as well: the switch to the real one works.

The weights are random and the training runs short, so what the units say of their results is not looked at; and a
prediction that the experiment answers may come out otherwise. Everything else has to run to its end.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import torch

from lora_from_scratch.gpt2.checkpoint import BUNDLED_DIRECTORY, load_tokenizer, save_gpt2
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.grading.building.execution import SETTINGS, execute
from tests.tiny_course import ROOT

FINE_TUNING = ("04", "05", "06", "07", "08", "09", "10", "11", "13", "14")


@pytest.fixture(scope="module")
def random_gpt2_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 small, 86 million weights in 12 blocks of width 768, with the bundled model's vocabulary."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = load_tokenizer(BUNDLED_DIRECTORY)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tokenizer.vocab_size, bos_token_id=0, eos_token_id=0)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (12, 768, 12, 1024)
    save_gpt2(GPT2(config), tokenizer, folder)
    return folder


@pytest.mark.parametrize(
    "unit", [pytest.param(unit, marks=getattr(pytest.mark, f"unit_{unit}")) for unit in FINE_TUNING]
)
def test_a_fine_tuning_unit_runs_on_a_random_gpt2_small(unit: str, random_gpt2_small: Path) -> None:
    name = f"unit_{unit}"
    solved = nbformat.read(ROOT / "solutions" / name / f"{name}.ipynb", as_version=4)
    execute(solved, settings=dict(zip(SETTINGS, (str(random_gpt2_small), "1"), strict=True)))
    for cell in solved.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error", f"{cell.source}\n{output.ename}: {output.evalue}"
