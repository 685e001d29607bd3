"""The website: complete, without a solution, without a broken link, and readable on a narrow screen."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.methods.registry import method_classes
from lora_from_scratch.support.translation import ENGLISH, LANGUAGES, translated_units
from tests.helpers import REPOSITORY
from tests.jupyter_browser import CHROMIUM, DRIVER, browser
from tests.test_stripped_library import bodies

for package in ("sphinx", "myst_nb", "furo", "sphinx_design", "altair", "vl_convert"):
    pytest.importorskip(package, reason="Sphinx is not installed: pip install -e '.[site]'")
sys.path.insert(0, str(REPOSITORY / "site"))

import atlas_pages  # noqa: E402
import docstrings  # noqa: E402
import method_pages  # noqa: E402
import one_click  # noqa: E402
import sources  # noqa: E402
from bs4 import BeautifulSoup  # noqa: E402

NARROW = 375  # pixels, as a small telephone
# The texts of a page whose contrast with their background is below level AA of WCAG 2.2 (1.4.3), each once.
LOW_CONTRAST = """
const number = colour => colour.match(/[\\d.]+/g).map(Number)
const light = colour => colour.slice(0, 3).map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0)
function behind(element) {
  for (; element; element = element.parentElement) {
    const colour = number(getComputedStyle(element).backgroundColor)
    if (colour.length === 3 || colour[3] === 1) return colour
  }
  return [255, 255, 255]
}
const low = new Set()
const walk = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT)
while (walk.nextNode()) {
  const element = walk.currentNode.parentElement, style = getComputedStyle(element)
  const seen = element.checkVisibility({visibilityProperty: true, opacityProperty: true})
  if (!walk.currentNode.data.trim() || !seen) continue
  const [dark, bright] = [light(number(style.color)), light(behind(element))].sort((a, b) => a - b)
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700)
  const ratio = (bright + 0.05) / (dark + 0.05)
  if (ratio < (large ? 3 : 4.5)) low.add(`${walk.currentNode.data.trim().slice(0, 40)} (${ratio.toFixed(2)})`)
}
return [...low]
"""


class Page:
    """A page, parsed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        self.places = {str(tag["id"]) for tag in self.tree.find_all(id=True)}


Site = dict[str, Page]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Sphinx's warnings are errors."""
    output = tmp_path_factory.mktemp("website") / "site"
    command = [sys.executable, str(REPOSITORY / "site" / "build_site.py"), "--output", str(output)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    return output


@pytest.fixture(scope="module")
def site(folder: Path) -> Site:
    return {path.relative_to(folder).as_posix(): Page(path) for path in sorted(folder.rglob("*.html"))}


# --- What is on it ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_unit_every_method_and_every_document_has_a_page(site: Site) -> None:
    expected = {f"notebooks/unit_{unit.number}/unit_{unit.number}.html" for unit in units()}
    expected |= {f"methods/{name}.html" for name in method_classes()}
    expected |= {f"course/{name}.html" for name in ("instructor_guide", "syllabus", "workshops", "teaching_notes")}
    expected |= {"index.html", "glossary.html", "search.html", "docs/architecture.html", "docs/serving.html"}
    assert expected <= set(site)
    for name, cls in method_classes().items():
        text = site[f"methods/{name}.html"].tree.get_text()
        assert f"lora-from-scratch finetune --method {name}" in text
        assert f"class {cls.__name__}(" in text


@pytest.mark.slow
def test_the_pages_of_units_are_the_unsolved_notebooks(site: Site) -> None:
    for unit in units():
        code = site[f"notebooks/unit_{unit.number}/unit_{unit.number}.html"].tree.get_text()
        for exercise in unit.exercises:
            assert f'check("{exercise.name}")' in code
        assert code.count("# YOUR CODE HERE") >= len(unit.exercises)


@pytest.mark.slow
@pytest.mark.parametrize("unit", [pytest.param(unit, id=unit.number) for unit in units()])
def test_no_file_holds_a_solution(unit: Unit, folder: Path, site: Site) -> None:
    texts = {name: page.tree.get_text() for name, page in site.items()}
    texts |= {str(path): notebook_text(path) for path in folder.rglob("*.ipynb")}
    lines = {name: stripped_lines(text) for name, text in texts.items()}
    for exercise in unit.exercises:
        for body in bodies(exercise.object, exercise.blank):
            if len(body) > 1:
                assert [name for name, text in lines.items() if "\n".join(body) in text] == [], exercise.name


def stripped_lines(text: str) -> str:
    return "\n".join(line.strip().split("  # ")[0] for line in text.splitlines())


def notebook_text(path: Path) -> str:
    nbformat = pytest.importorskip("nbformat")
    return "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


@pytest.mark.slow
def test_nothing_else_than_pages_and_downloads_is_published(folder: Path) -> None:
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {
        *(".html", ".css", ".js", ".png", ".svg", ".ipynb", ".inv", ".map", ".txt", "")
    }
    assert not list(folder.rglob("*.py"))


# --- How it is linked, and what it shows to people who do not see -------------------------------------------------


@pytest.mark.slow
def test_no_internal_link_is_broken(folder: Path, site: Site) -> None:
    broken = []
    for name, page in site.items():
        for tag, attribute in (("a", "href"), ("img", "src"), ("script", "src"), ("link", "href")):
            for found in page.tree.find_all(tag, {attribute: True}):
                link = urlsplit(str(found[attribute]))
                if link.scheme or link.netloc:
                    continue
                target = (page.path.parent / unquote(link.path)).resolve() if link.path else page.path
                other = site.get(target.relative_to(folder).as_posix())
                place = unquote(link.fragment)
                if not target.is_file() or (place and other and place not in other.places):
                    broken.append(f"{name}: {found[attribute]}")
    assert broken == []


@pytest.mark.slow
def test_the_site_needs_no_network_connection(site: Site) -> None:
    for name, page in site.items():
        loaded = [str(tag["src"]) for tag in page.tree.find_all(src=True)]
        loaded += [str(tag["href"]) for tag in page.tree.find_all("link", {"rel": "stylesheet"})]
        assert [address for address in loaded if "//" in address] == [], name


@pytest.mark.slow
def test_every_image_has_alternative_text(site: Site) -> None:
    images = [(name, image) for name, page in site.items() for image in page.tree.find_all("img")]
    assert len(images) > len(units())
    assert [name for name, image in images if not str(image.get("alt", "")).strip()] == []


@pytest.mark.slow
def test_equations_are_mathml(site: Site) -> None:
    tree = site["notebooks/unit_09/unit_09.html"].tree
    assert len(tree.find_all("math")) > 10
    cells = [tag.get_text() for tag in tree.find_all(["p", "li"])]
    assert not [text for text in cells if re.search(r"\\[a-z]+\b|\$", text)]


# --- In a browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(folder: Path) -> Iterator[Any]:
    pytest.importorskip("selenium", reason="selenium is not installed: pip install -e '.[dev]'")
    if not CHROMIUM or not DRIVER:
        pytest.skip("Chromium is not here (on Debian: apt install chromium chromium-driver)")
    with browser() as driver:
        yield driver


@pytest.mark.slow
def test_pages_have_no_console_error_and_fit_a_narrow_screen(chromium: Any, site: Site) -> None:
    screen = {"width": NARROW, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    wrong = []
    for name, page in site.items():
        chromium.get(page.path.as_uri())
        width = chromium.execute_script("return document.documentElement.scrollWidth")
        if width > NARROW:
            wrong.append(f"{name} is {width} pixels wide")
        wrong += [f"{name}: {entry['message']}" for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_told_from_its_background(scheme: str, chromium: Any, site: Site) -> None:
    chromium.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    for name in (
        *("index.html", "units.html", "glossary.html", "notebooks/unit_09/unit_09.html", "methods/lora.html"),
        *("api/lora_from_scratch.linear_algebra.svd.html", "course/instructor_guide.html", "docs/atlas.html"),
    ):
        chromium.get(site[name].path.as_uri())
        chromium.execute_script("document.querySelectorAll('details').forEach(details => details.open = true)")
        assert chromium.execute_script(LOW_CONTRAST) == [], name


@pytest.mark.slow
def test_search_finds_a_method(chromium: Any, site: Site) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    chromium.get(site["search.html"].path.as_uri() + "?q=qlora")
    links = WebDriverWait(chromium, 60).until(
        lambda driver: driver.find_elements("css selector", "#search-results li a")
    )
    assert any("qlora" in link.get_attribute("href") for link in links)


@pytest.mark.slow
def test_the_chart_of_the_atlas_shows_the_methods_within_the_chosen_limits(chromium: Any, site: Site) -> None:
    from selenium.webdriver.support.ui import Select, WebDriverWait

    def names(driver: Any) -> set[str]:  # in one step: the chart is drawn anew meanwhile
        selector = f"#{atlas_pages.PLACE} .mark-text.role-mark text"
        script = "return [...document.querySelectorAll(arguments[0])].map(text => text.textContent)"
        return set(driver.execute_script(script, selector))

    def shown(expected: set[str]) -> None:
        WebDriverWait(chromium, 60).until(lambda driver: names(driver) == expected)

    chromium.get(site["docs/atlas.html"].path.as_uri())
    rows = atlas_pages.rows()
    shown({row["method"] for row in rows if row["perplexity"] <= atlas_pages.OPENS_WITH["limit_perplexity"]})
    Select(chromium.find_element("name", "limit_perplexity")).select_by_visible_text("any")
    shown({row["method"] for row in rows})
    limit = 30_000
    Select(chromium.find_element("name", "limit_trained")).select_by_visible_text(f"{limit:,}")
    shown({row["method"] for row in rows if row["trained"] <= limit})
    Select(chromium.find_element("name", "across")).select_by_visible_text(atlas_pages.COSTS["trained"])
    shown({row["method"] for row in rows if row["trained"] <= limit})


# --- How its sources are made ------------------------------------------------------------------------------------


def test_every_document_is_in_a_table_of_contents() -> None:
    pages = dict(sources.documents())
    listed = {
        (sources.PurePosixPath(name).parent / entry.strip().split("<")[-1].rstrip(">")).as_posix() + ".md"
        for name, text in pages.items()
        for block in re.findall(r"```\{toctree\}\n(.*?)```", text, flags=re.DOTALL)
        for entry in block.splitlines()
        if entry and not entry.startswith(":")
    }
    unlisted = {page for page in pages if not any(sources.PurePosixPath(page).match(entry) for entry in listed)}
    assert unlisted == {"index.md"}


def test_pictures_for_two_themes_follow_the_theme_of_the_site() -> None:
    page = (REPOSITORY / "docs/notebook.md").read_text(encoding="utf-8")
    shown = sources.with_themes(page)
    assert "<picture>" not in shown
    assert shown.count(":class: only-light\n") == shown.count(":class: only-dark\n") == page.count("<picture>")


def test_the_chart_of_the_atlas_comes_before_its_tables() -> None:
    page = dict(sources.documents())["docs/atlas.md"]
    assert page.count(f'id="{atlas_pages.PLACE}"') == 1
    assert page.index(atlas_pages.PLACE) < page.index("| method ")


def test_a_method_in_the_atlas_has_its_numbers_on_its_page_and_another_has_none() -> None:
    classes = method_classes()
    row = next(row for row in atlas_pages.rows() if row["method"] == "lora")
    said = atlas_pages.place_in_atlas(classes["lora"])
    assert f"lora: {row['trained']:,}, {row['perplexity']:g} and {row['tales']:g}" in said
    in_atlas = {row["method"] for row in atlas_pages.rows()}
    for name, cls in classes.items():
        assert bool(atlas_pages.place_in_atlas(cls)) == bool(in_atlas & set(cls.contestants())), name


def test_every_method_says_when_to_use_it() -> None:
    for name, cls in method_classes().items():
        assert cls.use_when, name
        assert "use_when" in vars(cls), f"{name} has the sentence of another method"
        assert not cls.use_when.endswith("."), name
        assert f"**Use it when** {cls.use_when}." in method_pages.method_page(cls), name


def test_a_docstring_becomes_restructured_text() -> None:
    lines = [
        "The change `B A`, for every *args:",
        "",
        "    y = W x + s * B A x",
        "",
        "It has a low rank_:",
        "- r",
        "  is 4",
    ]
    assert docstrings.restructured(lines) == [
        *("The change ``B A``, for every \\*args:", "", "::", "", "    y = W x + s * B A x", ""),
        *("It has a low rank\\_:", "", "- r", "  is 4"),
    ]


def test_several_returned_values_are_a_list() -> None:
    assert docstrings.with_returns(
        ["Split.", "", "Returns:", "    q: (n,).", "    s: (m,)", "        or ().", "", "Raises:"]
    ) == [*("Split.", "", ":returns:", "    - q: (n,).", "    - s: (m,)", "      or ().", "", "Raises:")]
    assert docstrings.with_returns(["Returns:", "    (n,): the", "        sum."]) == [
        ":returns:",
        "    (n,): the",
        "    sum.",
        "",
    ]


def test_links_lead_to_pages_or_to_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "[a](../README.md#x) [b](lora.md) [c](../lora_from_scratch/methods/lora.py) [d](../Makefile) [e](https://x.org)"
    )
    pages = {"index.md", "docs/lora.md", "api/lora_from_scratch.methods.lora.rst"}
    folder = sources.PurePosixPath("docs")
    pages_only = "[a](../index.md#x) [b](lora.md) [c](../api/lora_from_scratch.methods.lora.rst) {} [e](https://x.org)"
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert sources.with_links(text, folder, pages) == pages_only.format("d")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    monkeypatch.setenv("GITHUB_REPOSITORY", "us/course")
    there = "[d](https://github.com/us/course/blob/HEAD/Makefile)"
    assert sources.with_links(text, folder, pages) == pages_only.format(there)
    in_english = sources.with_links("[f](atlas.md#x) [g](lora.md)", folder, {"docs/lora.md"}, {"docs/atlas.md"})
    assert in_english == '<a href="../../docs/atlas.html#x">f</a> [g](lora.md)'


def test_the_code_of_a_method_lacks_the_bodies_of_exercises() -> None:
    module = sys.modules[method_classes()["lora"].__module__]
    text = stripped_lines(method_pages.unsolved(module))
    exercises = method_pages.exercises_of(module)
    assert {unit.number for unit, _ in exercises} == {"09"}
    for _, exercise in exercises:
        assert all("\n".join(body) not in text for body in bodies(exercise.object, exercise.blank))
        assert f"{exercise.name}(" in text
    compile(method_pages.unsolved(module), "lora.py", "exec")


@pytest.mark.parametrize("unit", [pytest.param(unit, id=unit.number) for unit in units()])
def test_every_equation_of_a_unit_can_be_written_as_mathml(unit: Unit) -> None:
    from docutils import nodes
    from mathml import mathml

    nbformat = pytest.importorskip("nbformat")
    path = REPOSITORY / "notebooks" / f"unit_{unit.number}" / f"unit_{unit.number}.ipynb"
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for block, inline in re.findall(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+?)\$", cell.source, flags=re.DOTALL):
                mathml(nodes.math("", block or inline), as_block=bool(block))


@pytest.mark.slow
@pytest.mark.parametrize("language", sorted(set(LANGUAGES) - {ENGLISH}))
def test_every_translated_unit_has_a_page_in_its_language(language: str, site: Site) -> None:
    assert {f"{language}/index.html", f"{language}/units.html", f"{language}/glossary.html"} <= set(site)
    for unit in translated_units(language):
        page = site[f"{language}/notebooks/{unit}/{unit}.html"].tree
        assert page.html is not None
        assert str(page.html["lang"]).startswith(language)
        heading = page.find("h1")
        assert heading is not None
        assert "Unit" not in heading.get_text()


def test_links_to_the_cloud_need_a_known_repository() -> None:
    assert one_click.links("", "notebooks/unit_00/unit_00.ipynb") == ""
    found = one_click.links("ada/course", "notebooks/unit_00/unit_00.ipynb")
    assert "(https://colab.research.google.com/github/ada/course/blob/HEAD/notebooks/unit_00/unit_00.ipynb)" in found
    assert "(https://codespaces.new/ada/course)" in found
