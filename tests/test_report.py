"""The report: what the class has not understood, what needs a human, and what has changed."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from lora_from_scratch.grading.graded import Finding
from lora_from_scratch.grading.report import Section, as_html, as_markdown, sections
from tests.cli_calls import call
from tests.grading_course import NAME, RIGHT, GradingCourse, template
from tests.stand_in_marker import HALF


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    """Graded twice: a person gave points, and somebody handed in again."""
    with template(tmp_path_factory.mktemp("course") / "course") as made:
        made.as_a_person(lambda gradebook: gradebook.add_student("zoe"))
        made.hand_in("ada", **RIGHT, why_count="To know how many.")
        made.hand_in("bob", fourfold_root="half")
        made.hand_in("cleo", **(RIGHT | {"fourfold_root": "half", "Counter": "doubtful", "guess_root": "twice"}))
        made.hand_in("<b>dora|", **RIGHT, why_count="So.")
        made.grade()
        made.give("ada", "why_count", 3)
        made.give("<b>dora|", "why_count", 1)
        made.hand_in("bob", fourfold_root="all of it")
        made.hand_in("<b>dora|", **RIGHT, why_count="So, and so.")
        yield made


@pytest.fixture(scope="module")
def parts(course: GradingCourse) -> dict[str, Section]:
    return {part.title: part for part in sections(course.grade())}


def test_misconceptions_are_counted_with_what_learners_are_told(parts: dict[str, Section]) -> None:
    assert parts["What the class has not understood"].rows == (("1", "fourfold_root", "half", HALF, "cleo"),)


def test_whatever_needs_a_human_is_listed_with_the_reason(parts: dict[str, Section]) -> None:
    assert parts["What needs a human"].rows == (
        ("<b>dora|", "the answer has changed since it was graded by hand: why_count"),
        ("cleo", "doubtful; message to the learner: We are not sure about this."),
    )


def test_a_person_is_told_what_earns_the_points_of_an_open_question(parts: dict[str, Section]) -> None:
    rubric = (("why_count", "1 point: a reason."), ("why_count", "2 points: a good one."))
    assert parts["Rubrics of the open questions"].rows == rubric


def test_points_that_changed_are_listed_with_the_reason(parts: dict[str, Section]) -> None:
    assert parts["Changed points"].rows == (("bob", "fourfold_root", "2", "4", "handed in again"),)
    assert parts["Changed points"].sentences[0].startswith("2 were graded again")


def test_the_learners_table_has_the_gradebooks_points(parts: dict[str, Section]) -> None:
    part = parts["Learners"]
    rows = {row[0]: dict(zip(part.headings, row, strict=True)) for row in part.rows}
    assert rows["ada"]["Points of 12"] == "10"
    assert rows["ada"]["why_count"] == "3 ✋"
    assert rows["<b>dora|"]["why_count"] == "1 ✋ ?"
    assert rows["bob"]["fourfold_root"] == "4"


def test_the_order_is_that_of_the_notebook(parts: dict[str, Section]) -> None:
    order = ("fourfold_root", "guess_root", "Counter", "guess_number")
    assert tuple(row[0] for row in parts["Exercises"].rows) == order
    assert parts["Learners"].headings[2:-1] == (*order, "why_count")


def test_each_exercise_is_counted(parts: dict[str, Section]) -> None:
    part = parts["Exercises"]
    rows = {row[0]: dict(zip(part.headings, row, strict=True)) for row in part.rows}
    assert (rows["fourfold_root"]["passed"], rows["fourfold_root"]["not right"]) == ("3", "1")
    assert rows["fourfold_root"]["Mean points"] == "3.50"


def test_repairs_and_who_handed_in_nothing_are_said(parts: dict[str, Section]) -> None:
    assert parts["Found in the notebooks"].rows[0][:4] == ("cleo", "repaired", "duplicated cell", "guess_root")
    assert parts["Handed in nothing"].items == ("zoe",)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_nothing_of_a_learner_is_html(parts: dict[str, Section]) -> None:
    page = as_html("A title", parts.values())
    reader = Tags()
    reader.feed(page)
    assert reader.open == []
    assert not reader.seen & {"b", "script", "link", "img"}
    assert "&lt;b&gt;dora|" in page
    assert '<th scope="row"' in page


def test_the_markdown_has_tables_of_equal_width(parts: dict[str, Section]) -> None:
    text = as_markdown("A title", parts.values())
    assert "&lt;b>dora\\|" in text
    for part in parts.values():
        lines = [line for line in text.split(f"## {part.title}\n")[1].split("\n## ")[0].splitlines() if line[:1] == "|"]
        assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1


def test_a_notebook_that_could_not_be_read_lowers_no_mean(course: GradingCourse) -> None:
    summary = course.grade()
    seen = next(row for row in summary.rows if row.learner == "ada")
    damaged = Finding("damaged notebook", "human", "", "Your notebook is damaged.")
    verdicts = {
        name: dataclasses.replace(verdict, status="missing", points=0.0)
        for name, verdict in seen.graded.verdicts.items()
    }
    graded = dataclasses.replace(seen.graded, verdicts=verdicts, findings=(damaged,))
    entry = dataclasses.replace(seen.entry, score=0.0)
    unread = dataclasses.replace(seen, learner="eve", graded=graded, entry=entry)
    parts = {part.title: part for part in sections(dataclasses.replace(summary, rows=(seen, unread)))}
    assert parts["Exercises"].rows[0][1] == "4.00"
    assert parts["Exercises"].sentences == ("Left out of the means: 1 that could not be read or graded.",)
    assert "from 10 to 10" in parts["Overview"].sentences[-1]
    assert parts["What needs a human"].rows[0] == (
        "eve",
        "damaged notebook; message to the learner: Your notebook is damaged.",
    )


def test_both_files_are_written_and_the_command_says_where(course: GradingCourse) -> None:
    course.grade()
    for suffix in (".html", ".md"):
        text = (course.root / "reports" / f"{NAME}{suffix}").read_text()
        assert "Unit 99: Tiny. Grading report" in text
        assert "Graded without a sandbox" in text


def test_what_the_command_says_at_the_end(course: GradingCourse, capsys: pytest.CaptureFixture[str]) -> None:
    from lora_from_scratch.cli.grade import print_summary

    print_summary(course.grade())
    said = capsys.readouterr().out
    assert said.startswith("unit 99: 4 submissions, 0 graded now, in ")
    assert "need a human: 2 (<b>dora|, cleo)" in said
    assert str(course.root / "reports" / f"{NAME}.html") in said


def test_help_explains_the_exit_codes() -> None:
    with pytest.raises(SystemExit):
        call("grade", "--help")


LEARNERS = (
    "\x1b]0;title\x07x", "a\x00b", "\x9b31m", "a\u202eb", "\u2066a", "a\u2028b", "a\rb", "a\nb", "\x7f", "\ud800",
    "<!--><img src=x onerror=alert(1)>-->", "](javascript:x)", "[a][b]", "![a](//x)", "`<b>`", "``<b>`", "\\`<b>\\`",
    r"$\href{x}{y}$", "a|b", "<https://x>", "&lt;b&gt;", "**`**<b>`",
)  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_a_report_obeys_nothing_that_a_learner_wrote(name: str) -> None:
    nbconvert = pytest.importorskip("nbconvert.filters")
    parts = [
        Section("Learners", (f"See {name}.",), ("Learner", "What"), ((name, f"`{name}` raised {name}"),), (name,)),
    ]
    for text in (as_html(name, parts), as_markdown(name, parts)):
        text.encode()
        obeyed = {c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl") or c in "\u202e\u2066"}
        assert obeyed == {"\n"}
    reader = Tags()
    reader.feed(as_html(name, parts))
    assert not reader.seen & {"a", "b", "img"}
    made = Tags()
    page = nbconvert.markdown2html(as_markdown(name, parts))
    made.feed(page)
    assert made.seen <= {
        "h1",
        "h2",
        "p",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "ul",
        "li",
        "code",
        "strong",
        "a",
    }
    links = {link.split('"')[0] for link in page.split('href="')[1:]}
    assert all(link.startswith(("#", "https://x")) for link in links)  # of headings; and an address, where one is read


def test_the_terminal_obeys_nothing_that_a_learner_wrote(
    course: GradingCourse, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_from_scratch.cli.grade import print_summary

    summary = course.grade()
    row = dataclasses.replace(summary.rows[0], learner="\x1b[2Jada\u202e", trouble=("\x9b",))
    print_summary(dataclasses.replace(summary, rows=(row,), refused=("\x1b]0;x\x07: it cannot be\nsubmitted",)))
    said = capsys.readouterr()
    assert "[2Jada" in said.out
    assert "]0;x" in said.err
    assert not [c for c in said.out + said.err if c != "\n" and not c.isprintable()]
