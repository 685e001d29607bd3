"""The notebooks that are committed: they are what the sources give, and they run."""

from __future__ import annotations

import base64

import nbformat
import pytest

from lora_from_scratch.checks.units import units
from lora_from_scratch.grading.building import build, dependencies, needs, refusals
from lora_from_scratch.grading.building.differences import differences
from tests.tiny_course import ROOT
from tests.turns import in_turn

UNITS = [
    pytest.param(unit, id=f"unit_{unit.number}", marks=getattr(pytest.mark, f"unit_{unit.number}"))
    for unit in units()
    if unit.number in build.sources(ROOT)
]
EXECUTED = [in_turn(unit) for unit in units() if unit.number in build.sources(ROOT)]
MEBIBYTES, SECONDS = 2048, 300
MEBIBYTES_OF_A_REAL_MODEL = 3072  # for units that need more than the course's own packages


@pytest.mark.parametrize("unit", UNITS)
def test_the_committed_notebooks_are_what_the_sources_give(unit: build.Unit) -> None:
    made = build.draft(unit, ROOT)
    learners = ROOT / "notebooks" / made.name / f"{made.name}.ipynb"
    again = f"what is built is never edited; build it again: lora-from-scratch build {unit.number}"
    assert learners.read_text(encoding="utf-8") == made.learners, again
    solved = nbformat.read(ROOT / "solutions" / made.name / f"{made.name}.ipynb", as_version=4)
    for cell, committed in zip(made.solved.cells, solved.cells, strict=True):
        inputs = (cell.id, cell.cell_type, cell.source, cell.metadata)
        assert inputs == (committed.id, committed.cell_type, committed.source, committed.metadata), again
    assert made.solved.metadata == solved.metadata


@pytest.mark.parametrize("unit", UNITS)
def test_the_committed_solutions_show_what_was_run_and_nothing_that_is_refused(unit: build.Unit) -> None:
    made = build.draft(unit, ROOT)
    folder = ROOT / "solutions" / made.name
    solved = nbformat.read(folder / f"{made.name}.ipynb", as_version=4)
    for node, cell in zip(solved.cells, made.cells, strict=True):
        assert node.cell_type != "code" or node.execution_count
        assert refusals.in_the_outputs(node, cell) == []
        if cell.role == "check":
            assert refusals.not_full_points(node, cell) == []
        if cell.figure:
            shown = next(output.data["image/png"] for output in node.outputs if "image/png" in output.get("data", {}))
            for kind in ("solutions", "notebooks"):
                assert (ROOT / kind / made.name / cell.figure).read_bytes() == base64.b64decode(shown)


@pytest.mark.parametrize("unit", UNITS)
def test_the_committed_outputs_are_those_of_this_code(unit: build.Unit) -> None:
    made = build.draft(unit, ROOT)
    solved = nbformat.read(ROOT / "solutions" / made.name / f"{made.name}.ipynb", as_version=4)
    now = dependencies.hashes(unit, made.solved, ROOT)
    why = build.reasons(made, solved, dependencies.recorded(ROOT).get(made.name), now)
    assert why == [], f"execute it again, and see what it shows now: lora-from-scratch build {unit.number}"


@pytest.mark.parametrize("unit", EXECUTED)
def test_a_solution_runs_offline_in_time_and_memory_without_a_warning_and_shows_what_is_committed(
    unit: build.Unit,
) -> None:
    made = build.draft(unit, ROOT)
    _, cost = build.run(made, ROOT)  # it refuses warnings, errors, and checks without full points
    assert 0 < cost.mebibytes < (MEBIBYTES_OF_A_REAL_MODEL if needs.needs(unit) else MEBIBYTES)
    assert 0 < cost.seconds < SECONDS
    if lacking := needs.missing(unit):
        pytest.skip(f"run on a stand-in, since this unit's results need {', '.join(lacking)}: outputs not compared")
    solved = nbformat.read(ROOT / "solutions" / made.name / f"{made.name}.ipynb", as_version=4)
    here = dependencies.recorded(ROOT)[made.name]["processor"] == dependencies.processor()
    assert differences(made.cells, solved, made.solved, same_processor=here) == []


@pytest.mark.parametrize("unit", EXECUTED)
def test_an_unsolved_notebook_runs_to_its_end_and_says_what_is_not_started(unit: build.Unit) -> None:
    build.run_unsolved(build.draft(unit, ROOT))  # it refuses whatever is not as the name of this test says


def test_every_unit_that_is_checked_has_a_notebook() -> None:
    assert [unit.number for unit in units()] == build.sources(ROOT)
    for kind in ("notebooks", "solutions"):
        assert sorted(path.stem for path in (ROOT / kind).glob("*/*.ipynb")) == [f"unit_{u.number}" for u in units()]
