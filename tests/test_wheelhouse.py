"""What a computer without a network needs: what is downloaded for whom, and an installation from it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_from_scratch.cli import main, wheelhouse

RESOLVED = (
    "lora-from-scratch @ .\nnumpy==2.4.1\nnvidia-cublas==13.1\ntorch==2.13.0\ntriton==3.7.1 ; python_version > '3'\n"
)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are run, without the interpreter; each succeeds, and uv finds the same packages each time."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, 0, RESOLVED, "")

    monkeypatch.setattr(wheelhouse.subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return commands


def options_of(command: list[str], name: str) -> list[str]:
    return [word.partition("=")[2] for word in command if word.startswith(f"{name}=")]


def test_each_system_gets_the_packages_that_it_needs_as_wheels_for_it(ran: list[list[str]], tmp_path: Path) -> None:
    assert main(["wheelhouse", str(tmp_path), "--system", "windows", "macos", "--python", "3.12", "3.13"]) == 0
    found = [command for command in ran if command[:3] == ["uv", "pip", "compile"]]
    asked = [[c[c.index(option) + 1] for option in ("--python-platform", "--python-version")] for c in found]
    windows, macos = "x86_64-pc-windows-msvc", "aarch64-apple-darwin"
    assert asked == [[windows, "3.12"], [windows, "3.13"], [macos, "3.12"], [macos, "3.13"]]
    downloads = [command for command in ran if command[:2] == ["pip", "download"]]
    assert [(options_of(c, "--platform"), options_of(c, "--python-version")) for c in downloads] == [
        (["win_amd64"], ["3.12"]),
        (["win_amd64"], ["3.13"]),
        (["macosx_14_0_arm64"], ["3.12"]),
        (["macosx_14_0_arm64"], ["3.13"]),
    ]
    for command in downloads:
        assert {"--no-deps", "--only-binary=:all:", "numpy==2.4.1", "torch==2.13.0"} <= set(command)
        assert not [word for word in command if word.startswith("lora-from-scratch")]  # it is built, not downloaded
    page = (tmp_path / "INSTALL.md").read_text()
    assert "py -m venv .venv" in page
    assert ".venv\\Scripts\\python -m pip install --no-index --find-links WHEELS" in page


def test_linux_gets_the_cpu_build_from_its_index_and_nothing_of_the_cuda_build(
    ran: list[list[str]], tmp_path: Path
) -> None:
    main(["wheelhouse", str(tmp_path), "--system", "linux", "--torch-index", "https://torch.example"])
    torch, others = (command for command in ran if command[:2] == ["pip", "download"])
    assert torch[-3:] == ["--index-url", "https://torch.example", "torch==2.13.0"]
    assert [word for word in others if "==" in word] == ["numpy==2.4.1"]


def test_this_system_needs_no_uv(ran: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["wheelhouse", str(tmp_path)]) == 0
    assert [command[:2] for command in ran] == [["pip", "download"], ["pip", "wheel"]]
    assert ran[0][-3:] == ["-c", "constraints.txt", ".[course]"]


def test_an_older_wheel_of_the_course_is_replaced(ran: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "lora_from_scratch-0.0.1-py3-none-any.whl").touch()
    main(["wheelhouse", str(tmp_path)])
    assert list(tmp_path.glob("*.whl")) == []


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["wheelhouse", str(tmp_path / "new"), "--system", "windows"]) == 2
    assert "python -m pip install uv" in capsys.readouterr().err
    assert main(["wheelhouse", str(tmp_path / "new"), "--python", "3"]) == 2
    assert "--python takes versions such as 3.12, got '3'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_course_is_installed_from_it_into_an_empty_environment_without_an_index(tmp_path: Path) -> None:
    wheels, place = tmp_path / "wheels", tmp_path / "somewhere"
    subprocess.run([sys.executable, "-m", "lora_from_scratch", "wheelhouse", str(wheels)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(place / ".venv")], check=True)
    pips_own = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    alone = pips_own | {"PIP_CONFIG_FILE": os.devnull, "LORA_FROM_SCRATCH_HOME": str(tmp_path / "home")}
    python = str(place / ".venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    subprocess.run([*install, "lora-from-scratch[course]"], check=True, cwd=place, env=alone)
    doctor = [python, "-m", "lora_from_scratch", "doctor"]
    done = subprocess.run(doctor, capture_output=True, text=True, cwd=place, env=alone, check=False)
    assert "No problems found." in done.stdout, done.stdout + done.stderr
