"""What docs/architecture.md says of the package holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import architecture, methods_table
from tests.helpers import REPOSITORY

PACKAGE = REPOSITORY / "lora_from_scratch"
PAGE = REPOSITORY / "docs" / "architecture.md"


def test_a_folder_imports_only_from_the_folders_below_it_and_there_are_no_circles() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_folder_is_outside_the_rule() -> None:
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(architecture.folders())
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("folder", architecture.folders())
def test_no_module_imports_a_private_name_from_another(folder: str) -> None:
    private = [
        f"{path.relative_to(PACKAGE)}: {node.module}.{alias.name}"
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_from_scratch")
        for alias in node.names
        if re.match(r"_(?!_)", alias.name)
    ]
    assert private == []


def test_the_page_lists_the_folders_in_their_order() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE) == architecture.folders()


def test_the_picture_and_its_alternative_text_are_of_the_code_as_it_is() -> None:
    said = architecture.in_words(architecture.imports())
    assert f"![{said}](architecture.png)" in PAGE.read_text(encoding="utf-8")
    assert Image.open(architecture.PICTURE).info["Description"] == said


def test_the_tree_in_the_readme_names_every_folder() -> None:
    tree = re.findall(r"[├└]── (\w+)/", (REPOSITORY / "README.md").read_text(encoding="utf-8"))
    folders = {path.parent.name for path in (REPOSITORY / "lora_from_scratch").glob("*/__init__.py")}
    assert folders <= set(tree)


def test_the_table_of_methods_is_what_their_files_say() -> None:
    assert methods_table.PAGE.read_text(encoding="utf-8") == methods_table.page()


PAGES = [page for folder in ("", "docs", "course", "benchmarks") for page in sorted((REPOSITORY / folder).glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)#]+)", text)
    assert [link for link in links if not link.startswith("http") and not (page.parent / link).exists()] == []
