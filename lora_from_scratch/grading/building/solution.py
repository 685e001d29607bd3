"""Statement, stub and solution of an exercise, from the source of the library's own object.

The solved cell is the object's source, with markers around the code that learners write; nbgrader puts a stub there.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import symtable
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import resolve_name
from types import ModuleType
from typing import Any

BEGIN = "### BEGIN SOLUTION"
END = "### END SOLUTION"


def solved_source(target: Any, blank: tuple[str, ...] = ()) -> str:
    """The object's source with `BEGIN` and `END` around its body, or around its methods' bodies.

    Signatures and docstrings stay outside the markers: they are the problem statement.

    Args:
        target: a function or class.
        blank: for a class, the methods to mark; empty means all of them.

    Raises:
        ValueError: there is nothing to mark, or `blank` names a method that does not exist.
    """
    lines = source_of(target).splitlines()
    for function in reversed(_to_write(target, blank)):
        first, last = _body(function, lines)
        indent = " " * function.body[-1].col_offset
        lines[last:last] = [indent + END]
        lines[first - 1 : first - 1] = [indent + BEGIN]
    return "\n".join(lines)


def solution_lines(target: Any, blank: tuple[str, ...] = ()) -> list[str]:
    """The lines that learners must not see: those between the markers, stripped, without comments."""
    lines: list[str] = []
    inside = False
    for line in solved_source(target, blank).splitlines():
        text = line.strip()
        if text in (BEGIN, END):
            inside = text == BEGIN
        elif inside and text and not text.startswith("#"):
            lines.append(text.split("  # ")[0].strip())
    return lines


def source_of(target: Any) -> str:
    return textwrap.dedent(inspect.getsource(target)).rstrip("\n")


def _to_write(target: Any, blank: tuple[str, ...]) -> list[ast.FunctionDef]:
    """The functions whose bodies a learner writes, in the order of the source."""
    tree = ast.parse(source_of(target)).body[0]
    if isinstance(tree, ast.FunctionDef):
        return [tree]
    if not isinstance(tree, ast.ClassDef):
        raise ValueError(f"{target.__name__} is neither a function nor a class")
    methods = [item for item in tree.body if isinstance(item, ast.FunctionDef)]
    unknown = [name for name in blank if name not in {method.name for method in methods}]
    if unknown:
        raise ValueError(f"`blank` of {target.__name__} names {', '.join(unknown)}, which is not one of its methods")
    chosen = [method for method in methods if not blank or method.name in blank]
    if not chosen:
        raise ValueError(f"{target.__name__} has no methods, so there is nothing to implement")
    return chosen


def _body(function: ast.FunctionDef, lines: list[str]) -> tuple[int, int]:
    """The first and last line of a body, from 1: without the docstring, with the comments above its first line."""
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not statements:
        raise ValueError(f"{function.name} has only a docstring, so there is nothing to implement")
    decorators = getattr(statements[0], "decorator_list", [])
    first = min([statements[0].lineno, *(decorator.lineno for decorator in decorators)])
    if first == function.lineno:
        raise ValueError(
            f"the body of {function.name} is on the same line as its signature; put it on a line of its own"
        )
    while lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return first, statements[-1].end_lineno or statements[-1].lineno


# --- Imports that the solutions need ----------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """`import module as name` or `from module import attribute as name`."""

    module: str
    attribute: str
    name: str


def needed_imports(targets: Iterable[Any], defined: Iterable[str] = ()) -> list[Import]:
    """The imports with which the objects' sources run in a notebook, as their own modules write them.

    Args:
        defined: names that the notebook defines: its own imports, and the unit's exercises, which must not be imported.

    Raises:
        ValueError: a name is not found in the object's module.
    """
    found: dict[str, Import] = {}
    known = set(defined) | set(dir(builtins))
    for target in targets:
        module = sys.modules[target.__module__]
        imported = _imports_of(module)
        for name in sorted(free_names(source_of(target)) - known):
            if name in imported:
                found[name] = imported[name]
            elif hasattr(module, name):
                found[name] = Import(module.__name__, name, name)
            else:
                raise ValueError(f"{target.__name__} uses {name}, which {module.__name__} neither defines nor imports")
    return list(found.values())


def free_names(source: str) -> set[str]:
    """The global names that a piece of source uses but does not define, including those in annotations."""
    top = symtable.symtable(source, "<exercise>", "exec")
    defined = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used: set[str] = set()
    tables = [top]
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (table is top or symbol.is_global()):
                used.add(symbol.get_name())
    return used - defined


def refers_to_itself(target: Any) -> bool:
    """Whether an annotation in a class names the class itself, which works only if annotations are not evaluated."""
    if not inspect.isclass(target):
        return False
    tree = ast.parse(source_of(target))
    annotations = [
        annotation
        for node in ast.walk(tree)
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if annotation is not None
    ]
    return any(
        isinstance(node, ast.Name) and node.id == target.__name__
        for annotation in annotations
        for node in ast.walk(annotation)
    )


def write_imports(imports: Iterable[Import], width: int = 100) -> str:
    """The imports as Python code, one line per module: standard library, third-party packages, this library."""
    plain = sorted({item for item in imports if not item.attribute}, key=lambda item: item.module)
    by_module: dict[str, list[Import]] = {}
    for item in sorted(imports, key=lambda item: (item.module, item.attribute)):
        if item.attribute:
            by_module.setdefault(item.module, []).append(item)
    blocks: dict[int, list[str]] = {}
    for item in plain:
        alias = "" if item.name == item.module.partition(".")[0] else f" as {item.name}"
        blocks.setdefault(_origin(item.module), []).append(f"import {item.module}{alias}")
    for module, items in by_module.items():
        names = [i.attribute if i.attribute == i.name else f"{i.attribute} as {i.name}" for i in items]
        line = f"from {module} import {', '.join(names)}"
        if len(line) > width:
            line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
        blocks.setdefault(_origin(module), []).append(line)
    return "\n\n".join("\n".join(blocks[origin]) for origin in sorted(blocks))


def bound_names(code: str) -> set[str]:
    """The names that the imports of a cell bind. Lines with magics (%, !) are ignored."""
    lines = ["" if line.startswith(("%", "!")) else line for line in code.splitlines()]
    return {item.name for item in _imports_in(ast.parse("\n".join(lines)), "")}


def _origin(module: str) -> int:
    top = module.partition(".")[0]
    return 0 if top in sys.stdlib_module_names else 2 if top == __name__.partition(".")[0] else 1


def _imports_of(module: ModuleType) -> dict[str, Import]:
    """The imports of a module by the name that they bind, also under `if TYPE_CHECKING`, but not inside functions."""
    return {item.name: item for item in _imports_in(ast.parse(inspect.getsource(module)), module.__package__ or "")}


def _imports_in(tree: ast.AST, package: str) -> Iterable[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                yield Import(alias.name, "", name)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "__future__":
                continue
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            for alias in node.names:
                yield Import(module or "", alias.name, alias.asname or alias.name)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _imports_in(node, package)
