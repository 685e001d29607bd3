"""The learner's side works where Python lacks what only POSIX systems have, as on Windows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import needs_linux

# The libraries that we use are imported first: they look at the system themselves, and this is about our own code.
WITHOUT_POSIX = """
import asyncio, json, multiprocessing, os, pathlib, pkgutil, signal, subprocess, sys, tempfile
import filelock, IPython, matplotlib.pyplot, numpy, sacrebleu, safetensors.torch, tokenizers, torch, tqdm

MODULES = ("fcntl", "grp", "posix_ipc", "pty", "pwd", "resource", "syslog", "termios", "tty")
FUNCTIONS = ("fork", "forkpty", "getuid", "geteuid", "getpgid", "killpg", "nice", "posix_fallocate",
             "sched_getaffinity", "setsid", "sysconf", "statvfs", "register_at_fork")
SIGNALS = ("SIGALRM", "SIGKILL", "SIGHUP", "SIGPIPE", "SIGUSR1", "alarm", "setitimer", "pthread_kill",
           "pthread_sigmask")
for name in MODULES:
    sys.modules[name] = None  # importing it raises ImportError
for module, names in ((os, FUNCTIONS), (signal, SIGNALS)):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path, **options: not str(path).startswith("/proc") and exists(path, **options)
"""
EVERYTHING = """
import lora_from_scratch
for found in pkgutil.walk_packages(lora_from_scratch.__path__, "lora_from_scratch."):
    if not found.name.startswith(("lora_from_scratch.grading", "lora_from_scratch.__main__")):
        __import__(found.name)
print(len([name for name in sys.modules if name.startswith("lora_from_scratch.")]))
"""
A_UNIT = """
from lora_from_scratch.checks import check, hint, library, progress
from lora_from_scratch.linear_algebra.rank import rank, row_echelon
check("rank")
rank = lambda matrix: -1
check("rank")
hint("rank")
progress()
"""
A_RUN = """
from lora_from_scratch.cli import main
sys.exit(main("finetune --method lora --steps 2 --batch-size 2 --cards 2 --output run".split()))
"""


def run(script: str, folder: Path) -> str:
    environment = {"LORA_FROM_SCRATCH_HOME": str(folder / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {"OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(folder), "PATH": "", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_of_the_learners_side_is_imported(tmp_path: Path) -> None:
    assert int(run(EVERYTHING, tmp_path)) > 150


def test_checks_hints_and_progress_work(tmp_path: Path) -> None:
    said = run(A_UNIT, tmp_path)
    assert "rank" in said
    assert (tmp_path / "home" / "progress.json").is_file()


@pytest.mark.slow
def test_a_model_is_fine_tuned(tmp_path: Path) -> None:
    run(A_RUN, tmp_path)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


TESTS = """
from _pytest.outcomes import Skipped
for name in {names}:
    try:
        __import__("tests." + name)
    except Skipped:  # a package is missing, or cannot be imported like this
        pass
"""


@pytest.mark.slow
def test_the_tests_that_run_on_other_systems_import_nothing_of_posix(tmp_path: Path) -> None:
    files = [file for file in sorted(Path(__file__).parent.glob("test_*.py")) if not needs_linux(file)]
    assert len(files) > 80
    run(TESTS.format(names=[file.stem for file in files]), tmp_path)
