"""A page for each module of the library that is written to be used, filled by Sphinx's autodoc from its docstrings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

import lora_from_scratch

# The checks and the grading are programs with their own documents; the command line explains itself with --help.
FOLDERS = ("linear_algebra", "gpt2", "quantization", "methods", "models", "finetune", "compare", "serving", "pictures")


def api_pages() -> Iterator[tuple[str, str]]:
    """The overview, a page for each folder with the first sentence of its modules, and the pages of the modules."""
    package = lora_from_scratch.__name__
    for folder in FOLDERS:
        names = list(modules(f"{package}.{folder}"))
        rows = "".join(f"| [`{short(name)}`]({name}.rst) | {first_paragraph(name)} |\n" for name in names)
        yield f"api/{folder}.md", f"# {folder}\n\n| Module | |\n|---|---|\n{rows}{contents(names)}"
        for name in names:
            yield f"api/{name}.rst", module_page(name)
    links = "".join(f"- [{folder}]({folder}.md)\n" for folder in FOLDERS)
    yield (
        "api/index.md",
        f"# API\n\nThe library's modules, by folder, from their docstrings.\n\n{links}{contents(FOLDERS)}",
    )


def contents(pages: Iterable[str]) -> str:
    return "\n```{toctree}\n:hidden:\n\n" + "".join(f"{page}\n" for page in pages) + "```\n"


def modules(package: str) -> Iterator[str]:
    """The modules of a package that have something public, those of its folders included."""
    path = importlib.import_module(package).__path__
    names = [info.name for info in pkgutil.walk_packages(path, f"{package}.") if "._" not in info.name]
    return (name for name in names if inspect.getdoc(importlib.import_module(name)))


def short(name: str) -> str:
    return name.split(".", 2)[2]


def first_paragraph(name: str) -> str:
    paragraph = (inspect.getdoc(importlib.import_module(name)) or "").partition("\n\n")[0].replace("\n", " ")
    return paragraph.removesuffix(":").replace("|", "\\|")


def module_page(name: str) -> str:
    title = f"``{short(name)}``"
    return f"{title}\n{'=' * len(title)}\n\n.. automodule:: {name}\n   :members:\n"


def page_of_module(file: str) -> str:
    """The page of one of the package's source files, whether or not there is one."""
    return f"api/{'.'.join(PurePosixPath(file).with_suffix('').parts)}.rst"
