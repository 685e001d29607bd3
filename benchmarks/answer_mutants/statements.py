"""What can be changed at one place of a program: statements. An operator yields lists of statements for one."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from benchmarks.answer_mutants.operators import ARITHMETIC, backwards

Statements = list[ast.stmt]


def dropped(node: ast.stmt) -> Iterator[Statements]:
    yield [ast.Pass()]


def assignments(node: ast.Assign) -> Iterator[Statements]:
    yield [ast.Pass()]
    target, value = node.targets[0], node.value
    if isinstance(value, ast.BinOp) and isinstance(target, ast.Name) and ast.unparse(value.left) == target.id:
        yield [ast.AugAssign(target, value.op, value.right)]  # in place
    if isinstance(target, ast.Tuple) and len(target.elts) == 2:
        yield [ast.Assign([ast.Tuple(target.elts[::-1], ast.Store())], value, lineno=node.lineno)]
        if isinstance(value, ast.Tuple) and ast.unparse(target.elts[0]) in ast.unparse(value.elts[1]):
            # one after the other
            yield [ast.Assign([t], v, lineno=node.lineno) for t, v in zip(target.elts, value.elts, strict=True)]
    if isinstance(target, ast.Attribute) and target.attr == "data":  # the parameter itself replaced
        yield [ast.Assign([target.value], value, lineno=node.lineno)]
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "nn.Parameter":
        yield [ast.Assign(node.targets, value.args[0], lineno=node.lineno)]


def in_place(node: ast.AugAssign) -> Iterator[Statements]:
    yield [ast.Pass()]
    yield [ast.Assign([node.target], node.value, lineno=node.lineno)]
    for other in ARITHMETIC[type(node.op)]:
        yield [ast.AugAssign(node.target, other(), node.value)]


def conditions(node: ast.If) -> Iterator[Statements]:
    if not (isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.Is | ast.IsNot)):
        yield [ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)]
    yield node.orelse or [ast.Pass()]
    if not isinstance(node.body[-1], ast.Raise):
        yield node.body
    else:
        for other in _raised(node.body[-1]):
            yield [ast.If(node.test, other, node.orelse)]


def _raised(node: ast.Raise) -> Iterator[Statements]:
    """Another exception; or none, and the result is None."""
    if isinstance(node.exc, ast.Call):
        yield [ast.Raise(ast.Call(ast.Name("RuntimeError", ast.Load()), node.exc.args, []), node.cause)]
    yield [ast.Return(None)]


def loops(node: ast.For) -> Iterator[Statements]:
    yield [ast.For(node.target, node.iter, [*node.body, ast.Break()], [], lineno=node.lineno)]
    yield [ast.For(node.target, backwards(node.iter), node.body, node.orelse, lineno=node.lineno)]


def without_with(node: ast.With) -> Iterator[Statements]:
    yield node.body
    for place in range(len(node.items)):
        if rest := node.items[:place] + node.items[place + 1 :]:
            yield [ast.With(rest, node.body, lineno=node.lineno)]


def results(node: ast.Return) -> Iterator[Statements]:
    if node.value is not None:
        yield [ast.Return(None)]
        if not isinstance(node.value, ast.Constant | ast.Tuple | ast.List | ast.Dict | ast.ListComp | ast.DictComp):
            yield [ast.Return(ast.Call(ast.Attribute(node.value, "detach", ast.Load()), [], []))]


def tried(node: ast.Try) -> Iterator[Statements]:
    yield node.body


STATEMENTS: dict[type[ast.stmt], tuple[Callable[..., Iterator[Statements]], ...]] = {
    ast.Expr: (dropped,),
    ast.Break: (dropped,),
    ast.Continue: (dropped,),
    ast.Assign: (assignments,),
    ast.AugAssign: (in_place,),
    ast.AnnAssign: (),
    ast.If: (conditions,),
    ast.For: (loops,),
    ast.With: (without_with,),
    ast.Return: (results,),
    ast.Try: (tried,),
}
