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
    for name in ("bundled model", "course", "kernel", "widgets"):  # as on a machine that has them
        monkeypatch.setitem(doctor.CHECKS, name, lambda: "there")
    code, out, _ = call("doctor")
    assert (code, out.count("PROBLEM"), out.count("ok  ")) == (0, 0, len(doctor.CHECKS))

    def broken() -> str:
        raise RuntimeError("two\nlines")

    monkeypatch.setitem(doctor.CHECKS, "disk", broken)
    code, out, _ = call("doctor")
    assert code == 1
    assert "PROBLEM  disk           two lines\n" in out


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (lambda m: m.setattr(doctor, "REQUIRED", ("torch", "no-such-package")), "missing: no-such-package; run: "),
        (lambda m: m.setattr(doctor, "MINIMUM_DISK", 1e18), "MB free here"),
        (lambda m: m.setitem(sys.modules, "torch", None), "PROBLEM  PyTorch"),
        (lambda m: m.setattr("lora_from_scratch.gpt2.checkpoint.BUNDLED_DIRECTORY", Path("no")), "PROBLEM  bundled"),
        (lambda m: m.setattr(doctor.tempfile, "TemporaryFile", _refuse), "cannot write to this folder"),
        (
            lambda m: m.setattr(doctor, "MINIMUM_PYTHON", (9, 0)),
            "is too old; create an environment with 3.11 or newer: python3.11",
        ),
        (lambda m: m.setattr(doctor, "COURSE", ("no-such-package",)), "run: python -m pip install -e '.[course]'"),
        (lambda m: m.setattr(doctor, "WIDGETS", Path("no")), "JupyterLab cannot find the extension"),
        (lambda m: m.setenv("LORA_FROM_SCRATCH_HOME", "/dev/null/no"), "is not saved: cannot write to /dev/null/no"),
    ],
)
def test_the_doctor_finds(monkeypatch: pytest.MonkeyPatch, patch: Callable[[Any], None], said: str) -> None:
    patch(monkeypatch)
    code, out, _ = call("doctor")
    assert code == 1
    assert said in out


def test_only_an_instructor_is_told_of_what_grading_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GRADING", ("no-such-package",))
    monkeypatch.setenv("PATH", "")
    for name in doctor.CHECKS:
        monkeypatch.setitem(doctor.CHECKS, name, lambda: "there")
    code, out, _ = call("doctor")
    assert (code, "alembic" in out, "grading" in out) == (0, False, False)
    code, out, _ = call("doctor", "--instructor")
    assert code == 1
    assert "PROBLEM  grading        missing: no-such-package; run: " in out
    assert "PROBLEM  alembic        nbgrader needs it" in out


def test_an_instructor_is_told_where_the_sandbox_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guides say that this command checks it; the first grading was what said so."""
    pytest.importorskip("nbgrader")
    monkeypatch.setattr("lora_from_scratch.grading.sandbox.unavailable", lambda: "bubblewrap is not installed")
    code, out, _ = call("doctor", "--instructor")
    assert code == 1
    assert "PROBLEM  sandbox        bubblewrap is not installed. Without it, grading stops\n" in out


def test_every_problem_is_one_line_with_something_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package",))
    monkeypatch.setattr(doctor, "COURSE", ("no-such-package",))
    monkeypatch.setattr(doctor, "MINIMUM_DISK", 1e18)
    monkeypatch.setattr("lora_from_scratch.gpt2.checkpoint.BUNDLED_DIRECTORY", Path("no"))
    monkeypatch.setenv("PATH", "")
    _, out, _ = call("doctor", "--instructor")
    lines = [line for line in out.splitlines() if line.startswith(("ok  ", "PROBLEM  "))]
    assert len(lines) == len(doctor.CHECKS) + len(doctor.FOR_INSTRUCTORS)
    problems = [line for line in lines if line.startswith("PROBLEM")]
    assert len(problems) >= 5
    for line in problems:
        assert any(word in line for word in ("run: ", "again: ", "delete ", "change to ", "Install it: ")), line


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["python"], ""),
        ([sys.executable], ""),
        (["/no/such/python"], "which does not exist; run: python -m ipykernel install --sys-prefix"),
        (["/bin/sh"], "starts /bin/sh, not "),
    ],
)
def test_the_kernel_of_jupyterlab_has_to_be_this_python(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    specifications = pytest.importorskip("jupyter_client.kernelspec")
    specification = specifications.KernelSpec(argv=argv)
    monkeypatch.setattr(specifications.KernelSpecManager, "get_kernel_spec", lambda *_: specification)
    if said:
        with pytest.raises(RuntimeError, match=said):
            doctor._kernel()
    else:
        assert doctor._kernel().startswith("python3 starts ")


def test_no_kernel_at_all_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    specifications = pytest.importorskip("jupyter_client.kernelspec")

    def none(*_: Any) -> None:
        raise specifications.NoSuchKernel("python3")

    monkeypatch.setattr(specifications.KernelSpecManager, "get_kernel_spec", none)
    with pytest.raises(RuntimeError, match='has no kernel "python3"; run: '):
        doctor._kernel()


def _refuse(*args: Any, **keywords: Any) -> None:
    raise PermissionError(13, "Permission denied")


def test_the_doctor_runs_where_torch_is_missing_and_the_others_send_there(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    command = [sys.executable, "-m", "lora_from_scratch"]
    seen = subprocess.run([*command, "doctor"], env=environment, capture_output=True, text=True, check=False)
    assert seen.returncode == 1
    assert "PROBLEM  PyTorch        no torch here; run: python -m pip install" in seen.stdout
    other = subprocess.run([*command, "evaluate"], env=environment, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert other.stderr == "error: no torch here; the installation is incomplete, see: lora-from-scratch doctor\n"
