"""Whole notebooks in the sandbox: what is seen of them is what the notebook's own check would see."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_from_scratch.checks.bank import right_answers, wrong_answers
from lora_from_scratch.checks.judge import judge
from lora_from_scratch.checks.notebook import verdict_on
from lora_from_scratch.checks.units import find
from lora_from_scratch.grading.building.solution import source_of
from lora_from_scratch.grading.sandbox import (
    Guess,
    Job,
    Limits,
    Observations,
    Probe,
    Run,
    SandboxError,
    bubblewrap,
    observe_notebook,
    unavailable,
)
from lora_from_scratch.grading.sandbox.stripped import TAKEN_OUT, find_unit
from tests.sandboxes import cell_of, needs_bubblewrap, notebook_of, verdict_of
from tests.tiny_course import enter_course, make_course

SEED = 7

# Unit 01, as learners write it.
IMPORTS = "import torch\nfrom lora_from_scratch.checks import check, hint, library, progress, working\n"
OWN = {exercise.name: source_of(exercise.object) for exercise in find_unit("01").exercises}
PARTS = "from __future__ import annotations\nimport torch\nfrom torch import Tensor\n"
PARTS += "from lora_from_scratch.linear_algebra.rank import *\n"
PARTS += f"del {', '.join(OWN)}\n"  # a learner's notebook has not got them of the library


def points(observed: Observations, cell: str, seed: int = SEED) -> float:
    return verdict_of(observed, cell, seed).points


# --- The bank ----------------------------------------------------------------------------------------


@needs_bubblewrap
@pytest.mark.unit_01
@pytest.mark.unit_09
@pytest.mark.parametrize("number", ["01", "09"])
def test_every_answer_of_the_bank_gets_the_verdict_that_it_gets_in_a_notebook(number: str, library_cache: Path) -> None:
    unit = find_unit(number)
    answers = [
        answer
        for exercise in unit.exercises
        for answer in right_answers(exercise.name) + wrong_answers(exercise.name)
        if not answer.hangs
    ]
    # With nothing taken out: wrong answers are built on the library's version of the same exercise.
    observed = observe_notebook(
        Job(number, tuple(notebook_of(unit, answers, SEED)), library_cache, without=frozenset())
    )
    for answer in answers:
        told = verdict_of(observed, cell_of(answer), SEED)
        there = verdict_on(answer.exercise, SEED, {answer.exercise: answer.object})
        assert (told.status, told.points, told.misconception) == (there.status, there.points, there.misconception)
        assert told.passed == answer.right


# --- A notebook --------------------------------------------------------------------------------------

HONEST = (
    Run("imports", IMPORTS + PARTS),
    Run(
        "noise",
        "import sys, warnings\nprint('printed')\nprint('to stderr', file=sys.stderr)\nwarnings.warn('careful')\n"
        "print('x' * 100_000)\n3 + 4",
    ),
    Run("magic", "%time total = sum(range(10))\nawaited = 1"),
    Run(
        "own file",
        "import helper, os\nprint(open('data.csv').read(), helper.VALUE)\nprint(sorted(os.listdir('.')))",
    ),
    Run(
        "plot",
        "from lora_from_scratch.support import plotting\nfrom lora_from_scratch.support.figures import show\n"
        "figure, (axes,) = plotting.panels(1)\naxes.plot([1, 2])\nshow(figure, 'a line')",
    ),
    Run("room", "from lora_from_scratch.checks import join, leave\njoin('K7M3QX@192.168.1.20', 'Ada')\nleave()"),
    Run("taken", "row_echelon = library('row_echelon')"),
    Run("rank", OWN["rank"].replace("    echelon", "    import warnings; warnings.warn('slow')\n    echelon", 1)),
    Run("loud", "def loud(answer):\n    return lambda *a, **k: print('hello') or answer(*a, **k)\nrank = loud(rank)"),
    Probe("rank", SEED, "check-rank"),
    Probe("row_echelon", SEED, "check-row_echelon"),
    Run("not a function", "outer_product_sum = 3"),
    Probe("outer_product_sum", SEED, "check-outer_product_sum"),
    Probe("low_rank_parameter_count", SEED, "check-low_rank_parameter_count"),
    Run("fails", "before = 1\nraise ValueError('negative')"),
    Run("syntax", "def ("),
    Run(
        "patches",
        "torch.equal = lambda *a: True\ntorch.Tensor.any = lambda *a, **k: 1\n"
        "import lora_from_scratch.checks.observation as o\no.observe = None\no.len = None",
    ),
    Run("rank_deficiency", OWN["rank_deficiency"]),
    Probe("rank_deficiency", SEED, "check-rank_deficiency"),
    Run("predicted", "guess = 'b'"),
    Guess("guess", "check-guess"),
    Guess("nothing", "check-nothing"),
    Run("late", "guess = 'c'\nprint(before)"),
)  # fmt: skip


@pytest.fixture(scope="module")
def honest(library_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Observations:
    files = tmp_path_factory.mktemp("files")
    (files / "data.csv").write_text("1,2")
    (files / "helper.py").write_text("VALUE = 17")
    (files / "json.py").write_text("raise ImportError('not the real one')")
    (files / "link").symlink_to("/etc/passwd")
    (files / "folder").mkdir()
    return observe_notebook(Job("01", HONEST, library_cache, files=files))


@needs_bubblewrap
@pytest.mark.unit_01
def test_warnings_prints_and_plots_cost_nothing(honest: Observations) -> None:
    assert verdict_of(honest, "check-rank", SEED).passed
    assert honest.probes["check-rank"].seen[0].printed == "hello\n"
    assert [honest.outputs[cell].status for cell in ("noise", "magic", "plot", "room", "taken", "late")] == ["ran"] * 6
    noise = honest.outputs["noise"]
    assert noise.stdout.startswith("printed\nxxx")
    assert noise.stdout.endswith("more characters)")
    assert len(noise.stdout) < Limits().printed + 100
    assert "to stderr" in noise.stderr
    assert "careful" in noise.stderr
    assert honest.early_exits == ()


@needs_bubblewrap
@pytest.mark.unit_01
def test_taking_one_answer_of_the_library_keeps_the_points_of_the_others(honest: Observations) -> None:
    assert "row_echelon" in OWN["rank"]  # so that it needs the body that is taken out
    assert points(honest, "check-rank") == find("rank")[1].points
    assert honest.probes["check-row_echelon"].status == "library"


@needs_bubblewrap
@pytest.mark.unit_01
def test_what_cannot_be_tried_is_told_as_in_the_notebook(honest: Observations) -> None:
    for name, answers in (("outer_product_sum", {"outer_product_sum": 3}), ("low_rank_parameter_count", {})):
        tried, there = honest.probes[f"check-{name}"], verdict_on(name, SEED, answers)
        assert (tried.status, tried.message) == (there.status, there.message) == ("missing", there.message)


@needs_bubblewrap
@pytest.mark.unit_01
def test_an_error_stops_neither_the_notebook_nor_the_next_cell(honest: Observations) -> None:
    fails = honest.outputs["fails"]
    assert (fails.status, fails.error) == ("error", "ValueError: negative")
    assert "raise ValueError('negative')" in fails.traceback
    assert "inside.py" not in fails.traceback
    assert honest.outputs["syntax"].error.startswith("SyntaxError")
    assert honest.outputs["late"].stdout == "1\n"


@needs_bubblewrap
@pytest.mark.unit_01
def test_what_a_notebook_replaces_in_pytorch_is_put_back_and_told(honest: Observations) -> None:
    tried = honest.probes["check-rank_deficiency"]
    assert set(tried.changed) == {
        "torch.equal",
        "torch.Tensor.any",
        *("lora_from_scratch.checks.observation." + name for name in ("observe", "len")),
    }
    assert verdict_of(honest, "check-rank_deficiency", SEED).passed
    assert honest.probes["check-rank"].changed == ()


@needs_bubblewrap
@pytest.mark.unit_01
def test_a_prediction_is_what_it_is_at_its_check(honest: Observations) -> None:
    assert honest.guesses == {"check-guess": "b", "check-nothing": None}


@needs_bubblewrap
@pytest.mark.unit_01
def test_the_learners_own_files_are_there_and_take_no_librarys_place(honest: Observations) -> None:
    assert honest.outputs["own file"].stdout == "1,2 17\n['data.csv', 'helper.py', 'json.py']\n"


# --- What ends a process -----------------------------------------------------------------------------

DEATHS = (
    Run("imports", IMPORTS + PARTS),
    Run("one", OWN["row_echelon"]),
    Probe("row_echelon", SEED, "check-row_echelon"),
    Run("leaves", "import os\nos._exit(0)\ndef rank(matrix): return 1"),
    Probe("rank", SEED, "check-rank"),
    Run("crashes", "def rank_deficiency(matrix):\n    import ctypes\n    return ctypes.string_at(0)"),
    Probe("rank_deficiency", SEED, "check-rank_deficiency"),
    Run(
        "forges",
        "import os\nfor place in range(3, 40):\n    try: os.write(place, b'\\0' * 40)\n    except OSError: pass",
    ),
    Run("four", OWN["outer_product_sum"]),
    Probe("outer_product_sum", SEED, "check-outer_product_sum"),
    Run("five", "def low_rank_parameter_count(**sizes):\n    raise KeyboardInterrupt"),
    Probe("low_rank_parameter_count", SEED, "check-low_rank_parameter_count"),
    Run("last", "print('the end')"),
)


@needs_bubblewrap
@pytest.mark.unit_01
def test_a_crash_in_one_question_keeps_the_ones_before_and_after(library_cache: Path) -> None:
    observed = observe_notebook(Job("01", DEATHS, library_cache))
    assert [(early_exit.why, early_exit.cell_id) for early_exit in observed.early_exits] == [
        ("exited", "leaves"),
        ("crashed", "check-rank_deficiency"),
        ("frames", "forges"),
    ]
    assert observed.ended == "exited"
    assert verdict_of(observed, "check-row_echelon", SEED).passed
    assert verdict_of(observed, "check-outer_product_sum", SEED).passed
    lost = observed.probes["check-rank"]
    assert (lost.status, lost.message) == ("lost", observed.early_exits[0].message)
    assert "ended Python itself" in lost.message
    assert observed.probes["check-rank_deficiency"].status == "lost"
    assert {cell for cell, output in observed.outputs.items() if output.status == "died"} == {"leaves", "forges"}
    assert observed.outputs["last"].stdout == "the end\n"
    assert verdict_of(observed, "check-low_rank_parameter_count", SEED).status == "failed"
    assert observed.probes["check-low_rank_parameter_count"].seen[0].errors == ("KeyboardInterrupt",)


@needs_bubblewrap
@pytest.mark.unit_01
def test_a_cell_or_an_answer_without_end_is_stopped_and_the_rest_goes_on(library_cache: Path) -> None:
    steps = (
        Run("imports", IMPORTS + PARTS),
        Run("loop", "while True:\n    pass"),
        Run("stubborn", "while True:\n    try:\n        while True: pass\n    except:\n        pass"),
        Run("rank", "def rank(matrix):\n    while True: pass"),
        Probe("rank", SEED, "check-rank"),
        Run("one", OWN["row_echelon"]),
        Probe("row_echelon", SEED, "check-row_echelon"),
        Run("deaf", "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(600)"),
        Run("last", "print('the end')"),
    )
    limits = Limits(cell_seconds=2, patience=0.3)
    observed = observe_notebook(Job("01", steps, library_cache, limits=limits))
    assert [observed.outputs[cell].status for cell in ("loop", "stubborn", "deaf")] == ["stopped", "stopped", "died"]
    assert "2 seconds" in observed.outputs["loop"].error
    assert verdict_of(observed, "check-rank", SEED).status == "stopped"
    assert verdict_of(observed, "check-row_echelon", SEED).passed
    assert [(early_exit.why, early_exit.cell_id) for early_exit in observed.early_exits] == [("wall time", "deaf")]
    assert observed.outputs["last"].stdout == "the end\n"


@needs_bubblewrap
@pytest.mark.unit_01
def test_the_time_for_everything_is_kept_over_all_starts(library_cache: Path) -> None:
    steps = (Run("sleep", "import time\ntime.sleep(600)"), Run("last", "1"), Probe("rank", SEED, "check-rank"))
    observed = observe_notebook(Job("01", steps, library_cache, limits=Limits(seconds=1)))
    assert observed.ended == "wall time"
    assert observed.outputs["sleep"].status == "died"
    assert observed.outputs["last"].status == "not run"
    assert observed.probes["check-rank"].status == "lost"


@needs_bubblewrap
@pytest.mark.unit_01
def test_an_answer_that_needs_too_much_memory_fails_by_itself(library_cache: Path) -> None:
    steps = (
        Run("imports", IMPORTS + PARTS),
        Run("rank", "def rank(matrix):\n    return len(torch.zeros(10**9).tolist())"),
        Probe("rank", SEED, "check-rank"),
        Run("cell", "kept = [bytearray(10**8) for _ in range(100)]"),
        Run("one", OWN["row_echelon"]),
        Probe("row_echelon", SEED, "check-row_echelon"),
    )
    observed = observe_notebook(Job("01", steps, library_cache, limits=Limits(memory=600 * 2**20)))
    assert not verdict_of(observed, "check-rank", SEED).passed
    assert observed.outputs["cell"].error == "MemoryError: "
    assert verdict_of(observed, "check-row_echelon", SEED).passed


# --- Without walls -----------------------------------------------------------------------------------


@pytest.mark.unit_01
def test_without_walls_the_same_is_seen_and_it_is_said(library_cache: Path) -> None:
    steps = (
        Run("imports", IMPORTS + PARTS),
        Run("one", OWN["row_echelon"]),
        Probe("row_echelon", SEED, "check-row_echelon"),
        Run("assets", "from lora_from_scratch.gpt2 import load_gpt2\nmodel, _ = load_gpt2('bundled')"),
        Run("judge", "import lora_from_scratch.checks.judge"),
    )  # fmt: skip
    observed = observe_notebook(Job("01", steps, library_cache, isolation="none"))
    assert observed.isolation == "none"
    assert verdict_of(observed, "check-row_echelon", SEED).passed
    assert observed.outputs["assets"].status == "ran"
    assert observed.outputs["judge"].error.startswith("ModuleNotFoundError")


def test_without_bubblewrap_grading_stops_and_says_what_to_do(
    library_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bubblewrap, "PROGRAM", "there-is-no-such-program")
    bubblewrap.unavailable.cache_clear()
    try:
        assert "apt install bubblewrap" in str(unavailable())
        with pytest.raises(SandboxError, match="apt install bubblewrap"):
            observe_notebook(Job("01", (), library_cache))
    finally:
        monkeypatch.undo()
        bubblewrap.unavailable.cache_clear()


@needs_bubblewrap
def test_an_instructors_own_unit_is_graded_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = enter_course(make_course(tmp_path), monkeypatch)
    monkeypatch.setattr("lora_from_scratch.grading.sandbox.stripped.units", lambda: (unit,))
    root, counter = (source_of(exercise.object) for exercise in unit.exercises)
    steps = (
        Run(
            "imports",
            "from __future__ import annotations\nimport math, torch\nfrom torch import Tensor\n"
            "from tiny_library import LARGEST, require_rank, fourfold_root as theirs",
        ),
        Run("stolen", "def fourfold_root(x, scale=4.0):\n    return theirs(x, scale)"),
        Probe("fourfold_root", SEED, "check stolen"),
        Run("own", root),
        Probe("fourfold_root", SEED, "check own"),
        Run("counter", counter),
        Probe("Counter", SEED, "check counter"),
        Run("look", "import tiny_library, inspect\nprint(inspect.getsource(tiny_library))"),
    )  # fmt: skip
    observed = observe_notebook(Job("99", steps, tmp_path / "cache"))
    exercises = {exercise.name: exercise for exercise in unit.exercises}
    verdicts = {cell: judge(exercises[tried.name], SEED, list(tried.seen)) for cell, tried in observed.probes.items()}
    assert {cell: verdict.points for cell, verdict in verdicts.items()} == {
        "check stolen": 0,
        "check own": 4,
        "check counter": 2,
    }
    assert "math.cos" not in observed.outputs["look"].stdout
    assert TAKEN_OUT in observed.probes["check stolen"].seen[0].message


# --- What is asked for ---------------------------------------------------------------------------------


def test_a_job_that_cannot_be_done_is_refused(library_cache: Path) -> None:
    for job, said in (
        (Job("77", (), library_cache), "no unit '77'"),
        (Job("01", (Probe("delta_weight", 1, "a"),), library_cache), "delta_weight"),
        (Job("01", (Run("a", ""), Run("a", "")), library_cache), "same cell_id"),
    ):
        with pytest.raises(ValueError, match=said):
            observe_notebook(job)
