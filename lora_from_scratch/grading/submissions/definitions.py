"""Find the names that a code cell binds and uses, and take cells apart. Nothing is run.

The code is a learner's: it may be invalid Python, contain IPython magics, or be crafted to be hard to read. Every
function here returns a result for any text.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
import symtable
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

LONGEST = 200_000  # characters; longer cells are not parsed
BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "In", "Out", "get_ipython", "display", "_"}
_MAGIC = re.compile(r"^([ \t]*)(?:[%!?].*|[\w.]+\?{1,2}[ \t]*)$", re.MULTILINE)
_ANOTHER_LANGUAGE = re.compile(r"\s*%%(?!time\b|capture\b|prun\b)")  # %%bash, %%writefile, ...: binds no names
_RUNS_ITS_CELL = re.compile(r"%%(time|capture|prun)\b")
MOST_MAGICS = 50
PACKAGE = __name__.partition(".")[0]
LIBRARYS = ("library", "working")  # a name assigned from a call of these is the library's version
COMPOUND = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Statement:
    """A top-level statement of a cell, with the comments above it.

    Attributes:
        text: its lines, unchanged.
        binds: the names that it binds, each with its kind: "real" (a function, a class, or an alias of one), "stub"
            (nothing written yet), "library" (the library's own), "value" (anything else).
        needs: the global names that it uses and does not bind itself.
        checks: the name in `check("name")`, if it is such a call.
    """

    text: str
    binds: dict[str, str]
    needs: frozenset[str]
    checks: str = ""


@functools.lru_cache(maxsize=4096)
def statements(source: str) -> tuple[Statement, ...] | None:
    """The top-level statements of a cell, in order; None if it is not Python. Joined, they give the cell's text."""
    if _ANOTHER_LANGUAGE.match(source):
        return (Statement(source, {}, frozenset()),)
    tree = _parsed(source)
    if tree is None:
        return None
    lines = source.split("\n")
    made: list[Statement] = []
    begin = 0
    for place, node in enumerate(tree.body):
        end = len(lines) if place == len(tree.body) - 1 else _last_line(node)
        if end <= begin:  # two statements on one line: merge them
            made[-1] = _joined(made[-1], _statement(node, ""))
            continue
        made.append(_statement(node, "\n".join(lines[begin:end])))
        begin = end
    return tuple(made)


def binds(source: str) -> dict[str, str]:
    """The names that a cell binds, as in `Statement.binds`. If it is not Python, whatever looks like a definition."""
    found = statements(source)
    if found is None:
        return dict.fromkeys(_look_like_definitions(source), "real")
    bound: dict[str, str] = {}
    for statement in found:
        bound.update(statement.binds)
    return bound


def needs(source: str) -> frozenset[str]:
    """The global names that a cell uses before it binds them itself, without builtins."""
    found = statements(source)
    if found is None:
        return frozenset(re.findall(r"\b[A-Za-z_]\w*\b", source[:LONGEST])) - BUILTINS
    everything = set(binds(source))
    bound: set[str] = set()
    needed: set[str] = set()
    for statement in found:
        late = any(word in statement.text for word in ("def ", "class ", "lambda"))  # looked up when called
        needed |= statement.needs - (everything if late else bound)
        bound |= statement.binds.keys()
    return frozenset(needed) - BUILTINS


def checks(source: str) -> tuple[str, ...]:
    """The names in top-level calls of `check("name")`."""
    return tuple(statement.checks for statement in statements(source) or () if statement.checks)


def is_python(source: str) -> bool:
    return statements(source) is not None


def imports_only(source: str) -> bool:
    """Whether a cell consists only of imports."""
    tree = _parsed(source)
    return tree is not None and bool(tree.body) and all(isinstance(n, ast.Import | ast.ImportFrom) for n in tree.body)


def imports_everything(source: str) -> bool:
    """Whether a cell has a star import from a module that is not the library's."""
    tree = _parsed(source)
    return tree is not None and any(
        isinstance(node, ast.ImportFrom) and node.names[0].name == "*" and not _is_librarys(node.module)
        for node in tree.body
    )


def same_code(one: str, other: str) -> bool:
    """Whether two sources are equal apart from whitespace and comments."""
    if one.strip() == other.strip():
        return True
    first, second = _parsed(one), _parsed(other)
    if first is None or second is None:
        return " ".join(one.split()) == " ".join(other.split())
    return _dump(first) == _dump(second)


def cut(source: str, name: str) -> tuple[str, str] | None:
    """Split a cell into the text that binds a name and the rest; None if they cannot be separated."""
    found = statements(source)
    if found is None:
        return _cut_by_lines(source, name)
    taken = [statement for statement in found if name in statement.binds]
    if not taken or any(set(statement.binds) != {name} for statement in taken):
        return None
    rest = [statement.text for statement in found if name not in statement.binds]
    return "\n".join(statement.text for statement in taken).strip("\n"), "\n".join(rest).strip("\n")


def helpers(source: str, text: str, values: bool, besides: Iterable[str] = ()) -> str:
    """The statements of a cell, in order, on which `text` (cut out of it) depends, directly or indirectly.

    Args:
        values: whether to include statements that compute a value; otherwise only functions, classes and imports.
        besides: names to ignore.
    """
    found = statements(source) or ()
    wanted = set(needs(text)) - set(besides)
    chosen: set[int] = set()
    while True:
        more = {
            place
            for place, statement in enumerate(found)
            if statement.binds.keys() & wanted and (values or "value" not in statement.binds.values())
        }
        if more <= chosen:
            return "\n".join(found[place].text for place in sorted(chosen)).strip("\n")
        chosen |= more
        wanted |= {name for place in more for name in found[place].needs} - set(besides)


def _parsed(source: str) -> ast.Module | None:
    if len(source) > LONGEST:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except UNREADABLE:
            pass
        try:  # as IPython would run it, which may have taken away an indentation: then a `return` is left over
            tree = ast.parse(_as_python(source))
            compile(tree, "<cell>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        except UNREADABLE:
            return None
    return tree


def _as_python(source: str) -> str:
    """The cell as IPython transforms it before running, line for line: magics and shell commands become calls."""
    lines = [f"{line}\n" for line in source.split("\n")]
    if _RUNS_ITS_CELL.match(lines[0]):
        lines[0] = "\n"
    if sum(line.lstrip().startswith(("%", "!", "?")) for line in lines) > MOST_MAGICS:
        return _MAGIC.sub(lambda found: f"{found[1]}pass", "".join(lines))  # IPython's own is quadratic
    try:
        for transform in _transformer().cleanup_transforms:
            lines = transform(lines)
        return "".join(_transformer().do_token_transforms(lines))
    except Exception as error:  # the tokenizer raises errors of its own for invalid Python
        raise SyntaxError(str(error)) from None


@functools.cache
def _transformer() -> Any:
    """IPython's transformer, modified so that line numbers do not change."""
    from IPython.core.inputtransformer2 import TransformerManager, leading_empty_lines

    class KeepsLines(TransformerManager):
        def do_one_token_transform(self, lines: list[str]) -> tuple[bool, list[str]]:
            changed, after = super().do_one_token_transform(lines)
            pairs = zip(lines, after, strict=False)
            place = next((n for n, (one, other) in enumerate(pairs) if one != other), len(after)) + 1
            return changed, after[:place] + ["\n"] * (len(lines) - len(after)) + after[place:]

    made = KeepsLines()
    made.cleanup_transforms.remove(leading_empty_lines)
    return made


def _last_line(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _statement(node: ast.stmt, text: str) -> Statement:
    bound, used = _names(node)
    if isinstance(node, DEFINITIONS):
        kinds = {node.name: "stub" if _is_stub(node) else "real"}
    elif isinstance(node, ast.Assign | ast.AnnAssign) and len(bound) == 1:
        kinds = dict.fromkeys(bound, _kind_of_value(node.value))
    elif isinstance(node, ast.ImportFrom):
        kinds = dict.fromkeys(bound, "library" if _is_librarys(node.module) else "real")
    elif isinstance(node, ast.Import):
        kinds = dict.fromkeys(bound, "library" if _is_librarys(node.names[0].name) else "value")
    else:
        kinds = dict.fromkeys(bound, "value")
    loop_variables = bound if isinstance(node, (*COMPOUND, *DEFINITIONS)) else set()
    return Statement(text, kinds, frozenset(used - loop_variables), _checked(node))


def _is_librarys(module: str | None) -> bool:
    return (module or "").partition(".")[0] == PACKAGE


def _joined(one: Statement, other: Statement) -> Statement:
    needed = one.needs | (other.needs - one.binds.keys())
    return Statement(one.text, one.binds | other.binds, needed, one.checks or other.checks)


def _names(node: ast.stmt) -> tuple[set[str], set[str]]:
    """The names that a statement binds at top level, and the global names that it uses, also inside functions."""
    try:
        tables = [symtable.symtable(ast.unparse(node), "<cell>", "exec")]
    except UNREADABLE:
        return set(), set()
    top = tables[0]
    bound = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used: set[str] = set()
    while tables:
        table = tables.pop()
        tables.extend(table.get_children())
        used |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_referenced() and (table is top or symbol.is_global())
        }
    return bound, used


def _kind_of_value(value: ast.expr | None) -> str:
    if isinstance(value, ast.Constant) and value.value in (None, ...):
        return "stub"
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in LIBRARYS:
        return "library"
    if isinstance(value, ast.Lambda | ast.Name | ast.Attribute):
        return "real"
    return "value"


def _is_stub(node: ast.stmt) -> bool:
    """Whether a function, or every method of a class, is still unwritten."""
    if isinstance(node, ast.ClassDef):
        methods = [item for item in node.body if isinstance(item, DEFINITIONS)]
        return all(map(_is_stub, methods)) if methods else all(map(_does_nothing, node.body))
    return isinstance(node, DEFINITIONS) and all(map(_does_nothing, node.body))


def _does_nothing(node: ast.stmt) -> bool:
    if isinstance(node, ast.Raise) and node.exc is not None:
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _checked(node: ast.stmt) -> str:
    call = node.value if isinstance(node, ast.Expr) else None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "check" and call.args:
        first = call.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            return first.value
    return ""


def _dump(tree: ast.Module) -> str:
    try:
        return ast.dump(tree)
    except RecursionError:
        return str(id(tree))


# --- Text that is not Python ------------------------------------------------------------------------------

_DEFINITION = re.compile(r"^(?:async\s+def|def|class)\s+([A-Za-z_]\w*)|^([A-Za-z_]\w*)\s*=[^=]", re.MULTILINE)
_BEGINS = re.compile(r"^(?:@|def\b|async\s+def\b|class\b|check\()")


def _look_like_definitions(source: str) -> list[str]:
    return [found[1] or found[2] for found in _DEFINITION.finditer(source[:LONGEST])]


def _cut_by_lines(source: str, name: str) -> tuple[str, str] | None:
    """Like `cut`, for a cell in which some definition is not valid Python: blocks start at the left margin."""
    blocks: list[list[str]] = [[]]
    for line in source[:LONGEST].split("\n"):
        decorated = blocks[-1] and all(text.startswith("@") for text in blocks[-1])
        if _BEGINS.match(line) and not decorated:
            blocks.append([])
        blocks[-1].append(line)
    texts = ["\n".join(block) for block in blocks]
    taken = [text for text in texts if name in _look_like_definitions(text)]
    rest = [text for text in texts if name not in _look_like_definitions(text)]
    if not taken:
        return None
    return "\n".join(taken).strip("\n"), "\n".join(rest).strip("\n")
