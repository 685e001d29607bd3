"""The mutants of an exercise: the library's own answer with one thing changed in what a learner writes."""

from __future__ import annotations

import ast
import inspect
import linecache
import random
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.answer_mutants.operators import EXPRESSIONS
from benchmarks.answer_mutants.statements import STATEMENTS
from lora_from_scratch.checks.exercise import Exercise

FEWEST = 20  # an exercise with fewer mutants of one change gets some of two
LONGEST = 100  # characters of the code shown in a mutant's name
NOT_WRITTEN = (ast.Raise, ast.Assert, ast.FunctionDef, ast.arguments)  # messages are not judged; signatures are given


@dataclass(frozen=True)
class Mutant:
    """A wrong answer, most likely.

    Attributes:
        name: what is changed: "`a + b` -> `a - b`". It says nothing of lines: a longer docstring leaves it as it is.
        line: of the library's file.
        source: of the whole function or class, without docstrings.
    """

    exercise: Exercise
    name: str
    line: int
    source: str

    def compiled(self) -> Any:
        """The function or class."""
        reference = inspect.unwrap(self.exercise.object)
        file = f"<{self.exercise.name}, mutant: {self.name}>"
        lines = self.source.splitlines(keepends=True)
        linecache.cache[file] = (len(self.source), None, lines, file)  # where inspect and tracebacks look
        namespace = dict(vars(sys.modules[reference.__module__]))
        with warnings.catch_warnings(action="ignore"):
            exec(compile(self.source, file, "exec", annotations.compiler_flag, dont_inherit=True), namespace)
        return namespace[reference.__name__]


@dataclass
class Place:
    """A node of the tree, where it hangs, and what it belongs to, from the outermost."""

    node: ast.AST
    parent: ast.AST
    field: str
    index: int | None
    above: tuple[ast.AST, ...]
    function: ast.FunctionDef


def mutants_of(exercise: Exercise) -> list[Mutant]:
    """The same ones each time, in the order of the source."""
    lines, first = inspect.getsourcelines(inspect.unwrap(exercise.object))
    tree = ast.parse(textwrap.dedent("".join(lines)))
    _without_docstrings(tree)
    found = {_simplified(ast.unparse(tree)): Mutant(exercise, "", 0, "")}
    _changes(exercise, tree, first - 1, found)
    single = list(found.values())[1:]
    two = random.Random(exercise.name)
    while len(found) - 1 < FEWEST and single:
        one = single.pop(two.randrange(len(single)))
        more = dict.fromkeys(found, one)
        _changes(exercise, ast.parse(one.source), 0, more)
        fresh = [(text, other) for text, other in more.items() if text not in found]
        for text, other in two.sample(fresh, min(4, len(fresh))):
            found[text] = Mutant(exercise, f"{one.name} and {other.name}", one.line, other.source)
    return _with_different_names(list(found.values())[1:])


def _with_different_names(mutants: list[Mutant]) -> list[Mutant]:
    """The same change in two places gets a number."""
    times: dict[str, int] = {}
    named = []
    for one in mutants:
        times[one.name] = times.get(one.name, 0) + 1
        number = f" ({times[one.name]})" if times[one.name] > 1 else ""
        named.append(Mutant(one.exercise, one.name + number, one.line, one.source))
    return named


def _changes(exercise: Exercise, tree: ast.Module, line: int, found: dict[str, Mutant]) -> None:
    """Enter the mutants with one change that are new."""
    top = tree.body[0]
    assert isinstance(top, ast.FunctionDef | ast.ClassDef)
    for place in _places(tree, exercise.blank):
        for new in _replacements(place):
            before, shown = _code(place, place.node)
            put_back = _put(place, new)
            text = ast.unparse(tree)
            after = _code(place, new, shown)[0]
            put_back()
            if (key := _simplified(text)) not in found and _can_be_compiled(text):
                name = f"`{before}` -> `{after}`" if after else f"without `{before}`"
                found[key] = Mutant(exercise, name, line + getattr(place.node, "lineno", top.lineno), text)


def _simplified(source: str) -> str:
    """The same text for what is the same: `k + 0` and `k`, `k + -1` and `k - 1`."""
    return re.sub(r" [+-] 0(?![\w.])", "", source.replace(" + -", " - ").replace(" - -", " + "))


def _can_be_compiled(source: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(source, "mutant", "exec", annotations.compiler_flag, dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def _replacements(place: Place) -> Iterator[ast.AST | list[ast.stmt]]:
    node = place.node
    if isinstance(node, ast.Constant) and node.value in [one.arg for one in place.function.args.args]:
        return  # an argument's name, for a message
    for operator in EXPRESSIONS.get(type(node), ()):
        yield from operator(node)
    for statement_operator in STATEMENTS.get(type(node), ()):  # type: ignore[arg-type]
        differentiable = place.function.returns is not None and ast.unparse(place.function.returns) == "Tensor"
        for new in statement_operator(node):
            if differentiable or not ast.unparse(new[0] if new else ast.Pass()).endswith(".detach()"):
                yield new
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield from (ast.Name(other, ast.Load()) for other in _like(place.function, node.id))
    if isinstance(node, ast.FunctionDef) and node.decorator_list:
        kept = [one for one in node.decorator_list if "no_grad" not in ast.unparse(one)]
        if kept != node.decorator_list:
            yield ast.FunctionDef(node.name, node.args, node.body, kept, node.returns, lineno=node.lineno)


def _like(function: ast.FunctionDef, name: str) -> list[str]:
    """The other arguments of the same type."""
    arguments = function.args.args + function.args.kwonlyargs
    kinds = {one.arg: ast.unparse(one.annotation) for one in arguments if one.annotation is not None}
    return [other for other in kinds if name in kinds and other != name and kinds[other] == kinds[name]]


def _places(tree: ast.Module, blank: tuple[str, ...]) -> Iterator[Place]:
    """Everything in the bodies that the learner writes."""
    top = tree.body[0]
    inside = top.body if isinstance(top, ast.ClassDef) else tree.body
    parent: ast.AST = top if isinstance(top, ast.ClassDef) else tree
    for index, one in enumerate(inside):
        if isinstance(one, ast.FunctionDef) and (not blank or one.name in blank):
            yield Place(one, parent, "body", index, (), one)
            for at, statement in enumerate(one.body):
                yield from _below(Place(statement, one, "body", at, (), one))


def _below(place: Place) -> Iterator[Place]:
    node = place.node
    if isinstance(node, NOT_WRITTEN):
        return
    yield place
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "format_spec", "ctx", "op", "ops"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not (isinstance(node, ast.UnaryOp) and isinstance(child, ast.Constant)):
                yield from _below(Place(child, node, field, index, (*place.above, node), place.function))


def _put(place: Place, new: ast.AST | list[ast.stmt]) -> Callable[[], None]:
    """Put it there; returns what puts the old one back."""
    parent, field, index, old = place.parent, place.field, place.index, place.node
    if index is None:
        setattr(parent, field, new)
        return lambda: setattr(parent, field, old)
    items = getattr(parent, field)
    whole = list(items)
    items[index : index + 1] = new if isinstance(new, list) else [new]

    def put_back() -> None:
        items[:] = whole

    return put_back


def _code(place: Place, node: ast.AST | list[ast.stmt], shown: ast.AST | None = None) -> tuple[str, ast.AST | None]:
    """The code around the node that is short enough to show, and what it is; `shown` is what was shown before."""
    if isinstance(place.node, ast.FunctionDef):
        return ("@torch.no_grad()" if node is place.node else ""), None
    if shown is not None and shown is not place.node:
        return _line(shown), shown
    if isinstance(node, list):
        text = "; ".join(_line(one) for one in node)
        return ("" if text in ("", "pass") else text), None
    for around in place.above if shown is None else ():
        alone = isinstance(around, ast.expr | ast.Assign | ast.AugAssign | ast.Return | ast.Expr)
        if alone and len(ast.unparse(around)) <= LONGEST:
            return _line(around), around
    return _line(node), place.node


def _line(node: ast.AST) -> str:
    """The code in one line; of a statement with others in it, the first line and the last."""
    code = re.sub(r"\braise (\w+)\(.*", r"raise \1(...)", ast.unparse(node))
    lines = [line.strip() for line in code.splitlines()]
    return " ".join(_short(line) for line in (lines if len(lines) < 3 else [lines[0], "...", lines[-1]]))


def _short(line: str) -> str:
    return line if len(line) <= 2 * LONGEST else line[: 2 * LONGEST] + " ..."


def _without_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
