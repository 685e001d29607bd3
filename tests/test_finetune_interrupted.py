"""A run of `finetune` that is killed, interrupted or meets a full disk: it goes on, and no half file is left."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from lora_from_scratch.cli import main
from lora_from_scratch.finetune import evaluation
from lora_from_scratch.finetune import run as running
from lora_from_scratch.finetune.peak_memory import PeakMemory
from lora_from_scratch.finetune.run import CHECKPOINT
from lora_from_scratch.finetune.training import Trainer
from lora_from_scratch.gpt2.checkpoint import load_gpt2, save_gpt2
from lora_from_scratch.methods.adapter_files import WEIGHTS_FILE
from lora_from_scratch.methods.lora import LoRA
from tests.helpers import REPOSITORY
from tests.tiny_runs import ADAPTER, RESULT, examples, files_in, make_model, run_in, write_data


@pytest.fixture
def here(quiet_run: Path, short_evaluation: None) -> Path:
    return quiet_run


def adapter(output: Path) -> bytes:
    return (output / WEIGHTS_FILE).read_bytes()


# --- Killed, interrupted, started again -------------------------------------------------------------


def test_a_run_that_is_killed_and_started_again_ends_with_the_same_adapter(here: Path, tmp_path: Path) -> None:
    """SIGKILL when the first checkpoint has just been written."""
    quiet, troubled = tmp_path / "quiet", tmp_path / "troubled"
    long = ["--steps", "12", "--checkpoint-every", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "lora_from_scratch", *run_in(here, troubled, *long)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (troubled / CHECKPOINT).exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert ADAPTER.isdisjoint(files_in(troubled))
    (troubled / ".adapter_model.safetensors.ab12cd34.part").write_bytes(b"half")  # as a kill while writing leaves it
    assert main(run_in(here, troubled, *long)) == 0
    assert main(run_in(here, quiet, *long)) == 0
    assert adapter(troubled) == adapter(quiet)
    assert set(files_in(troubled)) == RESULT
    losses = [json.loads((place / "report.json").read_text())["report"]["losses"] for place in (quiet, troubled)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("moment", ["training", "saving", "judging", "reporting"])
def test_an_interrupted_run_goes_on_when_it_is_started_again(
    here: Path, tmp_path: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if moment == "training":
            patch.setattr(Trainer, "_after_step", interrupt)
        elif moment == "saving":
            patch.setattr(LoRA, "to_adapter", interrupt)
        else:
            patch.setattr(running, {"judging": "evaluate", "reporting": "write_json"}[moment], interrupt)
        assert main(run_in(here, tmp_path)) == 130
    assert "run the same command again to resume training from the last checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        if moment != "training":  # the training was over and is not done again
            patch.setattr(Trainer, "_one_step", lambda *args: pytest.fail("trained once more"))
        assert main(run_in(here, tmp_path)) == 0
    assert adapter(tmp_path) == adapter(here / "quiet")
    assert set(files_in(tmp_path)) == RESULT


def test_the_peak_memory_of_an_interrupted_run_is_that_of_its_training(here: Path, tmp_path: Path) -> None:
    """Also when it is interrupted after the last step, so that the process that writes the report trains nothing."""
    peaks = iter((5_000, 9_000, 7_000))  # after each of the three steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeakMemory, "bytes", lambda self: next(peaks))
        patch.setattr(LoRA, "to_adapter", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(run_in(here, tmp_path)) == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeakMemory, "bytes", lambda self: 100)
        assert main(run_in(here, tmp_path)) == 0
    report = json.loads((tmp_path / "report.json").read_text())["report"]
    assert report["peak_memory_bytes"] == 9_000


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (["--rank", "3"], "data, model or method"),
        (["--batch-size", "3"], "data, model or method"),
        (["--seed", "1"], "seed"),
        (["--steps", "4"], "steps"),
        ("data", "data, model or method"),
        ("model", "data, model or method"),
    ],
)
def test_the_checkpoint_of_another_run_is_not_gone_on_with(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, differs: str
) -> None:
    """Also where only the content of the data or of the model has changed, under the same name."""
    make_model(tmp_path / "model")
    write_data(tmp_path / "data.csv")
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRA, "to_adapter", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(run_in(tmp_path, output)) == 130
    before = files_in(output)
    if change == "data":
        write_data(tmp_path / "data.csv", examples(9))
    if change == "model":
        model, tokenizer = load_gpt2(tmp_path / "model")
        with torch.no_grad():
            model.transformer.wte.weight[0, 0] += 1
        save_gpt2(model, tokenizer, tmp_path / "model")
    capsys.readouterr()
    assert main(run_in(tmp_path, output, *(change if isinstance(change, list) else []))) == 2
    assert differs in capsys.readouterr().err.splitlines()[-1]
    assert files_in(output) == before


# --- Full disks and other misfortune ----------------------------------------------------------------


def _nth_call_fails(n: int, error: Exception, whole: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(1, 1000))

    def fail(*args: Any, **keywords: Any) -> Any:
        if next(calls) == n:
            raise error
        return whole(*args, **keywords)

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "error", "left"),
    [
        (("os.fsync", 1), FULL, set()),  # the checkpoint
        (("os.fsync", 2), FULL, {CHECKPOINT}),  # the adapter
        (("os.fsync", 4), FULL, {CHECKPOINT, *ADAPTER}),  # the report
        (("torch.save", 1), RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), set()),
        (
            ("lora_from_scratch.methods.adapter_files.save_file", 1),
            SafetensorError("I/O error: No space left"),
            {CHECKPOINT},
        ),
    ],
)
def test_a_full_disk_ends_in_one_line_with_nothing_half_written_and_the_run_can_go_on(
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    where: tuple[str, int],
    error: Exception,
    left: set[str],
) -> None:
    output = tmp_path / "new" / "out"
    name, call = where
    module, _, function = name.rpartition(".")
    __import__(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, _nth_call_fails(call, error, getattr(sys.modules[module], function)))
        assert main(run_in(here, output)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "space left" in last or "the disk or your quota may be full" in last
    assert "PytorchStreamWriter" not in last
    assert set(files_in(tmp_path / "new")) == {f"out/{name}" for name in left} if left else not output.exists()
    assert main(run_in(here, output)) == 0
    assert adapter(output) == adapter(here / "quiet")
    assert set(files_in(output)) == RESULT


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """The system itself refuses to write more: what a full disk is for every writer, torch's C++ and safetensors' Rust
    alike."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kept", [0, 4096, 20_000])
def test_where_the_system_refuses_to_write_nothing_is_left(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: int
) -> None:
    with _largest_file(kept):
        code = main(run_in(here, tmp_path / "out"))
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_one_line_with_the_step_and_what_to_try(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["--learning-rate", "1e30", "--clip-norm", "0", "--warmup-steps", "0", "--steps", "20"]
    assert main(run_in(here, tmp_path / "out", *wild)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: stopped at step ")
    assert "Try a learning rate ten times smaller" in last
    assert not (tmp_path / "out").exists()


def test_a_report_of_a_run_that_went_astray_is_json_that_every_program_reads(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "completion_loss", lambda model, batches: 1e4)  # e**10000 is beyond all numbers
    assert main(run_in(here, tmp_path)) == 0
    document = (tmp_path / "report.json").read_text()
    assert "Infinity" not in document
    assert "NaN" not in document
    assert json.loads(document)["report"]["scores"]["perplexity"] is None
