"""What learners hand in, opened in a real browser: nothing runs, nothing loads, nothing leaves its place."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")
pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")

from lora_from_scratch.grading.autograded import shown
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.grading.report import Section, as_html
from tests.formgrader_page import Page, notebook_of, served
from tests.grading_course import NAME, RIGHT, GradingCourse, template
from tests.jupyter_browser import CHROMIUM, DRIVER, browser
from tests.page_attacks import ATTACKS, ELSEWHERE, RAN

if not CHROMIUM or not DRIVER:
    pytest.skip("Chromium is not here (on Debian: apt install chromium chromium-driver)", allow_module_level=True)

MARKUP = f'<img src=x onerror="{RAN}">'
NAMED = "<img src=x onerror=document.documentElement.dataset.ran='name'>"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
OUTPUTS = {
    "text/html": f"<!-->{MARKUP}--><div style='position:fixed'>x</div>",
    "image/svg+xml": f"<svg xmlns='http://www.w3.org/2000/svg' onload=\"{RAN}\"/>",
    "application/javascript": RAN,
    "text/markdown": MARKUP,
    "text/latex": r"$\href{https://example.org}{x}$",
    "image/png": f'"><img src=x onerror="{RAN}">',
    "application/vnd.jupyter.widget-view+json": {"model_id": f"</script>{MARKUP}"},
}
# Everything in a learner's cell that could do more than be read.
LOOK = """
const found = [], cell = document.querySelector(arguments[0]);
const tags =
  /^(script|style|iframe|object|embed|form|input|button|select|svg|math|link|meta|base|video|audio|dialog)$/i;
const ignored = element => {
  for (let e = element; e; e = e.parentElement) {
    if (/^(pre|code)$/i.test(e.tagName) || e.classList.contains('tex2jax_ignore')) return true;
    if (e.classList.contains('tex2jax_process')) return false;
  }
  return false;
};
if (document.documentElement.dataset.ran) found.push('a script ran');
for (const e of cell.querySelectorAll('*')) {
  if (tags.test(e.tagName)) found.push(e.tagName);
  for (const a of e.attributes)
    if (/^(on|id$|name$|data-|srcset|background|action|tabindex|autofocus)/i.test(a.name)) found.push(a.name);
  if (e.hasAttribute('href') && !/^(https?:..[^/\\\\]|mailto:)/.test(e.getAttribute('href'))) found.push(e.outerHTML);
  if (e.hasAttribute('src') && !/^(data:image.(png|jpeg|gif|webp);base64,|[\\w ().-]+$)/.test(e.getAttribute('src')))
    found.push(e.outerHTML);
  const style = getComputedStyle(e);
  if (style.position != 'static') found.push('position: ' + style.position);
  if (/-/.test(style.margin) || /url/.test(style.backgroundImage + style.listStyleImage)) found.push(e.outerHTML);
  for (const c of e.classList)
    if (!/^(highlight|(tex2jax|mathjax)_(ignore|process))$/.test(c)) found.push('class ' + c);
}
const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
while (texts.nextNode())
  if (/\\\\(href|require|unicode|mmlToken|style|class|cssId|bbox|rule|kern|def|let)/.test(texts.currentNode.data)
      && !ignored(texts.currentNode.parentElement)) found.push('mathematics: ' + texts.currentNode.data);
for (const request of performance.getEntriesByType('resource'))
  if (request.name.includes(arguments[1])) found.push('loaded ' + request.name);
return found;
"""
SETTLED = "const done = arguments[0]; requestAnimationFrame(() => setTimeout(done, 100));"


def look(driver: Any, cell: str) -> list[str]:
    driver.execute_async_script(SETTLED)  # what a browser does after a page has loaded: animations, toggles
    return driver.execute_script(LOOK, cell, ELSEWHERE)


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    """Mallory's notebook is full of attacks, and so is somebody's name."""
    with template(tmp_path_factory.mktemp("course") / "course") as made:
        made.as_a_person(lambda book: book.add_student("mallory", first_name=f"M{MARKUP}", last_name=MARKUP))
        answers = {
            **RIGHT,
            "Counter": "class Counter: ...  # doubtful, twice",
            "why_count": ATTACKS["comment ended at once"],
        }
        folder = made.hand_in("mallory", **answers)
        notebook = nbformat.read(folder / f"{NAME}.ipynb", as_version=4)
        notebook.cells[3:3] = [nbformat.v4.new_markdown_cell(text) for text in ATTACKS.values()]
        notebook.cells.append(nbformat.v4.new_raw_cell(MARKUP, metadata={"format": "text/html", "raw_mimetype": ""}))
        notebook.cells.append(nbformat.v4.new_markdown_cell("# <b"))
        for kind, content in OUTPUTS.items():
            metadata = {"text/html": {"isolated": True}}
            shows = nbformat.v4.new_output("display_data", {kind: content}, metadata=metadata)
            notebook.cells.append(nbformat.v4.new_code_cell(f"show('{kind}')", outputs=[shows]))
        notebook.metadata["title"] = f"</title>{MARKUP}"
        notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"x": f"</script>{MARKUP}"}}
        nbformat.write(notebook, folder / f"{NAME}.ipynb")
        made.hand_in(NAMED, **RIGHT, why_count="So.")
        made.grade(feedback=True)
        yield made


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_can_only_be_read(name: str, released: Any, driver: Any, tmp_path: Path) -> None:
    from nbconvert.filters import markdown2html, strip_files_prefix

    cells = [nbformat.v4.new_markdown_cell(ATTACKS[name])]
    notebook = nbformat.v4.new_notebook(cells=cells)
    text = shown(Graded("mallory", NAME, {}, {}, (), nbformat.writes(notebook), "none"), released)
    source = nbformat.reads(text, as_version=4).cells[0].source
    page = strip_files_prefix(markdown2html(source))  # as nbgrader's templates do
    file = tmp_path / "page.html"
    file.write_text(f"<!DOCTYPE html><meta charset=utf-8><body><main>{page}</main><p id=after>after</p></body>")
    driver.get(file.as_uri())
    assert look(driver, "body > :not(#after)") == []
    assert driver.execute_script("return document.querySelector('body > main + #after:last-child')"), (
        "it left its place"
    )


@pytest.fixture(scope="module")
def released(course: GradingCourse) -> Any:
    return nbformat.read(course.released, as_version=4)


def test_a_finding_that_quotes_markup_is_only_text(released: Any, driver: Any, tmp_path: Path) -> None:
    from nbconvert.filters import markdown2html

    quoted = " ".join((MARKUP, "`", *ATTACKS.values()))
    graded = Graded(
        "mallory",
        NAME,
        {},
        {},
        (Finding("x", "human", "", quoted),),
        nbformat.writes(nbformat.v4.new_notebook()),
        "none",
    )
    source = nbformat.reads(shown(graded, released), as_version=4).cells[0].source
    file = tmp_path / "page.html"
    file.write_text(f"<!DOCTYPE html><meta charset=utf-8><body><main>{markdown2html(source)}</main></body>")
    driver.get(file.as_uri())
    assert look(driver, "main") == []
    assert MARKUP in driver.find_element("css selector", "main").text


def test_a_feedback_page_runs_nothing(course: GradingCourse, driver: Any) -> None:
    driver.get((course.root / "feedback" / "mallory" / NAME / f"{NAME}.html").as_uri())
    driver.execute_async_script(SETTLED)
    assert driver.execute_script("return document.documentElement.dataset.ran || ''") == ""
    outside = "script:not([src*=mathjax]):not([type='text/x-mathjax-config']), iframe, form, object, svg"
    assert driver.find_elements("css selector", outside) == []


def test_a_comment_that_quotes_markup_is_only_text(course: GradingCourse, driver: Any) -> None:
    course.give("mallory", "why_count", 0, f"You wrote: <!-->{MARKUP}-->\n\n{MARKUP} **Why?**")
    course.grade(feedback=True)
    driver.get((course.root / "feedback" / "mallory" / NAME / f"{NAME}.html").as_uri())
    assert look(driver, ".panel-footer div > div") == []
    assert driver.find_element("css selector", ".panel-footer strong").text == "Why?"
    course.give("mallory", "why_count", 0)


def test_opening_a_submission_in_the_formgrader_gives_no_points(
    course: GradingCourse, driver: Any, tmp_path: Path
) -> None:
    before = course.scores("mallory")
    with served(course, tmp_path) as address:
        page = Page(driver, address)
        page.open_notebook(course, "mallory")
        assert page.placeholder("check-fourfold_root") == "4"  # the automatic points are there
        driver.execute_async_script(SETTLED)
        assert driver.execute_script("return document.documentElement.dataset.ran || ''") == ""
        assert course.scores("mallory") == before
        page.until(
            lambda: MARKUP in page.find(".breadcrumb .name-shown").get_attribute("textContent"), "the name is there"
        )


def test_a_name_is_only_text_in_the_formgrader(course: GradingCourse, driver: Any, tmp_path: Path) -> None:
    pages = [
        notebook_of(course, NAMED),
        f"manage_students/{quote(NAMED)}/",
        f"manage_students/{quote(NAMED)}/{NAME}/",
        "manage_students",
        f"manage_submissions/{NAME}",
        f"gradebook/{NAME}/{NAME}",
        "manage_students/%22;document.documentElement.dataset.ran=1;%22/",
        "manage_students/%5C/unit%22;document.documentElement.dataset.ran=1;%22/",
    ]
    with served(course, tmp_path) as address:
        page = Page(driver, address)
        for path in pages:
            page.open(path)
            page.until(lambda: driver.execute_script("return document.readyState") == "complete", "it has loaded")
            driver.execute_async_script(SETTLED)
            assert driver.execute_script("return document.documentElement.dataset.ran || ''") == "", path
        page.open(pages[1])
        assert NAMED in page.text(".breadcrumb")


def test_a_pasted_picture_is_shown(course: GradingCourse, driver: Any, tmp_path: Path) -> None:
    """As JupyterLab pastes it, as Colab writes it, and as a file beside the notebook."""
    inline = f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}"
    text = f"Mine: ![drawn](attachment:image.png) ![inline]({inline}) <img src='drawing.png'>"
    folder = course.hand_in("ada", **RIGHT, why_count=text)
    (folder / "drawing.png").write_bytes(PIXEL)
    notebook = nbformat.read(folder / f"{NAME}.ipynb", as_version=4)
    answer = next(cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade_id") == "why_count")
    answer.attachments = {"image.png": {"image/png": base64.b64encode(PIXEL).decode()}}
    nbformat.write(notebook, folder / f"{NAME}.ipynb")
    course.grade(feedback=True)
    with served(course, tmp_path) as address:
        page = Page(driver, address)
        page.open_notebook(course, "ada")
        assert page.placeholder("check-fourfold_root") == "4"  # the automatic points are there
        widths = "return [...document.querySelectorAll('.nbgrader_cell img')].map(image => image.naturalWidth)"
        page.until(lambda: driver.execute_script(widths) == [1, 1, 1], "all three pictures are shown")


def test_a_report_shows_all_its_columns_at_1400_pixels(driver: Any, tmp_path: Path) -> None:
    headings = ("Learner", "Points of 40", *(f"low_rank_parameter_count_{number}" for number in range(20)), "Late")
    rows = (("a_learner_with_a_long_name", "31.5", *["1.5 ✋ ?"] * 20, "late"),)
    file = tmp_path / "report.html"
    file.write_text(as_html("A report", [Section("Learners", ("Points.",), headings, rows)]))
    driver.set_window_size(1400, 1000)
    driver.get(file.as_uri())
    table = driver.find_element("css selector", ".wide")
    shown_width, width = (table.get_property(name) for name in ("clientWidth", "scrollWidth"))
    assert width <= shown_width
