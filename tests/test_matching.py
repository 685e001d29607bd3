"""Damaged submissions, put right: every kind of damage, on the units' own notebooks."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
from typing import Any

import nbformat
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from lora_from_scratch.checks.units import units
from lora_from_scratch.grading.submissions.definitions import binds, needs
from lora_from_scratch.grading.submissions.matching import MatchResult, match
from tests.damages import (
    DAMAGES,
    ROOT,
    WRITTEN,
    Notebook,
    after,
    answer,
    before,
    by_id,
    check_of,
    code,
    copied,
    metadata_stripped,
    released,
    solutions,
    submission,
    text,
)

UNITS = [unit.number for unit in units() if (ROOT / f"notebooks/unit_{unit.number}/unit_{unit.number}.ipynb").exists()]
SAMPLE = ["01", "09"]


def graded(notebook: Notebook) -> list[dict[str, Any]]:
    """What nbgrader goes by, of the graded cells in their order."""
    cells = [cell for cell in notebook.cells if "nbgrader" in cell.metadata]
    return [dict(cell.metadata) | {"id": cell.id, "type": cell.cell_type} for cell in cells]


def last_definition(notebook: Notebook, name: str) -> str:
    """What the name is bound to when its check runs, as code."""
    found = ""
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.strip() == f'check("{name}")':
            return found
        try:
            tree = ast.parse(cell.source) if cell.cell_type == "code" else ast.parse("")
        except SyntaxError:
            continue
        for node in tree.body:
            bound = getattr(node, "name", None) or [getattr(t, "id", "") for t in getattr(node, "targets", [])]
            if name in ([bound] if isinstance(bound, str) else bound):
                found = ast.unparse(node)
    raise AssertionError(f"there is no check of {name}")


def names(unit: str) -> list[str]:
    return [item.name for one in units() if one.number == unit for item in one.checked]


def assert_sound(matched: MatchResult, release: Notebook) -> None:
    """The graded cells are the release's, tests with their source; the notebook is valid; once more changes nothing."""
    assert graded(matched.notebook) == graded(release)
    for cell in matched.notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("locked"):
            assert cell.source == by_id(release, cell.metadata.nbgrader.grade_id).source
    nbformat.validate(matched.notebook)
    again = match(matched.notebook, release)
    assert json.dumps(again.notebook) == json.dumps(matched.notebook)
    assert [finding for finding in again.findings if finding.severity != "lost"] == []


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("filled", [True, False])
def test_an_undamaged_submission_comes_back_as_it_is(unit: str, filled: bool) -> None:
    given = submission(unit) if filled else released(unit)
    matched = match(given, released(unit))
    assert matched.findings == ()
    assert [cell.source for cell in matched.notebook.cells] == [cell.source for cell in given.cells]
    assert_sound(matched, released(unit))


@pytest.mark.parametrize(("name", "unit"), [(name, SAMPLE[n % len(SAMPLE)]) for n, name in enumerate(DAMAGES)])
def test_what_the_learner_wrote_is_found_whatever_happened_to_the_cells(name: str, unit: str) -> None:
    damage, kinds = DAMAGES[name]
    given = submission(unit)
    damage(given)
    wanted = submission(unit)
    for cell in given.cells:  # where a damage has changed an answer itself, that is the answer
        if cell in solutions(given) and "my_" in cell.source:
            by_id(wanted, cell.metadata.nbgrader.grade_id).source = cell.source
    kept = copy.deepcopy(given)
    matched = match(given, released(unit))
    assert given == kept, "the submission itself was changed"
    assert {finding.kind for finding in matched.findings} == kinds
    assert {finding.severity for finding in matched.findings} <= {"repaired"}
    for exercise in names(unit):
        assert last_definition(matched.notebook, exercise) == last_definition(wanted, exercise), exercise
    assert answer(matched.notebook).source.split() == WRITTEN.split()
    assert_sound(matched, released(unit))


# Together they would take something of the learner's away, or what one of them writes is not the learner's.
NOT_TOGETHER = {
    "solution copied before it was right",
    "moved with the helper above it",
    "helper below the test",
    "a helper in a test",
    "solution split",
    "solution split after a helper",
    "solution split and the second half without metadata",
    "all code in one cell",
    "all upside down",
    "all shuffled",
    "everything deleted that is not graded",
    "metadata ids and tests stripped and all prose",
    "tests edited",
    "one test deleted",
    "all tests deleted",
}
TOGETHER = [name for name in DAMAGES if name not in NOT_TOGETHER and not name.startswith("answer")]


@settings(max_examples=8, deadline=None, derandomize=True)
@drawn(st.lists(st.sampled_from(TOGETHER), min_size=2, max_size=4, unique=True))
def test_several_damages_at_once_lose_nothing_either(damages: list[str]) -> None:
    given, wanted = submission("01"), submission("01")
    for name in damages:
        with contextlib.suppress(StopIteration, IndexError, ValueError, KeyError):  # what it damages is gone already
            DAMAGES[name][0](given)
    matched = match(given, released("01"))
    for exercise in names("01"):
        assert last_definition(matched.notebook, exercise) == last_definition(wanted, exercise), exercise
    assert_sound(matched, released("01"))


def test_a_deleted_answer_is_lost_and_said_to_be() -> None:
    given = submission("01")
    given.cells.remove(solutions(given)[1])
    given.cells.remove(answer(given))
    matched = match(given, released("01"))
    assert [(f.kind, f.severity, f.cell) for f in matched.findings] == [
        ("deleted answer", "lost", "nearly_low"),
        ("deleted cell", "lost", "rank"),
    ]
    assert by_id(matched.notebook, "rank").source == by_id(released("01"), "rank").source
    assert_sound(matched, released("01"))


def test_of_different_copies_the_last_that_is_no_stub_counts_and_the_others_are_kept_but_not_run() -> None:
    given = submission("01")
    own = by_id(given, "rank")
    for body in ("return 1", "return 2", "raise NotImplementedError"):
        given.cells.append(copied(own, f"def rank(m):\n    {body}"))
    matched = match(given, released("01"))
    assert by_id(matched.notebook, "rank").source == "def rank(m):\n    return 2"
    assert "with different code" in matched.findings[0].message
    kept = [cell.source for cell in matched.notebook.cells if cell.cell_type == "raw"]
    assert kept == [own.source, "def rank(m):\n    return 1"]


def test_code_that_is_not_python_is_kept_and_takes_no_other_answer_with_it() -> None:
    given = submission("01")
    first, second = solutions(given)[:2]
    broken = second.source.replace("return", "return return")
    first.source += f"\n\n\n{broken}"
    given.cells.remove(second)
    matched = match(given, released("01"))
    assert by_id(matched.notebook, "rank").source == broken
    assert last_definition(matched.notebook, "row_echelon") == last_definition(submission("01"), "row_echelon")
    assert_sound(matched, released("01"))


def test_the_librarys_version_is_no_answer_of_the_learners() -> None:
    given = released("01")
    cell = by_id(given, "rank")
    after(given, check_of(given, cell), code('rank = library("rank")'))
    matched = match(given, released("01"))
    assert matched.findings == ()
    assert by_id(matched.notebook, "rank").source == cell.source


def test_a_scratch_version_before_the_answer_does_not_count() -> None:
    given = submission("01")
    cell = by_id(given, "rank")
    before(given, cell, code("def rank(m):\n    return 'a first try'"))
    metadata_stripped(given)
    matched = match(given, released("01"))
    assert last_definition(matched.notebook, "rank") == last_definition(submission("01"), "rank")


def test_copies_that_differ_in_indentation_differ() -> None:
    given = submission("01")
    own = by_id(given, "rank")
    first, second = (
        f"def rank(m):\n    for row in m:\n        pass\n{indent}return 1" for indent in (" " * 8, " " * 4)
    )
    own.source = first
    after(given, own, copied(own, second))
    assert by_id(match(given, released("01")).notebook, "rank").source == second


@pytest.mark.parametrize(
    ("source", "name", "kind"),
    [
        ("%%time\nrank = lambda m: 1", "rank", "real"),
        ("%%writefile rank.py\ndef rank(m):\n    return 1", "rank", ""),
        ("%load_ext x\n!ls\nrank?\ndef rank(m):\n    !ls\n    return 1", "rank", "real"),
        ("def rank(m):\n    return (m\n        % 7)", "rank", "real"),
        ("def rank(m): 'nothing'; ...", "rank", "stub"),
        ("class Counter:\n    def step(self):\n        raise NotImplementedError('later')", "Counter", "stub"),
        ("rank = working('rank')", "rank", "library"),
        ("from lora_from_scratch.linear_algebra.rank import rank", "rank", "library"),
        ("for rank in (1, 2): pass", "rank", "value"),
        ("def rank(m): return 1\nrank = 3", "rank", "value"),
        ("if True:\n    rank = 3", "rank", "value"),
        ("def rank(m)\n    return 1", "rank", "real"),
        ("a, rank = 1, 2", "rank", "value"),
    ],
)
def test_what_a_cell_binds_is_read_off_its_code(source: str, name: str, kind: str) -> None:
    assert binds(source).get(name, "") == kind


def test_what_a_cell_needs_is_what_it_does_not_bind_before() -> None:
    source = "import math\nx = x + y\ndef f(a=z):\n    return g(a) + math.pi + h\nh = 1\nfor i in r: print(i)"
    assert needs(source) == {"x", "y", "z", "g", "r"}


def test_pictures_in_an_answer_stay_with_it() -> None:
    given = submission("01")
    cell = answer(given)
    own = text("![a drawing](attachment:drawing.png)") | {"attachments": {"drawing.png": {"image/png": "iVBORw0KGgo="}}}
    after(given, cell, nbformat.from_dict(own))
    cell.source = "*Your answer here.*"
    matched = match(given, released("01"))
    assert answer(matched.notebook).attachments == own["attachments"]


@settings(max_examples=25, deadline=None, derandomize=True)
@drawn(
    st.lists(
        st.tuples(
            st.sampled_from(["code", "markdown", "raw"]),
            st.sampled_from(["def rank(:", "check('rank')", "rank = rank\n", "x" * 3000, "((((" * 300, "\t\x0c\u2028"])
            | st.text(max_size=40),
            st.sampled_from(["rank", "check-rank", "nearly_low", "rank_of_counting", "", "unknown"]),
        ),
        max_size=8,
    )
)
def test_any_notebook_is_matched(cells: list[tuple[str, str, str]]) -> None:
    nodes = [
        {"cell_type": kind, "id": f"cell-{number}", "source": source, "metadata": {"nbgrader": {"grade_id": grade_id}}}
        for number, (kind, source, grade_id) in enumerate(cells)
    ]
    given = nbformat.from_dict({"cells": nodes, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    matched = match(given, released("01"))
    assert graded(matched.notebook) == graded(released("01"))
    again = match(matched.notebook, released("01"))
    assert json.dumps(again.notebook) == json.dumps(matched.notebook)
