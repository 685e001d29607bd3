"""From a matched notebook to verdicts, points and outputs; the cohort's secret; which cells run."""

from __future__ import annotations

import dataclasses
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbgrader import utils as nbgraders

from lora_from_scratch.checks import units
from lora_from_scratch.checks.judge import expected_of
from lora_from_scratch.checks.observation import Opaque, Seen
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading.building import build
from lora_from_scratch.grading.cohort import secret_of, seed_of
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.grading.marking import Settings, mark, mark_file, nothing
from lora_from_scratch.grading.plan import cells_to_run
from lora_from_scratch.grading.sandbox import EarlyExit, Guess, Job, Observations, Output, Probe, ProbeResult, Run
from lora_from_scratch.grading.submissions.matching import match
from tests.damages import Notebook, after, by_id, code, fill, released, solutions, submission
from tests.sandboxes import needs_bubblewrap
from tests.tiny_course import enter_course, make_course

SECRET = "a secret of the tests"

# Right but for what is below zero, and talkative: it warns, prints and writes to stderr.
PARTLY = """\
import sys
import warnings


def fourfold_root(x, scale=4.0):
    warnings.warn("this root is slow")
    print("this root is slow", file=sys.stderr)
    return x.double() ** 0.5 * scale


print("done \\ud800")
"""


@dataclasses.dataclass
class Tiny:
    unit: Unit
    settings: Settings
    learners: str
    solved: Any

    @property
    def released(self) -> Notebook:
        return nbformat.reads(self.learners, as_version=4)

    def submission(self) -> Notebook:
        return fill(self.released, self.solved)

    def mark(self, notebook: Notebook) -> Graded:
        return mark(match(notebook, self.released), self.released, self.unit, "ada", SECRET, self.settings)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    root = make_course(tmp_path_factory.mktemp("tiny"))
    with pytest.MonkeyPatch.context() as patch:
        unit = enter_course(root, patch)
        units.units.cache_clear()
        units.names.cache_clear()
        draft = build.draft(unit, root)
        yield Tiny(unit, Settings(tmp_path_factory.mktemp("cache")), draft.learners, draft.solved)
    units.units.cache_clear()
    units.names.cache_clear()


def points(graded: Graded) -> dict[str, float]:
    return {name: verdict.points for name, verdict in graded.verdicts.items()}


FULL = {"check-fourfold_root": 4, "check-guess_root": 1, "check-Counter": 2, "check-guess_number": 2}


# --- In the sandbox -----------------------------------------------------------------------------------------


@needs_bubblewrap
def test_a_solved_notebook_has_full_points_and_nbgrader_reads_the_same(tiny: Tiny) -> None:
    graded = tiny.mark(tiny.submission())
    assert points(graded) == FULL
    assert (graded.findings, graded.open_questions, graded.isolation) == ((), {"why_count": True}, "bubblewrap")
    assert graded == tiny.mark(tiny.submission())
    notebook = nbformat.reads(graded.notebook, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if nbgraders.is_grade(cell):
            name = cell.metadata.nbgrader.grade_id
            assert nbgraders.determine_grade(cell)[0] == FULL.get(name)
    assert "Not run in grading" in next(cell for cell in notebook.cells if "print(fn(" in cell.source).outputs[0].text


@needs_bubblewrap
def test_part_of_an_answer_has_part_of_the_points_and_a_crash_takes_nothing_with_it(tiny: Tiny) -> None:
    notebook = tiny.submission()
    by_id(notebook, "fourfold_root").source = PARTLY
    after(notebook, by_id(notebook, "check-guess_root"), code("import os\nos._exit(3)"))
    by_id(notebook, "guess_number").source = "guess_number = 100"
    by_id(notebook, "why_count").source = " "
    graded = tiny.mark(notebook)
    assert points(graded) == FULL | {"check-fourfold_root": 2, "check-guess_number": 0}
    assert [(finding.kind, finding.severity) for finding in graded.findings] == [("exited", "lost")]
    assert graded.open_questions == {"why_count": False}
    shown = nbformat.reads(graded.notebook, as_version=4)
    said = json.dumps(by_id(shown, "check-fourfold_root").outputs)
    assert "below zero" in said
    assert str(seed_of(SECRET, "99", "fourfold_root")) not in graded.notebook
    assert "math.cos" not in graded.notebook
    assert "done" in by_id(shown, "fourfold_root").outputs[0].text
    assert nbgraders.determine_grade(by_id(shown, "why_count"))[0] == 0
    assert Graded.from_json(graded.to_json()) == graded


@needs_bubblewrap
def test_a_learners_own_files_are_there_and_a_bad_file_is_a_result(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "submitted" / "ada" / "unit_99" / "unit_99.ipynb"
    path.parent.mkdir(parents=True)
    (path.parent / "scale.txt").write_text("4.0")
    notebook = tiny.submission()
    by_id(notebook, "guess_root").source = "guess_root = 'B' if open('scale.txt').read() == '4.0' else 'a'"
    nbformat.write(notebook, path)
    graded = mark_file(path, tiny.released, tiny.unit, "ada", SECRET, tiny.settings, key="k")
    assert (points(graded), graded.key) == (FULL, "k")
    path.write_text("no notebook")
    graded = mark_file(path, tiny.released, tiny.unit, "ada", SECRET, tiny.settings)
    assert set(points(graded).values()) == {0}
    assert graded.needs_a_human


# --- With a stand-in for the sandbox ------------------------------------------------------------------------


def observed(tiny: Tiny, patch: pytest.MonkeyPatch, change: Callable[[Observations], Observations]) -> Graded:
    """What is made of these observations, of a notebook in which everything else is right."""

    def observe(job: Job) -> Observations:
        assert {type(step) for step in job.steps} == {Run, Probe, Guess}
        tried, guesses = {}, {}
        for step in job.steps:
            if isinstance(step, Probe):
                exercise = next(item for item in tiny.unit.exercises if item.name == step.name)
                seen = expected_of(exercise, step.seed)
                tried[step.cell_id] = ProbeResult(step.name, "seen", seen=seen)
            elif isinstance(step, Guess):
                item = next(item for item in tiny.unit.predictions if item.name == step.name)
                guesses[step.cell_id] = item.answer
        outputs = {step.cell_id: Output("ran") for step in job.steps if isinstance(step, Run)}
        return change(Observations(tried, guesses, outputs, (), "bubblewrap"))

    patch.setattr("lora_from_scratch.grading.sandbox.observe_notebook", observe)
    return tiny.mark(tiny.submission())


def tried(name: str, tried: ProbeResult) -> Callable[[Observations], Observations]:
    return lambda all: dataclasses.replace(all, probes={**all.probes, f"check-{name}": tried})


def test_a_judge_that_fails_is_a_finding_for_a_person(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    graded = observed(tiny, monkeypatch, tried("Counter", ProbeResult("Counter", "seen", seen=(Seen(),))))
    assert graded.verdicts["check-Counter"].status == "broken"
    assert points(graded) == FULL | {"check-Counter": 0}
    assert [(f.kind, f.severity, f.cell) for f in graded.findings] == [("broken check", "human", "check-Counter")]


@pytest.mark.parametrize(("status", "verdict"), [("library", "library"), ("missing", "missing"), ("lost", "stopped")])
def test_what_could_not_be_tried_has_no_points_and_says_why(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, status: Any, verdict: str
) -> None:
    graded = observed(tiny, monkeypatch, tried("Counter", ProbeResult("Counter", status, "Because of this.")))
    found = graded.verdicts["check-Counter"]
    assert (found.status, found.points, found.message) == (verdict, 0, "Because of this.")
    assert points(graded) == FULL | {"check-Counter": 0}


def test_an_answer_that_is_missing_because_its_cell_failed_says_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(all: Observations) -> Observations:
        output = Output("error", error="SyntaxError: invalid syntax", traceback="File ...")
        all = dataclasses.replace(all, outputs={**all.outputs, "exercise-Counter": output})
        return tried("Counter", ProbeResult("Counter", "missing", "There is no Counter."))(all)

    assert "SyntaxError: invalid syntax" in observed(tiny, monkeypatch, change).verdicts["check-Counter"].message


def test_replaced_functions_and_disturbed_frames_are_for_a_person(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(all: Observations) -> Observations:
        seen = all.probes["check-Counter"].seen
        all = tried("Counter", ProbeResult("Counter", "seen", seen=seen, changed=("torch.equal",)))(all)
        return dataclasses.replace(all, early_exits=(EarlyExit("frames", "check-Counter", "Disturbed."),))

    graded = observed(tiny, monkeypatch, change)
    assert [(finding.kind, finding.severity) for finding in graded.findings] == [
        ("replaced functions", "human"),
        ("frames", "human"),
    ]


@pytest.mark.parametrize("value", [None, Opaque("Liar"), [1, 2], {"a": "b"}, float("nan"), "b" * 10_000])
def test_any_value_of_a_prediction_has_a_verdict(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    graded = observed(tiny, monkeypatch, lambda all: dataclasses.replace(all, guesses={"check-guess_root": value}))
    assert points(graded) == FULL | {"check-guess_root": 0, "check-guess_number": 0}
    assert graded.verdicts["check-guess_number"].status == "stopped"  # lost: it was never read


def test_what_a_learner_prints_can_always_be_written(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(all: Observations) -> Observations:
        output = Output("error", "a\x00b\x1b[31m\ud800", "e\x07", "Name\ud800: text\x00", "line\x00\nline")
        return dataclasses.replace(all, outputs=dict.fromkeys(all.outputs, output))

    graded = observed(tiny, monkeypatch, change)
    graded.to_json().encode("utf-8")
    nbformat.validate(nbformat.reads(graded.notebook, as_version=4))
    assert "\x00" not in graded.notebook


def test_nothing_handed_in_is_no_points_in_every_check(tiny: Tiny) -> None:
    graded = nothing(tiny.released, tiny.unit, "ada", [Finding("missing", "human", "", "Nothing is there.")], "none")
    assert points(graded) == dict.fromkeys(FULL, 0)
    assert {verdict.message for verdict in graded.verdicts.values()} == {"Nothing is there."}
    notebook = nbformat.reads(graded.notebook, as_version=4)
    assert all(nbgraders.determine_grade(cell)[0] == 0 for cell in notebook.cells if nbgraders.is_grade(cell))


def test_a_release_that_checks_what_the_unit_does_not_have_is_the_courses_fault(tiny: Tiny) -> None:
    unit = dataclasses.replace(tiny.unit, exercises=tiny.unit.exercises[:1])
    with pytest.raises(ValueError, match="checks Counter, which the unit does not have"):
        nothing(tiny.released, unit, "ada", [], "none")


# --- Which cells run ------------------------------------------------------------------------------------------


def run(notebook: Notebook, unit: str) -> list[str]:
    return [cell.source for cell in cells_to_run(match(notebook, released(unit)).notebook, released(unit))]


def test_of_a_solved_notebook_only_the_answers_run_and_the_imports(tmp_path: Path) -> None:
    notebook = submission("01")
    sources = run(notebook, "01")
    assert {cell.source for cell in solutions(notebook)} <= set(sources)
    rest = [source for source in sources if "import" not in source.split("\n\n")[0] and "BEGIN SOLUTION" not in source]
    assert all(source.startswith("# Library functions") for source in rest)


def test_a_changed_experiment_runs_with_everything_that_it_needs() -> None:
    notebook = submission("01")
    changed = next(cell for cell in notebook.cells if cell.source.startswith("rounded = product(B, A)"))
    changed.source += "\nprint(rounded)"
    sources = run(notebook, "01")
    for begin in ("rounded =", "W0 = weights[", "model, _ = load_gpt2", 'product = working("outer_product_sum")'):
        assert any(source.startswith(begin) for source in sources), begin
    assert not any("draw_pivots" in source for source in sources)


def test_future_imports_always_run(tiny: Tiny) -> None:
    chosen = cells_to_run(tiny.submission(), tiny.released)
    assert any("from __future__ import annotations" in cell.source for cell in chosen)


# --- The cohort's secret --------------------------------------------------------------------------------------


def test_the_secret_is_made_once_and_is_nobody_elses(tmp_path: Path) -> None:
    secret = secret_of(tmp_path)
    assert secret == secret_of(tmp_path) != secret_of(tmp_path / "other")
    assert stat.S_IMODE((tmp_path / "cohort.json").stat().st_mode) == 0o600
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cohort.json", "other"]


def test_a_chosen_secret_is_kept_and_another_one_refused(tmp_path: Path) -> None:
    assert secret_of(tmp_path, "chosen by us") == "chosen by us" == secret_of(tmp_path)
    with pytest.raises(ValueError, match="a different secret"):
        secret_of(tmp_path, "another one")
    with pytest.raises(ValueError, match="at least 8"):
        secret_of(tmp_path, "short")
    (tmp_path / "cohort.json").write_text('{"secret": 5}')
    with pytest.raises(ValueError, match="is damaged"):
        secret_of(tmp_path)


def test_seeds_are_24_bits_and_differ_by_secret_unit_and_exercise() -> None:
    seeds = {seed_of(s, u, n) for s in ("one", "two") for u in ("01", "02") for n in ("rank", "svd")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**24 for seed in seeds)
    assert seed_of("one", "01", "rank") == seed_of("one", "01", "rank")
