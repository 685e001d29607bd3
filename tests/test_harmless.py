"""Learners' Markdown, HTML and outputs as they are shown: what is harmless is formatted, nothing else is left."""

from __future__ import annotations

import base64
import re
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from nbconvert.filters import markdown2html, strip_files_prefix

from lora_from_scratch.checks.display import as_html
from lora_from_scratch.checks.verdict import CaseResult, Failure, Verdict
from lora_from_scratch.grading import harmless
from lora_from_scratch.grading.autograded import shown
from lora_from_scratch.grading.graded import Graded
from lora_from_scratch.grading.mathematics import is_drawn
from tests.page_attacks import ATTACKS, HONEST

OTHERS = [
    "<script>fetch('/formgrader/api/grade/1', {method: 'PUT'})</script>",
    "text <img src=x onerror=alert(1)>",
    "<iframe srcdoc='x'></iframe>",
    "<a href='JaVa\tScript:alert(1)'>click</a>",
    "[click](<data:text/html;base64,PHNjcmlwdD4=>)",
    "<svg onload=alert(1)>",
    "<!DOCTYPE html>",
    "<base href='//evil.example'>",
    "<div style='background: url(//evil.example/x)'>",
    r"$\href{javascript:alert(1)}{x}$",
    "<form action=/x><button>Full credit</button></form>",
]

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n and so on").decode()
GIF = base64.b64encode(b"GIF89a and so on").decode()
SVG = base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()
# How nh3 writes: text and tags with attributes in quotes. Read by a grammar, so that no parser can see it otherwise.
WRITTEN = re.compile(r"""[^<>]|<(/?[a-z][a-z0-9]*)((?: [a-z]+="[^"<>]*")*)>""")
NAMES = {
    "align", "alt", "border", "class", "colspan", "height", "href", "open", "rel", "rowspan", "scope", "span", "src",
    "start", "style", "title", "valign", "width",
}  # fmt: skip


def cells_of(*cells: Any) -> list[Any]:
    """What is shown of cells that learners wrote."""
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    graded = Graded("ada", "unit_99", {}, {}, (), nbformat.writes(notebook), "none")
    return nbformat.reads(shown(graded, nbformat.v4.new_notebook()), as_version=4).cells


def assert_harmless(page: str) -> None:
    assert WRITTEN.sub("", page) == ""
    for tag, attributes in WRITTEN.findall(page):
        assert tag.strip("/") in {"", *harmless.TAGS.split()}
        for name, value in re.findall(r' ([a-z]+)="([^"]*)"', attributes):
            assert name in NAMES
            assert name != "class" or value in ("tex2jax_ignore mathjax_ignore", "tex2jax_process mathjax_process")
            assert name != "href" or value.startswith(("https://", "http://", "mailto:"))
            assert name != "src" or value.startswith("data:image/") or "/" not in value + ":"
            assert name != "style" or not re.search(r"position|url|-\d|\\\\|@", value)


@pytest.mark.parametrize("text", [*ATTACKS.values(), *OTHERS])
def test_only_what_is_allowed_is_left(text: str) -> None:
    assert_harmless(cells_of(nbformat.v4.new_markdown_cell(text))[0].source)


@pytest.mark.parametrize("text", [*ATTACKS.values(), *OTHERS, *(text for text, _ in HONEST.values())])
def test_nbgraders_templates_change_nothing_of_it(text: str) -> None:
    source = cells_of(nbformat.v4.new_markdown_cell(text))[0].source
    assert strip_files_prefix(markdown2html(source)).strip() == source


PIECES = ("<", ">", "</", "!--", "--", "a", "b ", "p", "img ", "svg", "style", "title=", '"', "'", "`", "$", "\\", "\n",
          " ", "[", "](", ")", "onx=", "&lt;", "#", "| ", "table", "/", "=", "!")  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PIECES)))
def test_whatever_is_put_together_only_what_is_allowed_is_left(parts: list[str]) -> None:
    page = harmless.from_markdown("".join(parts))
    assert_harmless(page)
    assert markdown2html(page).strip() == page


@pytest.mark.parametrize("name", HONEST)
def test_honest_formatting_stays(name: str) -> None:
    text, wanted = HONEST[name]
    assert wanted in cells_of(nbformat.v4.new_markdown_cell(text))[0].source


@pytest.mark.parametrize("text", [text for name, text in ATTACKS.items() if "mathematics" in name])
def test_a_formula_with_other_commands_is_shown_as_its_source(text: str) -> None:
    assert "tex2jax_process" not in cells_of(nbformat.v4.new_markdown_cell(text))[0].source


def test_every_formula_of_the_course_is_drawn() -> None:
    from tests.helpers import REPOSITORY

    for path in sorted((REPOSITORY / "course" / "units").glob("*.py")):
        for formula in re.findall(r"(?<![$\\\\])\$([^$`\n]+)\$", path.read_text()):
            assert is_drawn(formula), f"{path.name}: {formula}"


def test_a_tag_that_is_not_allowed_is_shown_as_text() -> None:
    source = cells_of(nbformat.v4.new_markdown_cell("Because <script>x</script>"))[0].source
    assert "Because &lt;script&gt;x&lt;/script&gt;" in source


@pytest.mark.parametrize(
    ("address", "kind"),
    [("attachment:a.png", "image/png"), ("attachment:b c.gif", "image/gif"), ("attachment:b%20c.gif", "image/gif")],
)
def test_an_attached_picture_is_part_of_the_page(address: str, kind: str) -> None:
    attachments = {"a.png": {"image/png": PNG}, "b c.gif": {"image/gif": GIF}}
    for text in (f"![mine](<{address}>)", f'<img src="{address}" alt="mine">'):
        cell = cells_of(nbformat.v4.new_markdown_cell(text, attachments=attachments))[0]
        assert f'<img src="data:{kind};base64,' in cell.source
        assert "attachments" not in cell


@pytest.mark.parametrize(
    "files", [{"image/svg+xml": SVG}, {"image/png": SVG}, {"image/png": "%%%"}, {"text/html": PNG[:8]}, {}]
)
def test_what_is_no_picture_is_not_shown_as_one(files: dict[str, str]) -> None:
    cell = nbformat.v4.new_markdown_cell("![mine](attachment:x) ![not there](attachment:y)", attachments={"x": files})
    assert 'alt="mine"' in cells_of(cell)[0].source
    assert "src=" not in cells_of(cell)[0].source


def test_a_picture_is_what_its_first_bytes_say() -> None:
    cell = nbformat.v4.new_markdown_cell("![](attachment:x)", attachments={"x": {"image/svg+xml": PNG}})
    assert "data:image/png;base64," in cells_of(cell)[0].source


@pytest.mark.parametrize(
    "kind", ["image/svg+xml", "application/javascript", "text/markdown", "text/latex", "application/pdf"]
)
def test_an_output_of_another_kind_is_not_shown(kind: str) -> None:
    output = nbformat.v4.new_output("display_data", {kind: "<script>x</script>", "text/plain": "x\x1b"})
    cell = cells_of(nbformat.v4.new_code_cell("x", outputs=[output]))[0]
    assert cell.outputs[0].data == {"text/plain": "x\N{REPLACEMENT CHARACTER}"}


def test_html_of_an_output_is_sanitised_and_not_put_into_a_frame() -> None:
    page = "<!--><img src=x onerror=x>--><div style='position:fixed'>x</div>"
    output = nbformat.v4.new_output("execute_result", {"text/html": page}, metadata={"text/html": {"isolated": True}})
    shown_output = cells_of(nbformat.v4.new_code_cell("x", outputs=[output]))[0].outputs[0]
    assert_harmless(shown_output.data["text/html"])
    assert not shown_output.metadata


def test_what_is_printed_and_what_is_raised_has_no_control_characters() -> None:
    stream = nbformat.v4.new_output("stream", name="stdout", text="a\x1b]0;x\x07\u202e\n")
    error = nbformat.v4.new_output("error", ename="E\x00", evalue="\x9b", traceback=["\x1b[31mx"])
    cell = cells_of(nbformat.v4.new_code_cell("x = '\u202e'", outputs=[stream, error]))[0]
    assert not [c for c in str(cell) if c not in "\n" and not c.isprintable()]


def test_a_verdict_looks_as_in_the_notebook() -> None:
    cases = (CaseResult("some", "part", False), CaseResult("others", "part", True))
    failure = Failure("some", {"x": "1"}, r"<b>$\href{https://x}{y}$</b>", "a number", "printed")
    page = as_html(Verdict("rank", "failed", 1, 2, cases, 7, failure, "half", "You have `x < 0`."), advice=False)
    made = harmless.from_html(page)
    assert_harmless(made)
    assert "tex2jax_process" not in made
    assert re.findall(r'style="([^"]*)"', made)[1:] == [
        one.rstrip("; ") for one in re.findall(r'style="([^"]*)"', page)
    ]


def test_a_long_text_is_shown_as_it_is() -> None:
    source = cells_of(nbformat.v4.new_markdown_cell("<b>x</b> " * harmless.LONGEST))[0].source
    assert "<pre>&lt;b&gt;x" in source


def test_a_notebook_that_is_shown_has_the_releases_metadata() -> None:
    notebook = nbformat.v4.new_notebook(metadata={"title": "</title><script>", "widgets": {"x": 1}})
    notebook.cells = [nbformat.v4.new_code_cell("x", metadata={"tags": ["<"], "slideshow": {}})]
    graded = Graded("ada", "unit_99", {}, {}, (), nbformat.writes(notebook), "none")
    made = nbformat.reads(shown(graded, nbformat.v4.new_notebook(metadata={"a": "b"})), as_version=4)
    assert made.metadata == {"a": "b"}
    assert not made.cells[0].metadata


def test_the_same_notebook_gives_the_same_bytes() -> None:
    text = "[x](https://example.org 'y') <b title=x style='margin: 1px; padding: 1px' align=left>x</b> $x$"
    assert len({harmless.from_markdown(text) for _ in range(20)}) == 1
