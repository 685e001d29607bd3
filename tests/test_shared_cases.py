"""Public bug reports that were tried on this course, each as a small script in ../shared/cases: what is right now.

Each test names the repository's own test of that kind, which is quicker and covers more than the one report.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY, shared
from tests.sandboxes import needs_bubblewrap

pytestmark = pytest.mark.slow

# The scripts were written before these modules were moved.
MOVED = {
    "lora": "methods.lora import LoRA",
    "method": "methods.registry import load_adapter",
    "qlora": "methods.qlora import QLoRA",
    "rank": "linear_algebra.rank import rank",
}
TO_DO = "to do: The open question nearly_low has no answer yet."


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the command is installed and moved modules are also where they were."""
    shared("cases/common.py")
    root = tmp_path_factory.mktemp("cases") / "checkout"
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "lora_from_scratch", root / "lora_from_scratch", ignore=unwanted)
    for folder in ("course", "notebooks", "solutions"):
        (root / folder).symlink_to(REPOSITORY / folder)
    for module, where in MOVED.items():
        (root / "lora_from_scratch" / f"{module}.py").write_text(f"from lora_from_scratch.{where}\n")
    command = root / ".venv/bin/lora-from-scratch"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lora_from_scratch "$@"\n')
    command.chmod(0o755)
    return root


def printed(case: str, checkout: Path) -> str:
    """What a case prints. It writes into its working directory."""
    script = shared(f"cases/{case}/try.py")
    place = checkout.parent / case
    (place / "work").mkdir(parents=True)
    environment = os.environ | {"CHECKOUT": str(checkout), "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def points(text: str) -> dict[str, float]:
    """By learner."""
    return {name: float(earned) for name, earned in re.findall(r"^(\w+) +([\d.]+) points$", text, re.MULTILINE)}


def test_no_case_is_left_out() -> None:
    cases = {folder.name for folder in shared("cases").iterdir() if folder.is_dir()}
    assert cases == set(re.findall(r'printed\("(\w+)"', Path(__file__).read_text(encoding="utf-8")))


@needs_bubblewrap
def test_a_line_that_only_ipython_understands_costs_no_points(checkout: Path) -> None:
    """Of this kind: test_honest_notebooks.py, test_a_line_that_a_kernel_survives_costs_no_answer_below_it."""
    found = points(printed("01_magic_line_ends_cell", checkout))
    assert len(found) == 9
    assert set(found.values()) == {14}


def test_added_tokens_are_read(checkout: Path) -> None:
    """Of this kind: test_gpt2_tokenizer.py, test_a_tokenizer_with_settings_of_its_own_gives_the_ids_of_transformers."""
    text = printed("02_added_tokens_ignored", checkout)
    assert "ids of 'a<|sep|>b': [65, 4097, 66] " in text
    assert re.search(r"^generate: Once upon a time there was a.*<\|sep\|>.*\n exit code 0 ", text, re.MULTILINE)


def test_what_peft_ignores_in_an_adapter_is_ignored(checkout: Path) -> None:
    """Of this kind: test_peft_features.py, test_an_adapter_of_peft_is_read_and_travels_back."""
    pytest.importorskip("peft")
    text = printed("03_peft_name_matches_nothing", checkout)
    differences = re.findall(r"^\w+ the logits differ by (\S+)$", text, re.MULTILINE)
    assert len(differences) == 5
    assert max(map(float, differences)) < 1e-4


def test_a_merged_model_that_was_moved_has_one_dtype(checkout: Path) -> None:
    """Of this kind: test_moved_models.py."""
    text = printed("04_merged_then_moved", checkout)
    assert len(re.findall(r"^q?lora .*: \['torch.bfloat16'\]: runs$", text, re.MULTILINE)) == 6
    assert text.count("\n") == 7


@needs_bubblewrap
def test_what_pytorch_replaces_itself_is_no_finding(checkout: Path) -> None:
    """Of this kind: test_honest_notebooks.py, test_a_setting_of_pytorchs_own_is_no_replaced_function."""
    text = printed("05_false_replaces_torch", checkout)
    assert points(text) == {"a_plain": 14, "b_default_dtype": 14, "c_compile": 14}
    assert " * " not in text


@needs_bubblewrap
def test_the_notebook_in_which_something_is_written_counts(checkout: Path) -> None:
    """Of this kind: test_choosing.py."""
    text = printed("06_blank_beside_copy1", checkout)
    assert points(text) == {"a_alone": 14, "b_beside_blank": 14}
    found = text[text.index("b_beside_blank") : text.index("in the report:")]
    reported = text[text.index("in the report:") : text.index("right:")]
    assert "`unit_01-Copy1.ipynb`" in found
    assert "`unit_01-Copy1.ipynb`" in reported


def test_check_submission_finds_nothing_to_do_in_cells_that_run(checkout: Path) -> None:
    """Of this kind: test_honest_notebooks.py, test_check_submission_finds_nothing_to_do_in_it."""
    text = printed("08_percent_continuation", checkout)
    assert re.findall(r"^to do: .*", text, re.MULTILINE) == [TO_DO] * 4
    assert text.count("7 of 8 exercises, predictions and open questions have been filled in.") == 4


@needs_bubblewrap
def test_an_answer_from_an_own_module_is_the_learners(checkout: Path) -> None:
    """Of this kind: test_honest_notebooks.py, test_an_answer_from_a_file_of_the_learners_own_is_the_learners."""
    text = printed("09_own_module_called_library", checkout)
    assert re.findall(r"^to do: .*", text, re.MULTILINE) == [TO_DO]
    assert points(text) == {"learner": 14}
