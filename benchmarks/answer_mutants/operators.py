"""What can be changed at one place of a program: expressions.

Each operator takes a node of the syntax tree and yields the nodes that may take its place. The nodes that it yields
share parts with the one that it was given; nobody changes them, they are only written out.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

MODULES = {"torch", "F", "nn", "math", "np", "mmap", "adapter_files", "dataclasses", "random"}

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq, ast.GtE, ast.LtE),
    ast.NotEq: (ast.Eq, ast.Gt),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}

ARITHMETIC: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div, ast.Add),
    ast.Div: (ast.Mult, ast.FloorDiv),
    ast.FloorDiv: (ast.Mult, ast.Mod),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.MatMult: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd, ast.BitXor),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
}
NOT_COMMUTATIVE = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)

# Functions, methods and attributes that are mistaken for each other.
OTHER_NAMES = {
    "sum": ("mean",),
    "mean": ("sum",),
    "max": ("min",),
    "min": ("max",),
    "amax": ("amin",),
    "argmax": ("argmin",),
    "argmin": ("argmax",),
    "any": ("all",),
    "all": ("any",),
    "zeros": ("ones",),
    "ones": ("zeros",),
    "zeros_like": ("ones_like",),
    "new_zeros": ("new_ones",),
    "randn": ("rand",),
    "softmax": ("log_softmax",),
    "log_softmax": ("softmax",),
    "exp": ("expm1",),
    "log": ("log2",),
    "sqrt": ("square",),
    "cos": ("sin",),
    "tanh": ("sigmoid",),
    "cumsum": ("cumprod",),
    "double": ("float",),
    "float": ("double",),
    "float64": ("float32",),
    "float32": ("float64", "bfloat16"),
    "int64": ("int32",),
    "int8": ("int16",),
    "uint8": ("int8",),
    "dtype": (),
    "element_size": ("numel",),
    "numel": ("element_size",),
    "endswith": ("startswith",),
    "startswith": ("endswith",),
    "rpartition": ("partition",),
    "partition": ("rpartition",),
    "removeprefix": ("removesuffix", "lstrip"),
    "removesuffix": ("removeprefix", "rstrip"),
    "detach": ("clone",),
    "clone": ("detach",),
    "floor": ("ceil",),
    "ceil": ("floor",),
    "round": ("floor",),
    "svdvals": (),
    "in_features": ("out_features",),
    "out_features": ("in_features",),
    "named_modules": ("named_children",),
    "named_parameters": ("named_buffers",),
    "parameters": ("buffers",),
    "masked_fill": ("masked_fill_",),
    "chunk": ("split",),
    "split": ("chunk",),
    "repeat_interleave": ("repeat",),
    "repeat": ("repeat_interleave",),
    "outer": ("mul",),
    "inner": ("mul",),
    "vstack": ("hstack",),
    "stack": ("cat",),
    "cat": ("stack",),
    "tril": ("triu",),
    "triu": ("tril",),
    "view": ("reshape",),
    "reshape": ("view",),
    "extend": ("append",),
    "Sequential": (),
    "Identity": ("Tanh",),
    "Tanh": ("ReLU",),
    "ndim": (),
    "T": (),
    "mT": (),
}


def number(node: ast.AST) -> int | float | None:
    """The number that is written there, with its sign; None if it is something else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = number(node.operand)
        return None if inner is None else -inner
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    return None


def constant(value: object) -> ast.expr:
    """Written as in a program: a negative number is a minus and a number."""
    return ast.parse(repr(value), mode="eval").body


def numbers(node: ast.expr) -> Iterator[ast.expr]:
    value = number(node)
    if isinstance(value, int):
        for other in dict.fromkeys((value + 1, value - 1, 0, 1, -value)):
            if other != value:
                yield constant(other)
    elif value is not None:
        for scale in (2, 0.5, 0, 1.001):
            yield constant(value * scale)


def constants(node: ast.Constant) -> Iterator[ast.expr]:
    if isinstance(node.value, bool):
        yield constant(not node.value)
    elif isinstance(node.value, str) and node.value:
        yield from (constant(text) for text in (node.value[1:], node.value[:-1], node.value + node.value[-1]))


def comparisons(node: ast.Compare) -> Iterator[ast.expr]:
    for place, op in enumerate(node.ops):
        for other in COMPARISONS[type(op)]:
            yield ast.Compare(node.left, [*node.ops[:place], other(), *node.ops[place + 1 :]], node.comparators)
    sides = [node.left, *node.comparators]
    if len(node.ops) > 1:
        yield ast.Compare(node.left, node.ops[:-1], node.comparators[:-1])
        yield ast.Compare(sides[1], node.ops[1:], sides[2:])
    elif isinstance(sides[1], ast.Constant) and sides[1].value is None:  # `is None` becomes a question of truth
        yield ast.UnaryOp(ast.Not(), node.left) if isinstance(node.ops[0], ast.Is) else node.left


def sums(node: ast.BinOp) -> Iterator[ast.expr]:
    for other in ARITHMETIC[type(node.op)]:
        yield ast.BinOp(node.left, other(), node.right)
    if isinstance(node.op, NOT_COMMUTATIVE):
        yield ast.BinOp(node.right, node.op, node.left)
    if not (isinstance(node.op, ast.Mult) and isinstance(node.left, ast.List)):
        yield from (node.left, node.right)


def booleans(node: ast.BoolOp) -> Iterator[ast.expr]:
    yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    for place in range(len(node.values)):
        rest = node.values[:place] + node.values[place + 1 :]
        yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def signs(node: ast.UnaryOp) -> Iterator[ast.expr]:
    if number(node) is None:
        yield node.operand


def choices(node: ast.IfExp) -> Iterator[ast.expr]:
    yield from (node.body, node.orelse, ast.IfExp(node.test, node.orelse, node.body))


def subscripts(node: ast.Subscript) -> Iterator[ast.expr]:
    if isinstance(node.ctx, ast.Load):
        yield node.value
    if isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
        swapped = ast.Tuple(node.slice.elts[::-1], ast.Load())
        yield ast.Subscript(node.value, swapped, node.ctx)
    elif not isinstance(node.slice, ast.Slice | ast.Tuple | ast.Constant) and number(node.slice) is None:
        yield from (ast.Subscript(node.value, one, node.ctx) for one in shifted(node.slice))


def slices(node: ast.Slice) -> Iterator[ast.expr]:
    for field in ("lower", "upper", "step"):
        if (bound := getattr(node, field)) is not None:
            for other in (None, *shifted(bound)):
                one = ast.Slice(node.lower, node.upper, node.step)
                setattr(one, field, other)
                yield one


def shifted(node: ast.expr) -> tuple[ast.expr, ...]:
    """One more, and one less; numbers are changed where they stand."""
    if number(node) is not None or isinstance(node, ast.Tuple | ast.List | ast.Compare | ast.Starred):
        return ()
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub) and number(node.right) is not None:
        return ()
    return (ast.BinOp(node, ast.Add(), constant(1)), ast.BinOp(node, ast.Sub(), constant(1)))


def calls(node: ast.Call) -> Iterator[ast.expr]:
    function, arguments = node.func, node.args
    name = function.id if isinstance(function, ast.Name) else ""
    if isinstance(function, ast.Attribute) and not (_root(function) in MODULES or isinstance(function.value, ast.Call)):
        yield function.value  # without the method
    elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Call):
        yield function.value
    if len(arguments) >= 1 and name not in ("super", "hasattr", "range", "isinstance"):
        yield arguments[0]  # without the function
    for place in range(0 if name in ("min", "max") else len(arguments) - 1):
        swapped = [*arguments[:place], arguments[place + 1], arguments[place], *arguments[place + 2 :]]
        yield ast.Call(function, swapped, node.keywords)
    for place in range(len(node.keywords)):
        yield ast.Call(function, arguments, node.keywords[:place] + node.keywords[place + 1 :])
    if len(arguments) >= 2:
        yield ast.Call(function, arguments[:-1], node.keywords)
    if name == "range":
        for place, argument in enumerate(arguments):
            for other in shifted(argument):
                yield ast.Call(function, [*arguments[:place], other, *arguments[place + 1 :]], node.keywords)
    if name in ("float", "int", "bool", "str"):
        return
    for other_name in OTHER_NAMES.get(name, ()):
        yield ast.Call(ast.Name(other_name, ast.Load()), arguments, node.keywords)


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def attributes(node: ast.Attribute) -> Iterator[ast.expr]:
    for other in OTHER_NAMES.get(node.attr, ()):
        yield ast.Attribute(node.value, other, node.ctx)
    if node.attr in ("T", "mT"):
        yield node.value
    if node.attr == "scaling" and isinstance(node.ctx, ast.Load):  # worked out again from what it once came from
        alpha, rank = (ast.Attribute(node.value, name, node.ctx) for name in ("alpha", "rank"))
        yield ast.BinOp(alpha, ast.Div(), rank)


def tuples(node: ast.Tuple | ast.List) -> Iterator[ast.expr]:
    if isinstance(node.ctx, ast.Load):
        for place in range(len(node.elts) - 1):
            e = node.elts
            yield type(node)([*e[:place], e[place + 1], e[place], *e[place + 2 :]], node.ctx)
        if len(node.elts) > 1 and any(isinstance(one, ast.Starred) for one in node.elts):
            yield from (type(node)(node.elts[:p] + node.elts[p + 1 :], node.ctx) for p in range(len(node.elts)))


def comprehensions(node: ast.ListComp | ast.GeneratorExp | ast.DictComp | ast.SetComp) -> Iterator[ast.expr]:
    for place, loop in enumerate(node.generators):
        for at, test in enumerate(loop.ifs):
            rest = loop.ifs[:at] + loop.ifs[at + 1 :]
            for ifs in (rest, [*rest, ast.UnaryOp(ast.Not(), test)]):
                other = ast.comprehension(loop.target, loop.iter, ifs, 0)
                yield _with_loops(node, [*node.generators[:place], other, *node.generators[place + 1 :]])
        other = ast.comprehension(loop.target, backwards(loop.iter), loop.ifs, 0)
        yield _with_loops(node, [*node.generators[:place], other, *node.generators[place + 1 :]])


def _with_loops(node: ast.expr, loops: list[ast.comprehension]) -> ast.expr:
    if isinstance(node, ast.DictComp):
        return ast.DictComp(node.key, node.value, loops)
    assert isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp)
    return type(node)(node.elt, loops)


def backwards(node: ast.expr) -> ast.expr:
    """The same items from the last to the first."""
    items = ast.Call(ast.Name("list", ast.Load()), [node], [])
    return ast.Call(ast.Name("reversed", ast.Load()), [items], [])


EXPRESSIONS: dict[type[ast.AST], tuple[Callable[..., Iterator[ast.expr]], ...]] = {
    ast.Constant: (numbers, constants),
    ast.Compare: (comparisons,),
    ast.BinOp: (sums,),
    ast.BoolOp: (booleans,),
    ast.UnaryOp: (numbers, signs),
    ast.IfExp: (choices,),
    ast.Subscript: (subscripts,),
    ast.Slice: (slices,),
    ast.Call: (calls,),
    ast.Attribute: (attributes,),
    ast.Tuple: (tuples,),
    ast.List: (tuples,),
    ast.ListComp: (comprehensions,),
    ast.GeneratorExp: (comprehensions,),
    ast.DictComp: (comprehensions,),
    ast.SetComp: (comprehensions,),
}
