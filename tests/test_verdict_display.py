"""How a verdict looks: complete in words, safe as HTML, narrow as text."""

from __future__ import annotations

import html.parser
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_from_scratch.checks.display import LOOKS, WIDTH, as_html, as_text, table
from lora_from_scratch.checks.verdict import LONGEST, CaseResult, Failure, Verdict, describe
from lora_from_scratch.grading import outputs

WILD = st.text(max_size=30) | st.lists(
    st.sampled_from(["<b>", "</p>", "<img src=x onerror=y>", "&", '"', "'", "`", "\n", "a"])
).map("".join)
CASES = (CaseResult("<first>", "one & part", True), CaseResult("second", "other", False))
FAILED = Verdict(
    "rank",
    "failed",
    2.5,
    5,
    CASES,
    17,
    Failure("second", {"M": "[[1]] (shape (1, 1), float32)"}, "3", "a whole number", "k = 1\n<b>"),
    "off by one",
    "You count from `range(1, n)`, one too late.",
)


class Page(html.parser.HTMLParser):
    """The text of a page, its tags and attributes; fails on tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", [], []  # type: ignore[var-annotated]
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attributes))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_failed_check_says_everything_in_both_forms() -> None:
    page, text = Page(as_html(FAILED)).text, as_text(FAILED)
    for form in (page, text):
        for words in (
            "✗ Not right yet",
            "rank",
            "2.5 of 5 points",
            "You count from range(1, n), one too late.",
            "First case that is not right: second",
            "[[1]] (shape (1, 1), float32)",
            "a whole number",
            "2 cases tried: 1 right, 1 not",
            "one & part: 2.5 of 2.5 points",
            "✓ right: <first>",
            "✗ not right: second",
            'hint("rank")',
            'check("rank", seed=17)',
        ):
            assert words in form


@pytest.mark.parametrize("status", LOOKS)
def test_every_state_has_a_symbol_and_words_of_its_own(status: str) -> None:
    symbol, words, _ = LOOKS[status]
    text = as_text(Verdict("rank", status, 0, 5, CASES))
    assert text.startswith(f"{symbol} {words}: rank")
    assert len({look[1] for look in LOOKS.values()}) == len(LOOKS)


def test_a_prediction_is_right_or_comes_out_differently() -> None:
    assert as_text(Verdict("guess", "passed", 1, 1, message="Because.")).startswith("✓ Your prediction is right: guess")
    assert as_text(Verdict("guess", "failed", 0, 1, message="Because.")).startswith("✗ It comes out differently: guess")


def test_a_check_that_passed_or_was_not_started_lists_no_cases_in_text() -> None:
    right = (CaseResult("one", "all", True),)
    assert as_text(Verdict("rank", "passed", 5, 5, right)) == "✓ Passed: rank, 5 of 5 points\n  1 case tried, all right"
    assert "tried" not in as_text(Verdict("rank", "not started", 0, 5, CASES))


def test_cases_after_one_that_was_stopped_are_not_called_wrong() -> None:
    cases = (CaseResult("one", "all", False), CaseResult("two", "all", False, tried=False))
    text = as_text(Verdict("rank", "stopped", 0, 5, cases, failure=Failure("one", {}, "nothing in time", "a number")))
    assert "1 of 2 cases tried: 0 right, 1 not" in text
    assert "– not tried: two" in text


@given(WILD, WILD, WILD, WILD)
def test_whatever_a_learner_writes_is_text_in_the_page(message: str, case: str, got: str, printed: str) -> None:
    failure = Failure(case, {got: printed}, got, "a number", printed)
    cases = (CaseResult(case, message, False), CaseResult(got, printed, True))
    page = Page(as_html(Verdict("rank", "failed", 0, 5, cases, 1, failure, "", message)))
    allowed = {"div", "p", "strong", "code", "table", "tbody", "tr", "th", "td", "details", "summary", "ul", "li"}
    assert {tag for tag, _ in page.tags} <= allowed
    assert {name for _, attributes in page.tags for name, _ in attributes} <= {"style", "scope", "open"}


def test_the_page_needs_nothing_from_elsewhere_and_no_text_has_a_colour_of_its_own() -> None:
    page = as_html(FAILED)
    for word in ("http", "src=", "<script", "<link", "<style", "url("):
        assert word not in page
    styles = [value for _, attributes in Page(page).tags for name, value in attributes if name == "style"]
    assert not any(part.strip().startswith(("color", "background")) for s in styles for part in (s or "").split(";"))


def test_lines_of_text_are_not_too_wide_and_code_is_not_broken() -> None:
    words = "word " * 20 + "`check(one, two, three)` " + "word " * 20
    text = as_text(Verdict("rank", "failed", 0, 5, CASES, message=words))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "check(one, two, three)" in text
    assert "\N{NO-BREAK SPACE}" not in text


def test_a_table_names_its_columns_and_rows_for_those_who_hear_it() -> None:
    page, text = table(("unit", "passed"), [("<01>", "1 of 2")], "Progress")
    assert 'scope="col"' in page
    assert 'scope="row"' in page
    assert "&lt;01&gt;" in page
    assert text.splitlines() == ["Progress", "unit  passed", "<01>  1 of 2"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor([[1.0, 0.5]]), "[[1, 0.5]] (shape (1, 2), float32)"),
        (torch.arange(20.0), "20 numbers (shape (20,), float32, from 0 to 19)"),
        (
            torch.tensor([float("nan")] * 19 + [1.0]),
            "20 numbers (shape (20,), float32, from 1 to 1, 19 of them NaN or infinite)",
        ),
        (torch.zeros(0, 3), "[] (shape (0, 3), float32)"),
        (torch.zeros(20, dtype=torch.complex64), "a tensor (shape (20,), complex64)"),
        (torch.ones(20, dtype=torch.bool), "20 numbers (shape (20,), bool, from 1 to 1)"),
        ([torch.tensor([1]), 2], "2 results: [1] (shape (1,), int64); 2"),
        ([1, 2.5, "x"], "[1, 2.5, 'x']"),
        ({"a": 1}, "{a: 1}"),
        (None, "None"),
    ],
)
def test_a_value_in_words(value: Any, words: str) -> None:
    assert describe(value) == words


def test_a_description_is_short_whatever_it_describes() -> None:
    deep: Any = "x" * 1000
    for _ in range(6):
        deep = [deep] * 6
    assert len(describe(deep)) < LONGEST + 10


def test_a_check_says_its_points_once() -> None:
    passed = Verdict("rank", "passed", 5, 5, (CaseResult("one", "all", True),))
    shown = "".join(output.data["text/html"] for output in outputs._of_check(passed, 1))
    assert shown.count("5 of 5 points") == shown.count("points") == 1
