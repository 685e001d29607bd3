"""`torchrun` of the whole command: two processes do what one does, and write once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_from_scratch.cli import main
from lora_from_scratch.finetune.distributed import World
from lora_from_scratch.methods.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from tests.helpers import REPOSITORY
from tests.tiny_runs import SHORT, files_in, make_model, short_judgement, write_data

SCRIPT = REPOSITORY / "tests" / "finetune_script.py"
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}  # each process draws masks of its own


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("torchrun")
    make_model(directory / "model", **NO_DROPOUT)
    write_data(directory / "data.csv")
    return directory


def command(here: Path, output: Path, *more: str) -> list[str]:
    places = ["--model", here / "model", "--data", here / "data.csv", "--output", output]
    return ["finetune", *map(str, places), *SHORT, *more]


def test_two_processes_lose_what_one_loses_with_the_same_batch_and_one_of_them_writes(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    more = [
        "--batch-size",
        "3",
        "--learning-rate",
        "0.01",
        "--checkpoint-every",
        "1",
    ]  # 2 rows for one, 1 for the other
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*torchrun, str(SCRIPT), *command(here, together, *more)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    short_judgement(monkeypatch)
    assert main(command(here, alone, *more)) == 0
    one, two = (json.loads((output / "report.json").read_text())["report"] for output in (alone, together))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert len(set(two["losses"])) == 3  # the loss moves, so that both of them being stuck would show
    ours, theirs = load_file(together / WEIGHTS_FILE), load_file(alone / WEIGHTS_FILE)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.flatten().tolist() == pytest.approx(theirs[name].flatten().tolist(), abs=1e-4)
    assert two["scores"]["perplexity"] == pytest.approx(one["scores"]["perplexity"], rel=1e-3)
    assert set(files_in(together)) == {CONFIG_FILE, WEIGHTS_FILE, "report.json"}
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("saved")] == ["saved by 0"]
    assert len([line for line in lines if line.startswith("| method")]) == 1


def test_a_batch_with_nothing_for_some_process_is_refused(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(World, "from_environment", classmethod(lambda cls: World(0, 3)))
    assert main(command(here, tmp_path / "out", "--batch-size", "2")) == 2
    said = "error: batch_size must be at least 3, one per process, got 2"
    assert capsys.readouterr().err.splitlines() == [said]
    assert not (tmp_path / "out").exists()
