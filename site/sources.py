"""Write what Sphinx reads: copies of the repository's documents and notebooks, and pages made from the library."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from api_pages import api_pages, page_of_module
from atlas_pages import with_chart, write_places
from method_pages import method_pages
from one_click import links
from translated_pages import translated_page, with_pages

from lora_from_scratch.methods.registry import method_classes
from lora_from_scratch.support.translated_notebook import translated
from lora_from_scratch.support.translation import ENGLISH, LANGUAGES, translate, translated_units

REPOSITORY = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
NOTE = "This page is for reading. To work on the unit, open its notebook in JupyterLab (`make lab`), or download FILE."
IN_THE_CLOUD = "Or open it in the cloud:"
TRANSLATED = ("index.md", "units.md", "glossary.md")  # beside the notebooks
DOCUMENTS = (
    "course/*.md",
    "docs/*.md",
    "benchmarks/*.md",
    "CONTRIBUTING.md",
    "CODE_OF_CONDUCT.md",
    "SECURITY.md",
    "CHANGELOG.md",
)
PICTURES = ("docs/*.png", "notebooks/*/*.png")
# Pages of the site that say the same.
INSTEAD = {"README.md": "index.md", "docs/README.md": "index.md", "docs/methods.md": "methods/index.md"}
# Lists of deliberately wrong answers that a check has to find: of use to those who write checks.
LEFT_OUT = {"benchmarks/answer_mutants.md", "benchmarks/mutants.md"}
LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()#\s]+)(?P<anchor>#[^()\s]*)?\)")
THEMES = re.compile(
    r"<picture>\s*<source media=\"\(prefers-color-scheme: dark\)\" srcset=\"(?P<dark>[^\"]+)\">\s*"
    r"<img src=\"(?P<light>[^\"]+)\" alt=\"(?P<alt>[^\"]+)\">\s*</picture>"
)
UNIT_ROW = re.compile(r"^\| \[\d\d .*\n", re.MULTILINE)


def write_sources(folder: Path) -> None:
    """Write all pages into an empty folder, at the places that they have in the repository."""
    pages = dict(documents()) | dict(method_pages()) | dict(api_pages())
    for name, text in pages.items():
        write(folder / name, with_links(text, PurePosixPath(name).parent, set(pages)))
    for name, text in notebooks():
        write(folder / name, text)
    write_places(folder / "methods", method_classes())
    for pattern in PICTURES:
        for file in REPOSITORY.glob(pattern):
            copy(file, folder / file.relative_to(REPOSITORY))
    for file in REPOSITORY.glob("notebooks/*/*.ipynb"):
        copy(file, folder / "downloads" / file.name)


def write_translated_sources(folder: Path, language: str) -> None:
    """Write the pages of the site in another language: the first pages, the glossary, and the translated units."""
    units = translated_units(language)
    english = set(dict(documents()) | dict(method_pages()) | dict(api_pages()))
    english |= {name for name, _ in notebooks() if PurePosixPath(name).stem not in units}
    pages = {name: translated_page(text, language) for name, text in documents() if name in TRANSLATED}
    for name, text in pages.items():
        text = with_pages(text, {page.removesuffix(".md") for page in TRANSLATED})
        text = text.replace(link_to(language), link_to(ENGLISH))
        write(folder / name, with_links(text, PurePosixPath(name).parent, set(pages), english - set(pages)))
    for name, text in notebooks(language):
        if PurePosixPath(name).stem in units:
            write(folder / name, text)
            notebook = notebook_in(language, REPOSITORY / name)
            write(folder / "downloads" / PurePosixPath(name).name, json.dumps(notebook, ensure_ascii=False, indent=1))
    for pattern in PICTURES:
        for file in REPOSITORY.glob(pattern):
            copy(file, folder / file.relative_to(REPOSITORY))


def link_to(language: str) -> str:
    """The link from a first page to the one in another language."""
    place = "../index.html" if language == ENGLISH else f"{language}/index.html"
    return f'<a href="{place}" lang="{language}">{LANGUAGES[language]}</a>'


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)


# --- Documents -----------------------------------------------------------------------------------------


def documents() -> Iterator[tuple[str, str]]:
    """The site's own pages, with what they take from the README, and the repository's documents."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    taken = {"ATLAS": picture(readme, "docs/atlas.png"), "UNITS": units_table(readme)}
    for file in sorted(HERE.glob("*.md")):
        text = file.read_text(encoding="utf-8")
        for name, piece in taken.items():
            text = text.replace(f"@{name}@", piece)
        yield file.name, text
    for pattern in DOCUMENTS:
        for file in sorted(REPOSITORY.glob(pattern)):
            name = file.relative_to(REPOSITORY).as_posix()
            if name not in LEFT_OUT | set(INSTEAD):
                text = file.read_text(encoding="utf-8")
                yield name, with_chart(text) if name == "docs/atlas.md" else with_themes(text)


def with_themes(markdown: str) -> str:
    """The same document; where GitHub is told to choose a picture by its theme, Furo shows that of its own theme."""

    def images(found: re.Match[str]) -> str:
        return "\n".join(
            f"```{{image}} {found[theme]}\n:class: only-{theme}\n:alt: {found['alt']}\n```\n"
            for theme in ("light", "dark")
        )

    return THEMES.sub(images, markdown)


def picture(markdown: str, file: str) -> str:
    """The picture of a document, with its alternative text.

    Raises:
        ValueError: the document does not show it.
    """
    found = re.search(rf"!\[[^\]]*\]\({re.escape(file)}\)", markdown)
    if not found:
        raise ValueError(f"README.md does not show {file}, which the site's first page takes from there")
    return found[0]


def units_table(readme: str) -> str:
    rows = UNIT_ROW.findall(readme)
    if not rows:
        raise ValueError("README.md has no table of the units, which the site takes from there")
    return "".join(["| Unit | What you build | What you find out |\n|---|---|---|\n", *rows])


def with_links(text: str, folder: PurePosixPath, pages: set[str], above: Collection[str] = ()) -> str:
    """The text with links that work on the site.

    A link to a file that has a page leads to that page; to any other file of the repository, to GitHub if the site is
    built there; otherwise only the text of the link is left.

    Args:
        above: pages that only the English site has, in the folder above this one.
    """

    def relinked(link: re.Match[str]) -> str:
        target = link["target"]
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        name = os.path.normpath(folder / target).replace(os.sep, "/")
        name = INSTEAD.get(name, name)
        page = name if name in pages or name in above or name.endswith(".ipynb") else page_of_module(name)
        if page in pages or (name.endswith(".ipynb") and name not in above):
            relative = os.path.relpath(page, folder).replace(os.sep, "/")
            return f"[{link['text']}]({relative}{link['anchor'] or ''})"
        if page in above:
            relative = os.path.relpath(f"../{page}", folder).replace(os.sep, "/")
            return f'<a href="{os.path.splitext(relative)[0]}.html{link["anchor"] or ""}">{link["text"]}</a>'
        address = repository_address()
        return f"[{link['text']}]({address}/blob/HEAD/{name}{link['anchor'] or ''})" if address else link["text"]

    return LINK.sub(relinked, text)


def repository_address() -> str:
    """The address of the repository where GitHub Actions build the site; elsewhere nothing."""
    parts = [os.environ.get(name, "") for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY")]
    return "/".join(parts) if all(parts) else ""


# --- Notebooks -----------------------------------------------------------------------------------------


def notebook_in(language: str, file: Path) -> dict[str, Any]:
    """A learner's notebook in a language."""
    notebook = json.loads(file.read_text(encoding="utf-8"))
    return notebook if language == ENGLISH else translated(notebook, language)


def notebooks(language: str = ENGLISH) -> Iterator[tuple[str, str]]:
    """The learners' notebooks, each with a note after its first cell that says where to work on it."""
    for file in sorted(REPOSITORY.glob("notebooks/*/*.ipynb")):
        notebook = notebook_in(language, file)
        note = translate(NOTE, language).replace("FILE", f"{{download}}`{file.name} </downloads/{file.name}>`")
        opened = links(os.environ.get("GITHUB_REPOSITORY", ""), file.relative_to(REPOSITORY).as_posix())
        note += f" {translate(IN_THE_CLOUD, language)} {opened}" if opened else ""
        note = f"```{{note}}\n{note}\n```"
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        code[0]["metadata"]["tags"] = ["remove-input"]  # what only Google Colab needs
        imports = next(cell for cell in code if "import check" in "".join(cell["source"]))
        imports["metadata"]["tags"] = ["hide-input"]
        notebook["cells"].insert(1, {"cell_type": "markdown", "id": "site-note", "metadata": {}, "source": note})
        yield file.relative_to(REPOSITORY).as_posix(), json.dumps(notebook)
