"""Hashes of everything that a solved notebook's outputs depend on; it is executed again only if one has changed.

`solutions/executed.json` holds each unit's hashes from its last execution. They cover

- its code cells, except the one for Google Colab, which does nothing here;
- the library's files that these cells and the unit's `exercises.py` import, directly or indirectly;
- the pinned versions of the packages that compute, draw or show something, and of those that the unit needs;
- the bundled files (model, tales, ...) that those files name.

Code is hashed as its syntax tree, so comments, docstrings, a method's `use_when` and layout do not matter. The record
also names the processor used, because another one rounds differently and training then ends with different numbers.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lora_from_scratch
from lora_from_scratch.checks.units import Unit, unit_files
from lora_from_scratch.grading.building.assemble import is_installer
from lora_from_scratch.grading.building.needs import needs
from lora_from_scratch.support.files import write_atomically

RECORD = Path("solutions/executed.json")
CPU_INFO = Path("/proc/cpuinfo")
CONSTRAINTS = Path("constraints.txt")
PACKAGE = Path(lora_from_scratch.__file__).resolve().parent
REGISTRY = "lora_from_scratch.methods.registry"
PACKAGES = ("ipython", "matplotlib", "numpy", "pillow", "sacrebleu", "safetensors", "tokenizers", "torch")
RUNS_IT = "import lora_from_scratch.grading.building.execution"
ASIDE = (
    "room",
    "checks.in_room",
    "support.translation",
)  # what is imported, but does nothing while a notebook is built
READ_AS_TEXT = {"getdoc", "getsource", "getsourcelines", "help", "__doc__"}  # with these, source text is output
TEXT = "use_when"  # an attribute of classes that is documentation, as a docstring is
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Hashes = dict[str, str]


def hashes(unit: Unit, notebook: Any, root: Path) -> Hashes:
    """The current hashes of the unit's solved notebook, as 16 hex digits by kind ("cells", "library", ...).

    The entry "processor", which `changed` ignores, describes the machine of this process.
    """
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code" and not is_installer(cell.source)]
    names = {name for cell in cells for name in _names(_parsed(cell))}
    form = str if names & READ_AS_TEXT else code_of
    checks = unit_files("exercises.py", f"unit_{unit.number}")
    sources = [*checks, *sorted(closure([*cells, *(_read(file) for file in checks), RUNS_IT]) - {*checks})]
    packages = {*PACKAGES, *needs(unit)}
    lines = _read(root / CONSTRAINTS).splitlines() if (root / CONSTRAINTS).is_file() else []
    strings = {string for path in sources for string in _strings(_parsed(_read(path)))}
    return {
        "cells": _hash([form(cell) for cell in cells]),
        "library": _hash([(path.parent.name, path.name, form(_read(path))) for path in sources]),
        "packages": _hash([line for line in lines if line.lower().partition("==")[0] in packages]),
        "assets": _hash([(path.name, _of_file(path)) for path in _assets(strings)]),
        "processor": processor(),
    }


@functools.cache
def processor() -> str:
    """What determines rounding: the processor model and the instruction set that PyTorch uses."""
    import torch

    said = _read(CPU_INFO) if CPU_INFO.is_file() else platform.processor()
    kind = [f"{name} {value}" for name, value in re.findall(r"^(vendor_id|cpu family|model)\s*: (.*)$", said, re.M)[:3]]
    return ", ".join([*(kind or [platform.machine(), said]), torch.backends.cpu.get_cpu_capability()])


def recorded(root: Path) -> dict[str, Hashes]:
    """The hashes of each unit ("unit_09") at its last execution; empty if nothing is recorded."""
    file = root / RECORD
    return json.loads(_read(file)) if file.is_file() else {}


def record(root: Path, name: str, now: Hashes) -> None:
    """Record that a unit has been executed."""
    everything = recorded(root) | {name: now}
    text = json.dumps(everything, indent=1, sort_keys=True) + "\n"
    if not (root / RECORD).is_file() or _read(root / RECORD) != text:
        write_atomically(root / RECORD, functools.partial(Path.write_text, data=text, encoding="utf-8"))


def changed(before: Hashes | None, now: Hashes) -> list[str]:
    """What has changed since the unit was last executed; empty if nothing has."""
    if before is None:
        return ["it has never been executed"]
    said = {
        "cells": "its code cells have changed",
        "library": "a file of the library that it imports has changed",
        "packages": "the version of a package has changed",
        "assets": "a bundled file has changed",
    }
    return [text for part, text in said.items() if before.get(part) != now[part]]


# --- Code ----------------------------------------------------------------------------------------------


@functools.cache
def code_of(text: str) -> str:
    """Python code without comments, docstrings and layout; anything else (`%time x`) unchanged."""
    tree = _parsed(text)
    return text if tree is None else repr(_plain(tree))


def _plain(node: Any) -> Any:
    """A syntax tree as tuples; the output of `ast.dump` depends on the version of Python."""
    if isinstance(node, list):
        return [_plain(item) for item in node if not _is_text(item)]
    if not isinstance(node, ast.AST):
        return node
    parts: list[tuple[str, Any]] = [(name, getattr(node, name, None)) for name in node._fields]
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        parts = [(name, value[1:] if name == "body" else value) for name, value in parts]
    return (type(node).__name__, *((name, _plain(value)) for name, value in parts if value not in (None, [])))


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == TEXT


@functools.cache
def _parsed(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def _names(tree: ast.AST | None) -> Iterator[str]:
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.id if isinstance(node, ast.Name) else node.attr


def _strings(tree: ast.AST | None) -> Iterator[str]:
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


# --- Files ---------------------------------------------------------------------------------------------


def closure(sources: Iterable[str]) -> set[Path]:
    """The library's files that run when these pieces of code are run, as far as their source shows.

    The registry imports every method. Only those that a source names ("lora") count, or all of them if anything asks
    for all (`method_classes`).
    """
    trees = [_parsed(text) for text in sources]
    named = {string for tree in trees for string in _strings(tree)}
    found: set[Path] = set()
    while trees:
        tree = trees.pop()
        modules = _imports(tree)
        if REGISTRY in modules:
            asks_for_all = "method_classes" in _names(tree)
            modules += [module for name, module in _methods().items() if asks_for_all or name in named]
        new = {path for module in modules for path in _files(module)} - found
        found |= new
        trees += [_parsed(_read(path)) for path in new]
    return found


def _imports(tree: ast.AST | None) -> list[str]:
    """The names of modules, and of what is taken from them, which may be modules too; not those of annotations."""
    if tree is None:
        return []
    names = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in _names(node.test)):
            names += _imports(node)
    return names


def _files(module: str) -> set[Path]:
    """The files of a module of the library and of the packages that it is in; of another name, none."""
    first, *rest = module.split(".")
    if first != PACKAGE.name or f"{'.'.join(rest)}.".startswith(tuple(f"{name}." for name in ASIDE)):
        return set()
    files, place = {PACKAGE / "__init__.py"}, PACKAGE
    for part in rest:
        place = place / part
        files |= {file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()}
    return files


@functools.cache
def _methods() -> dict[str, str]:
    """The module of each method, by the method's name."""
    found = {}
    for file in sorted((PACKAGE / "methods").glob("*.py")):
        for statement in ast.walk(ast.parse(_read(file))):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and statement.target.id == "name"
                and isinstance(statement.value, ast.Constant)
            ):
                found[str(statement.value.value)] = f"{PACKAGE.name}.methods.{file.stem}"
    return found


def _assets(strings: set[str]) -> list[Path]:
    """The bundled files whose name, with or without the folder, is one of these strings."""
    folder = PACKAGE / "assets"
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    return [path for path in files if set(path.relative_to(folder).parts) & strings]


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


@functools.cache
def _of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
