"""The command line: what goes in wrong ends in one line and leaves nothing behind; what goes in right comes out."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_from_scratch import cli
from lora_from_scratch.cli import COMMANDS, build_parser, doctor, main
from tests.cli_calls import complaint, output_of
from tests.helpers import REPOSITORY
from tests.tiny_runs import SHORT, files_in


@pytest.fixture
def here(cli_directory: Path, short_evaluation: None) -> Path:
    return cli_directory


# --- Help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_in_which_every_flag_is_explained(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: lora-from-scratch {command}" in capsys.readouterr().out
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for action in subparsers.choices[command]._actions:
        assert action.help, f"{command} {action.option_strings} has no help"


def test_without_a_command_the_help_comes_and_names_every_command() -> None:
    out = output_of()
    assert all(f"\n    {command}" in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("finetun", "error: there is no command 'finetun'; did you mean 'finetune'?"),
        ("xyz", "error: there is no command 'xyz'; there are demo, shootout,"),
    ],
)
def test_a_command_that_does_not_exist_gets_the_one_that_was_meant(typed: str, said: str) -> None:
    assert complaint(typed).startswith(said)


def test_the_examples_in_the_help_are_command_lines_that_parse() -> None:
    import shlex

    lines = [line.strip() for line in cli.EPILOG.splitlines() if line.startswith("  lora-from-scratch")]
    assert len(lines) >= 4
    for line in lines:
        build_parser().parse_args(shlex.split(line.split("   ")[0])[1:])


def test_the_console_script_answers() -> None:
    script = Path(sys.executable).with_name("lora-from-scratch")
    if not script.exists():
        pytest.skip("the package is not installed")
    done = subprocess.run([script, "doctor", "--no-such-flag"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unrecognized arguments: --no-such-flag (see lora-from-scratch --help)\n"


# --- Bad input: flags -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rank", "0"], "rank must be a whole number of at least 1, got 0"),
        (["--rank", "33"], "rank must be between 1 and 32"),
        (["--rank", "two"], "--rank takes whole numbers, got 'two'"),
        (["--rank", "2", "3"], "unrecognized arguments: 3"),
        (["--alpha", "0"], "alpha must be a positive number"),
        (["--dropout", "1"], "dropout must be at least 0 and below 1"),
        (["--targets", "c_atn"], "the target 'c_atn' matches nothing; the model has transformer.h.(n).attn.c_attn"),
        (["--targets", "("], "'(' is not a regular expression"),
        (["--method", "full"], "method full does not take --rank; its flags are: none"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many' (see lora-from-scratch finetune --help)"),
        (["--learning-rate", "-1"], "learning_rate must be a positive number, got -1.0"),
        (["--learning-rate", "0"], "learning_rate must be a positive number, got 0.0"),
        (["--learning-rate", "nan"], "learning_rate must be a positive number, got nan"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--warmup-steps", "9"], "warmup_steps must be from 0 to 3, got 9"),
        (["--accumulation", "0"], "accumulation must be at least 1, got 0"),
        (["--clip-norm", "-1"], "clip_norm must not be negative"),
        (["--weight-decay", "-1"], "weight_decay must not be negative"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--seed", "-1"], "must be from 0 to 2**63 - 1, got -1"),
        (["--seed", str(2**63)], "must be from 0 to 2**63 - 1"),
        (["--cards", "0"], "cards must be at least 1, got 0"),
        (["--checkpoint-every", "0"], "checkpoint_every must be at least 1, got 0"),
        (["--device", "toaster"], "unknown device 'toaster'; give cpu, cuda, cuda:0, cuda:1, ... or auto"),
        (["--device", "cuda"], "PyTorch finds no GPU here; use --device cpu"),
        (["--data", "no-such.csv"], "no such data set: no-such.csv"),
        (["--model", "no/such/model"], "no directory 'no/such/model'"),
        (["--model", ""], "there is no directory ''"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_and_writes_nothing(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    model = ["--model", here / "model", "--data", here / "data.csv", "--output", tmp_path / "out" / "below"]
    assert said in complaint("finetune", *model, *SHORT, *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_there_is_refused_and_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_from_scratch.finetune.distributed import find_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="the GPUs here are cuda:0 to cuda:1"):
        find_device("cuda:2")
    assert str(find_device("auto")) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")  # torchrun: one GPU for each process
    assert str(find_device("cuda")) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(find_device("auto")) == "cpu"


@pytest.mark.parametrize("command", ["finetune", "demo", "pretrain"])
@pytest.mark.parametrize("place", ["a file", "below a file", "read-only"])
def test_a_place_that_cannot_be_written_is_found_out_before_the_work(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    monkeypatch.setattr("lora_from_scratch.finetune.training.Trainer.run", lambda self: pytest.fail("it began"))
    if place == "read-only":  # root may write anywhere, so the system has to be played

        def refuse(*args: Any, **keywords: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    output = {"a file": file, "below a file": file / "x" / "y", "read-only": tmp_path / "out"}[place]
    source = ["--corpus", here / "data.csv"] if command == "pretrain" else ["--model", here / "model"]
    line = complaint(command, *source, "--output", output)
    assert f"cannot write to {output}: " in line
    assert files_in(tmp_path) == {"notes.txt": b"mine"}


def test_the_output_may_not_be_the_model_or_hold_another_kind_of_result(here: Path, tmp_path: Path) -> None:
    model = shutil.copytree(here / "model", tmp_path / "model")
    adapter = shutil.copytree(here / "adapter", tmp_path / "adapter")
    before = files_in(tmp_path)
    flags = ["finetune", "--model", model, "--data", here / "data.csv", *SHORT[:-2]]
    assert "is the model's own directory" in complaint(*flags, "--method", "full", "--output", model)
    assert "is the model's own directory" in complaint(*flags, "--output", tmp_path / "x" / ".." / "model")
    assert "holds an adapter" in complaint(*flags, "--method", "full", "--output", adapter)
    shutil.copytree(model, tmp_path / "other")
    assert "holds a whole model" in complaint(*flags, "--output", tmp_path / "other")
    assert before.items() <= files_in(tmp_path).items()


# --- The terminal -----------------------------------------------------------------------------------


def test_a_closed_pipe_and_a_full_disk_behind_it_end_without_a_traceback() -> None:
    command = f"{sys.executable} -m lora_from_scratch doctor"
    full = subprocess.run(
        f"{command} > /dev/full", shell=True, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    assert (full.returncode, full.stderr) == (2, "error: No space left on device\n")
    closed = subprocess.run(
        ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (closed.stdout, closed.stderr) == ("141\n", "")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you ...")])
def test_too_little_memory_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(options: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", broken)
    assert "not enough memory; try a smaller batch" in complaint("doctor")


def test_a_mistake_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: argparse.Namespace) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])
