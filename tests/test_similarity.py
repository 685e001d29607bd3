"""Answers that are the same code apart from names and layout: winnowing, and the page."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from lora_from_scratch.checks.units import units
from lora_from_scratch.grading import similarity
from lora_from_scratch.grading.similarity import (
    GRAM,
    LEAST,
    WINDOW,
    fingerprints,
    honest_rate,
    similar_pairs,
    tokens_of,
)
from lora_from_scratch.grading.similarity_report import page
from tests.cli_calls import complaint, output_of
from tests.grading_course import NAME, RIGHT, GradingCourse, template

STUB = "def total(values, weights):\n    raise NotImplementedError\n"
ONE = '''\
def total(values, weights):
    """The weighted sum."""
    result = 0.0
    for value, weight in zip(values, weights):
        if weight < 0:
            raise ValueError("negative")
        result += value * weight
    return result / max(len(values), 1)
'''
RENAMED = """\
def total(values: list, weights: list) -> float:
    # my own idea
    s = 0.0
    for a, b in zip(values,
                    weights):
        if (b < 0): raise ValueError("negative")
        s += (a * b)


    return s / max(len(values), 1)
"""
OTHER = """\
def total(values, weights):
    if any(weight < 0 for weight in weights):
        raise ValueError("negative")
    pairs = list(zip(values, weights))
    return sum(map(lambda pair: pair[0] * pair[1], pairs)) / (len(pairs) or 1)
"""


@pytest.mark.parametrize(
    "source", ["x = 0x" + "f" * 5000, "(" * 300, "-" * 20_000 + "1", "x = '\\ud800'", "\ud800", "\0"]
)
def test_an_answer_that_cannot_be_written_again_is_compared_with_none(source: str) -> None:
    """A long number ended the report for the whole class."""
    assert similar_pairs("total", {"ada": ONE, "bob": RENAMED, "eve": source}, STUB, OTHER)[0].learners == (
        "ada",
        "bob",
    )


def test_names_and_layout_do_not_matter_and_calls_do() -> None:
    assert tokens_of(ONE) == tokens_of(RENAMED)
    assert tokens_of(ONE) != tokens_of(ONE.replace("max(", "min("))
    assert tokens_of("x.sum()") != tokens_of("x.mean()")
    assert tokens_of("def broken(:") == []
    assert tokens_of("x = " + "(" * 5000) == []


def test_winnowing_finds_every_long_match() -> None:
    """Schleimer, Wilkerson and Aiken, section 3: a common run of GRAM + WINDOW - 1 tokens shares a fingerprint."""
    draw = random.Random(0)
    for _ in range(200):
        common = [str(draw.random()) for _ in range(GRAM + WINDOW - 1)]
        one, other = ([str(draw.random()) for _ in range(draw.randrange(9))] for _ in range(2))
        assert fingerprints([*one, *common, *other]) & fingerprints([*other, *common, *one])
        assert not fingerprints([*one, *common[: GRAM - 1]]) & fingerprints([*common[: GRAM - 1], *other])


def test_winnowing_keeps_the_expected_density() -> None:
    """The same source, theorem 1: of random hashes, 2 / (WINDOW + 1) are kept."""
    draw = random.Random(0)
    kept = fingerprints([str(draw.random()) for _ in range(20_000)])
    assert len(kept) / 20_000 == pytest.approx(2 / (WINDOW + 1), rel=0.03)


def test_copies_are_listed_and_other_answers_are_not() -> None:
    answers = {"ada": ONE, "bob": RENAMED, "cleo": OTHER, "dora": STUB, "eve": "def broken("}
    found = similar_pairs("total", answers, STUB, OTHER)
    assert [(pair.learners, pair.similarity, pair.published) for pair in found] == [(("ada", "bob"), 1.0, False)]
    assert similar_pairs("total", answers, STUB, ONE)[0].published


def test_what_a_quarter_of_the_class_has_written_is_not_counted() -> None:
    answers = {f"learner {number}": ONE for number in range(10)}
    assert similar_pairs("total", answers, STUB, OTHER) == []
    few = {f"learner {number}": ONE if number < 2 else OTHER for number in range(10)}
    assert [pair.learners for pair in similar_pairs("total", few, STUB, "")] == [("learner 0", "learner 1")]


def test_answers_that_are_too_short_are_not_compared() -> None:
    short = "def total(values, weights):\n    return sum(values) * 2\n"
    assert len(fingerprints(tokens_of(short))) < LEAST
    assert similar_pairs("total", {"ada": short, "bob": short}, STUB, "") == []


@pytest.mark.parametrize(
    ("numbers", "least"), [(("01",), 50), pytest.param([f"{n:02}" for n in range(15)], 500, marks=pytest.mark.slow)]
)
def test_of_the_banks_honest_answers_none_would_be_listed(numbers: Sequence[str], least: int) -> None:
    rate = honest_rate(exercise for unit in units() if unit.number in numbers for exercise in unit.exercises)
    assert rate.pairs >= least
    assert rate.short < rate.pairs / 2
    assert rate.same == 0


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    with template(tmp_path_factory.mktemp("course") / "course") as made:
        body = ONE.replace("total", "fourfold_root")
        made.hand_in("ada", **(RIGHT | {"fourfold_root": body}))
        made.hand_in(
            "<b>bob", **(RIGHT | {"fourfold_root": RENAMED.replace("total", "fourfold_root") + "# <script>\x1b\n"})
        )
        made.hand_in("cleo", **(RIGHT | {"fourfold_root": OTHER.replace("total", "fourfold_root")}))
        made.hand_in("dora")
        yield made


def test_the_command_writes_a_page_in_which_nothing_of_a_learner_is_html(course: GradingCourse) -> None:
    assert "has been graded; run `grade` first" in complaint("similar", "99", "--course", course.root)
    course.grade()
    before = course.rows()
    path = course.root / "reports" / f"{NAME}-similar.html"
    said = output_of("similar", "99", "--course", course.root)
    assert said == f"pairs of learners with similar answers: 1; report: {path}\n"
    text = path.read_text()
    assert "&lt;b&gt;bob and ada: 1 exercise" in text
    assert "&lt;script&gt;\N{REPLACEMENT CHARACTER}" in text
    assert "<script" not in text
    assert "<b>" not in text
    assert "No points are deducted" in text
    assert course.rows() == before


def test_many_pairs_are_listed_without_their_code(course: GradingCourse) -> None:
    unit = units()[0]
    pairs = [similarity.Pair("total", (f"a{number:03}", "b"), 1.0, False) for number in range(100)]
    answers = {name: {"total": "UNIQUE"} for name in [*(f"a{number:03}" for number in range(100)), "b"]}
    text = page(unit, answers, pairs, similarity.HonestRate(10, 0, 2))
    assert text.count("<h2>") == 100
    assert text.count("UNIQUE") == 80
    assert "Of 8 pairs of right answers to this unit in the course&#x27;s bank, 0." in text
