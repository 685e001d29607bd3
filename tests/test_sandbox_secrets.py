"""What is in the sandbox and when: no seed, no input before its exercise is tried, no other copy of the library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_from_scratch.checks.units import units
from lora_from_scratch.grading import cohort
from lora_from_scratch.grading.building.solution import source_of
from lora_from_scratch.grading.cohort import seed_of
from lora_from_scratch.grading.sandbox import Job, Probe, Run, bubblewrap, observe_notebook, wire
from lora_from_scratch.grading.sandbox.job import Step
from lora_from_scratch.grading.sandbox.observing import _NotebookObserver
from lora_from_scratch.grading.sandbox.pristine import Pristine, without_modes
from lora_from_scratch.grading.sandbox.stripped import find_unit
from tests.sandboxes import named, needs_bubblewrap, running, script, verdict_of

SEED = 7
OWN = {exercise.name: source_of(exercise.object) for exercise in find_unit("01").exercises}
PARTS = "from __future__ import annotations\nimport torch\nfrom torch import Tensor\n"
PARTS += "from lora_from_scratch.linear_algebra.rank import *\n"


# --- Seeds ---------------------------------------------------------------------------------------------------


def test_every_exercise_has_a_seed_of_its_own_and_every_secret_others() -> None:
    names = [(unit.number, exercise.name) for unit in units() for exercise in unit.exercises]
    seeds = {seed_of("a secret of tests", *name) for name in names}
    assert len(seeds) == len(names)
    assert seeds.isdisjoint(seed_of("a secret of tests.", *name) for name in names)
    assert all(0 <= seed < 2**24 for seed in seeds)


def test_a_word_that_a_person_chose_is_stretched_before_anything_follows_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[dict[str, Any]] = []
    real = cohort.hashlib.scrypt

    def spy(word: bytes, **how: Any) -> bytes:
        asked.append(how)
        return real(word, **how)

    monkeypatch.setattr(cohort.hashlib, "scrypt", spy)
    cohort._stretched.cache_clear()
    seed_of("autumn2025", "01", "rank")
    seed_of("autumn2025", "01", "row_echelon")
    assert [how["n"] for how in asked] == [cohort.COST]
    assert cohort.COST >= 2**16


# --- Inputs --------------------------------------------------------------------------------------------------


def test_the_job_says_neither_inputs_nor_seeds(tmp_path: Path) -> None:
    unit = find_unit("01")
    steps: list[Step] = [Run("imports", PARTS), *(Probe(e.name, 1_000_003, f"check-{e.name}") for e in unit.exercises)]
    observing = _NotebookObserver(Job("01", tuple(steps), tmp_path), unit, {e.name: e for e in unit.exercises})
    job: Any = observing._describe(steps)
    assert {key for step in job["steps"] for key in step} == {"kind", "name", "seconds", "source"}
    assert b"1000003" not in wire.pack(job)


@needs_bubblewrap
@pytest.mark.unit_01
def test_what_an_answer_changes_is_seen_whatever_it_does_to_the_comparing(library_cache: Path) -> None:
    spoil = f"{PARTS}\n{OWN['row_echelon']}\n_own = row_echelon\ndef row_echelon(matrix, *more, **named):\n"
    spoil += "    result = _own(matrix.clone(), *more, **named)\n    matrix.add_(1)\n    return result\n"
    blind = "for name in ('equal', 'nan_to_num', 'allclose'):\n    setattr(torch, name, lambda *a, **k: True)\n"
    blind += (
        "import lora_from_scratch.checks.observation as o\no.identical = lambda *a: True\no.changed = lambda *a: ()\n"
    )
    steps = (Run("spoil", spoil + blind), Probe("row_echelon", SEED, "check"))
    found = observe_notebook(Job("01", steps, library_cache))
    assert {seen.changed for seen in found.probes["check"].seen if not seen.raised} == {("matrix",)}
    assert not verdict_of(found, "check", SEED).passed


def test_modes_that_were_left_on_are_off_while_an_answer_is_tried_and_on_again_afterwards() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return "blinded"

    with Mode():
        with without_modes():
            assert torch.equal(torch.zeros(1), torch.ones(1)) is False
        assert torch.zeros(1) == "blinded"


@pytest.mark.filterwarnings("ignore:Warning only once")
def test_a_kernel_that_a_notebook_registers_for_an_operator_is_taken_out_and_told() -> None:
    pristine = Pristine("no package")
    library = torch.library.Library("aten", "IMPL")
    library.impl("equal", lambda one, other: True, "CPU")
    assert torch.equal(torch.zeros(1), torch.ones(1))
    assert "torch.ops.aten.equal" in pristine.restore()
    assert not torch.equal(torch.zeros(1), torch.ones(1))


# --- Copies --------------------------------------------------------------------------------------------------


@pytest.fixture
def copies() -> Iterator[Path]:
    """Another installation of the library in what is visible of the environment."""
    folder = Path(sys.prefix, "lib", f"copies-of-a-test-{os.getpid()}")
    for name in ("lora_from_scratch", "deep/er/lora_from_scratch", "lora-from-scratch-0.1"):
        (folder / name).mkdir(parents=True)
        (folder / name / "rank.py").write_text("ANSWER")
    (folder / "lora_from_scratch-0.1-py3-none-any.whl").write_text("ANSWER")
    (folder / "lora_from_scratchy").mkdir()
    bubblewrap.other_copies.cache_clear()
    yield folder
    bubblewrap.other_copies.cache_clear()
    for base, folders, names in os.walk(folder, topdown=False):
        for name in names:
            os.remove(os.path.join(base, name))
        for name in folders:
            os.rmdir(os.path.join(base, name))
    folder.rmdir()


@needs_bubblewrap
def test_another_copy_of_the_library_is_empty_inside(copies: Path, tmp_path: Path) -> None:
    end, frames = script(
        f"""
        found = []
        for base, folders, names in os.walk({str(copies)!r}):
            for name in names:
                try:
                    found += [name] if open(os.path.join(base, name)).read() else []
                except OSError:  # it is closed altogether
                    pass
        send(found)
        send(sorted(os.listdir({str(copies)!r})))
        """,
        tmp_path,
    )
    assert (end.why, frames[1]) == ("finished", [])
    assert "lora_from_scratchy" in frames[2]  # type: ignore[operator]


# --- The end of the grader -----------------------------------------------------------------------------------

GRADER = """
    import sys
    from pathlib import Path
    from tests.sandboxes import script

    script(sys.argv[1], Path(sys.argv[2]), walls=sys.argv[3] == "walls")
"""
STAYS = """
    import ctypes, time
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, 0, 0, 0, 0)
    libc.syscall(157, 1, 0, 0, 0, 0)
    open({started!r}, "w").close() if {outside} else None
    time.sleep(120)
"""


@needs_bubblewrap
@pytest.mark.parametrize("walls", ["walls", "no walls"])
def test_a_process_that_wants_to_survive_the_graders_death_does_not(tmp_path: Path, walls: str) -> None:
    mark = f"{os.getpid() % 10**6}-{walls.replace(' ', '')}"
    text = STAYS.format(started=str(tmp_path / "started"), outside=walls != "walls")
    command = [sys.executable, "-c", textwrap.dedent(GRADER), named(mark, text), str(tmp_path), walls]
    grader = subprocess.Popen(command, cwd=Path(__file__).parents[1], start_new_session=True)
    wait_until(lambda: running(mark))
    time.sleep(2)
    os.kill(grader.pid, signal.SIGKILL)
    grader.wait()
    wait_until(lambda: not running(mark))


def wait_until(holds: Any) -> None:
    """For half a minute at most: a busy machine is slow."""
    for _ in range(300):
        if holds():
            return
        time.sleep(0.1)
    pytest.fail("it has not come about")
