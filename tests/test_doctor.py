"""The doctor: what it finds, and that it runs where nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_from_scratch.cli import doctor
from tests.cli_calls import call
from tests.helpers import REPOSITORY


def test_the_doctor_says_what_to_mend_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.CHECKS, "bundled model", lambda: "5,900,000 parameters")
    code, out, _ = call("doctor")
    assert (code, out.count("MEND"), out.count("\nok ")) == (0, 0, len(doctor.CHECKS) - 1)

    def broken() -> str:
        raise RuntimeError("two\nlines")

    monkeypatch.setitem(doctor.CHECKS, "disk", broken)
    code, out, _ = call("doctor")
    assert code == 1
    assert "MEND  disk           two lines\n" in out


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (lambda m: m.setattr(doctor, "REQUIRED", ("torch", "no-such-package")), "missing: no-such-package; run: "),
        (lambda m: m.setattr(doctor, "NEEDED_DISK", 1e18), "MB free here"),
        (lambda m: m.setitem(sys.modules, "torch", None), "MEND  PyTorch"),
        (lambda m: m.setattr("lora_from_scratch.gpt2.checkpoint.BUNDLED_DIRECTORY", Path("no")), "MEND  bundled"),
        (lambda m: m.setattr(doctor.tempfile, "TemporaryFile", _refuse), "this folder cannot be written"),
    ],
)
def test_the_doctor_finds(monkeypatch: pytest.MonkeyPatch, patch: Callable[[Any], None], said: str) -> None:
    patch(monkeypatch)
    code, out, _ = call("doctor")
    assert code == 1
    assert said in out


def _refuse(*args: Any, **keywords: Any) -> None:
    raise PermissionError(13, "Permission denied")


def test_the_doctor_runs_where_torch_is_missing_and_the_others_send_there(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    command = [sys.executable, "-m", "lora_from_scratch"]
    seen = subprocess.run([*command, "doctor"], env=environment, capture_output=True, text=True, check=False)
    assert seen.returncode == 1
    assert "MEND  PyTorch        no torch here\n" in seen.stdout
    other = subprocess.run([*command, "evaluate"], env=environment, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert other.stderr == "error: no torch here; the installation is incomplete, see: lora-from-scratch doctor\n"
