"""A method in one new file outside the package: what works for LoRA works for it, and no other file knows of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lora_from_scratch import methods
from lora_from_scratch.cli import main
from lora_from_scratch.finetune.run import CHECKPOINT
from lora_from_scratch.finetune.training import TrainingSettings, adamw
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.methods.adapter_files import WEIGHTS_FILE
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.registry import load_adapter, method_class, method_classes
from tests.helpers import REPOSITORY, tiny_model
from tests.test_method_laws import LAWS, Law, try_law
from tests.tiny_runs import run_in

FOLDER = REPOSITORY / "tests" / "method_outside"
NAME = "lora-layerwise"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "LORA_FROM_SCRATCH_METHODS": str(FOLDER)}


@pytest.fixture(autouse=True)
def _folder_of_methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process, and those that it starts, look for methods in the folder too."""
    monkeypatch.setenv("LORA_FROM_SCRATCH_METHODS", str(FOLDER))
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(FOLDER)])
    method_classes.cache_clear()
    yield
    method_classes.cache_clear()
    sys.modules.pop("lora_from_scratch.methods.lora_layerwise", None)


def layerwise(**hyperparameters: object) -> Method:
    return method_class(NAME)(**hyperparameters)


def test_no_other_file_names_it() -> None:
    files = [*(REPOSITORY / "lora_from_scratch").rglob("*.py"), *(REPOSITORY / "benchmarks").glob("*.py")]
    assert [file for file in files if "LayerwiseLoRA" in file.read_text() or NAME in file.read_text()] == []


@pytest.mark.parametrize(("law", "where", "examples"), LAWS, ids=[law.__name__ for law, _, _ in LAWS])
def test_it_is_put_to_the_laws(law: Law, where: object, examples: int) -> None:
    cls = method_class(NAME)
    if callable(where) and where(cls):
        try_law(law, cls, examples)


def test_a_lower_block_learns_at_a_smaller_rate() -> None:
    model, method = tiny_model(), layerwise(rank=2, decay=0.25)
    method.adapt(model)
    optimizer = adamw(method.parameter_groups(model), TrainingSettings(steps=1, learning_rate=1e-3))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in method.trainable(model).items():
        assert rates[id(parameter)] == pytest.approx(0.25e-3 if ".h.0." in name else 1e-3)


def test_help_shows_its_hyperparameter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "learning rate of a block divided by that of the block above (lora-layerwise: 0.5)" in said


def test_it_is_trained_saved_loaded_and_undone(quiet_run: Path, short_evaluation: None, tmp_path: Path) -> None:
    run = run_in(quiet_run, tmp_path, "--method", NAME, "--decay", "0.7")
    assert main(run) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["report"]["method"] == NAME
    assert report["report"]["learning_rate"] == method_class(NAME).learning_rates.bundled
    model, _ = load_gpt2(quiet_run / "model")
    ids = torch.arange(12).unsqueeze(0)
    before = model(ids)
    method = load_adapter(model, tmp_path)  # a LoRA's directory: how fast it has learned is not in it
    assert not torch.allclose(model(ids), before)
    method.undo(model)
    assert torch.equal(model(ids), before)


def test_killed_and_resumed_it_is_the_same_bit_for_bit(quiet_run: Path, short_evaluation: None, tmp_path: Path) -> None:
    long = ["--method", NAME, "--steps", "12", "--checkpoint-every", "2"]
    quiet, troubled = tmp_path / "quiet", tmp_path / "troubled"
    command = [sys.executable, "-m", "lora_from_scratch", *run_in(quiet_run, troubled, *long)]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (troubled / CHECKPOINT).exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert main(run_in(quiet_run, troubled, *long)) == 0
    assert main(run_in(quiet_run, quiet, *long)) == 0
    assert (troubled / WEIGHTS_FILE).read_bytes() == (quiet / WEIGHTS_FILE).read_bytes()


def test_it_takes_part_in_the_shootout_without_being_named(quiet_run: Path, tmp_path: Path) -> None:
    code = "from lora_from_scratch.compare.shootout import default_contestants; print(*default_contestants())"
    process = [sys.executable, "-c", code]
    names = subprocess.run(process, env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    assert names[names.index("lora") + 1] == NAME  # a variant is listed behind what it is a variant of
    run = ["shootout", "--model", quiet_run / "model", "--output", tmp_path, "--methods", "bitfit", NAME]
    few = ["--steps", "2", "--cards", "1", "--jobs", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "lora_from_scratch", *map(str, run), *few],
        env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"| {NAME} " in (tmp_path / "table.md").read_text()
