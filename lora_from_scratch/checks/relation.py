"""How a wrong result relates to the right one: twice as large, in another order, wrong in one row.

Whatever is said here holds of the two values, and of all of their entries. Whether it is the *cause* nobody knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import as_tensor, is_number, same
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.verdict import is_dtype, without_dtypes

Relation = tuple[str, str]  # its name, and a sentence about "The result" or "Result 2"
EXACT = 1e-5  # the largest error, relative to the largest entry, up to which a relation holds
SIMPLE = frozenset({*range(2, 17), 24, 32, 64, 100, 128, 256, 1000, 1024})  # factors that are told of a single number
CLOSE = 0.02  # an error, relative to the largest entry, that may come from rounding or from a constant


def parts(seen: Data, expected: Data, name: str = "") -> Iterator[tuple[str, Data, Data]]:
    """The values at the same place in both, with the place's name: "result 2", "`bias`".

    A list of numbers or names is one value. So are lists of different lengths, and dictionaries with different keys.
    """
    both = isinstance(seen, list) and isinstance(expected, list)
    ours, theirs = (without_dtypes(one) if isinstance(one, list) else [] for one in (expected, seen))
    if both and len(ours) == len(theirs) and not (is_flat(seen) and is_flat(expected)):
        for place, (s, e) in enumerate(zip(theirs, ours, strict=True), 1):
            own = f"result {place}" if len(ours) > 1 else ""
            yield from parts(s, e, f"{name}, {own}" if name and own else name or own)
    elif isinstance(seen, dict) and isinstance(expected, dict) and seen.keys() == expected.keys():
        for key, e in expected.items():
            yield from parts(seen[key], e, f"{name}, `{key}`" if name else f"`{key}`")
    else:
        yield name, seen, expected


def is_flat(value: Data) -> bool:
    """Whether it is a list of numbers or names only: one result, not several."""
    return isinstance(value, list) and all(isinstance(one, bool | int | float | str) for one in value)


def as_numbers(value: Data) -> Tensor | None:
    """A number, or a list of numbers, as a tensor in float64; None for anything else."""
    if is_number(value):
        tensor = as_tensor(value)
        return None if tensor.is_complex() else tensor.double()
    if isinstance(value, list) and value and all(isinstance(one, bool | int | float) for one in value):
        return torch.stack([as_tensor(one).double() for one in value])
    return None


def relation(seen: Data, expected: Data) -> Relation | None:
    """Of a pair that is not the same; None if nothing can be said."""
    if isinstance(seen, bool) and isinstance(expected, bool):
        return "yes or no", f"should be {expected}, but is {seen}."
    if isinstance(seen, str) and isinstance(expected, str):
        return _texts(seen, expected)
    s, e = as_numbers(seen), as_numbers(expected)
    if s is not None and e is not None and s.shape == e.shape and s.numel():
        return next((found for rule in RELATIONS if (found := rule(s, e)) is not None), None)
    if isinstance(seen, list) and isinstance(expected, list) and is_flat(seen) and is_flat(expected):
        return _items(seen, expected) or _length(seen, expected)
    return None


def _texts(seen: str, expected: str) -> Relation | None:
    if is_dtype(expected) or len(expected.split()) < 2:
        return None
    same_until = next((i for i, (s, e) in enumerate(zip(seen, expected, strict=False)) if s != e), None)
    if same_until is None:
        longer = len(seen) > len(expected)
        count = abs(len(seen) - len(expected))
        end = "has something after the end of the right text" if longer else "lacks the end of the right text"
        return "text", f"{end}: the characters are {count} too {'many' if longer else 'few'}."
    if not same_until:
        return "text", "does not begin like the right text."
    before = seen[max(0, same_until - 20) : same_until]
    return "text", f"is right up to {before!r}, and then goes on with another text."


def _items(seen: list, expected: list) -> Relation | None:
    """Lists of names or numbers in which nothing occurs twice."""
    if len(set(seen)) < len(seen) or len(set(expected)) < len(expected):
        return None
    lacking = len([one for one in expected if one not in seen])
    extra = [one for one in seen if one not in expected]
    if not lacking and not extra:
        return "order", "has the right items in another order."
    if len(extra) == len(seen) and seen:
        return None
    lacks = f"lacks {lacking} of the {len(expected)} items that it should have" if lacking else ""
    shown = ", ".join(map(repr, extra[:3])) + (", ..." if len(extra) > 3 else "")
    has = f"has {shown}, which should not be in it" if extra else ""
    return "items", " and ".join(text for text in (lacks, has) if text) + "."


def _length(seen: list, expected: list) -> Relation | None:
    if len(seen) == len(expected):
        return None
    return "length", f"should have {len(expected)} entries, but has {len(seen)}."


def _sign(s: Tensor, e: Tensor) -> Relation | None:
    return ("sign", "has the right magnitude but the opposite sign.") if same(s, -e) else None


def _zero(s: Tensor, e: Tensor) -> Relation | None:
    if s.any() or same(s, e):
        return None
    return "zero", "is 0, and should not be." if s.ndim == 0 else "has zeros only, and should not."


def _factor(s: Tensor, e: Tensor) -> Relation | None:
    """The same factor in every entry. Of a single number, only a simple one: anything is a multiple of anything."""
    if not (s.isfinite().all() and e.isfinite().all()) or not e.any() or not s.any():
        return None
    largest = int(e.abs().argmax())
    ratio = float(s.flatten()[largest] / e.flatten()[largest])
    if not same(s, ratio * e, EXACT) or abs(ratio - 1) < 1e-3:
        return None
    if int(e.count_nonzero()) < 2 and not any(_whole(one) in SIMPLE for one in (abs(ratio), 1 / abs(ratio))):
        return None
    entries = "" if e.ndim == 0 else " in every entry"
    return "factor", (
        f"is {_number(ratio)} times what it should be{entries}: off by a constant factor. "
        "Check what you multiply or divide by, and how often."
    )


def _offset(s: Tensor, e: Tensor) -> Relation | None:
    """The same difference in every entry; of a single whole number, one more or one less."""
    difference = s - e
    if not difference.isfinite().all():
        return None
    by = float(difference.flatten()[0])
    scale = max(float(e.abs().max()), abs(by))
    if float((difference - by).abs().max()) > EXACT * scale or abs(by) < 1e-3 * scale:
        return None
    if e.numel() == 1 and not (abs(by) == 1 and _whole(float(e)) is not None):
        return None
    size = f"{_number(abs(by))} too {'large' if by > 0 else 'small'}"
    return "offset", f"is {size}{'' if e.numel() == 1 else ' in every entry'}."


def _inverted(s: Tensor, e: Tensor) -> Relation | None:
    """Booleans, or zeros and ones."""
    if e.numel() < 2 or not ((e == 0) | (e == 1)).all() or not torch.equal(s, 1 - e):
        return None
    return "inverted", "is the wrong way round: it has 0 (or False) exactly where 1 (or True) should be."


def _function(s: Tensor, e: Tensor) -> Relation | None:
    """The square, the root, the reciprocal or the logarithm of what it should be, if there is more than one number."""
    if e.unique().numel() < 2 or not e.isfinite().all():
        return None
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "the square": torch.square,
        "the square root": torch.sqrt,
        "one divided by": torch.reciprocal,
        "the logarithm": torch.log,
        "the exponential": torch.exp,
        "the absolute value": torch.abs,
    }
    for name, function in functions.items():
        value = function(e)
        if value.isfinite().all() and same(s, value, EXACT):
            return "function", f"is {name}{'' if name.endswith('by') else ' of'} what it should be, in every entry."
    return None


def _order(s: Tensor, e: Tensor) -> Relation | None:
    """The same numbers in other places."""
    for axes in [(-2, -1), (-3, -2)]:
        if e.ndim >= -axes[0] and e.shape[axes[0]] == e.shape[axes[1]] and same(s, e.transpose(*axes), EXACT):
            swapped = "" if e.ndim == 2 else f" in its axes {e.ndim + axes[0]} and {e.ndim + axes[1]}"
            return "transposed", f"is transposed{swapped}: rows and columns are swapped."
    for axis in range(e.ndim):
        if same(s, e.flip(axis), EXACT):
            along = "" if e.ndim == 1 else f" along axis {axis}"
            return "order", f"has the right numbers in reverse order{along}."
    one, other = s.flatten().sort().values, e.flatten().sort().values
    if e.numel() > 1 and e.unique().numel() > 1 and same(one, other, EXACT):
        return "order", "has the right numbers, but not in the right places."
    return None


def _close(s: Tensor, e: Tensor) -> Relation | None:
    """Nearly right, as after rounding or with a constant that is a little off."""
    scale, error = float(e.abs().max()), float((s - e).abs().max())
    whole = not (e.frac().any() or s.frac().any()) if e.isfinite().all() and s.isfinite().all() else True
    if whole or not 0 < error <= CLOSE * scale:
        return None
    return "close", (
        f"is nearly right, off by at most {100 * error / scale:.2g} % of the largest entry, which is too much. Is a "
        "constant not quite right, or something rounded or cut off?"
    )


def _some(s: Tensor, e: Tensor) -> Relation | None:
    """Part of the entries; said if at least a quarter of them is right, or if the wrong ones share a row or column."""
    scale = float(e.nan_to_num(0, 0, 0).abs().max())
    off = ~torch.isclose(s, e, rtol=0, atol=EXACT * 10 * scale + 1e-12, equal_nan=True)
    wrong, count = int(off.sum()), off.numel()
    if not 0 < wrong < count:
        return None
    for axis in range(e.ndim):
        others = tuple(other for other in range(e.ndim) if other != axis)
        along = off.any(dim=others) if others else off
        if int(along.sum()) == 1 and e.shape[axis] > 1 and e.ndim > 1:
            return "some entries", f"is wrong only at index {int(along.nonzero())} of axis {axis}, and right elsewhere."
    if 4 * wrong > 3 * count:
        return None
    first = [int(place) for place in off.nonzero()[0]]
    shown = ", ".join(map(str, first))
    return "some entries", f"is wrong in {wrong} of its {count} entries, of which the first is [{shown}]."


RELATIONS: tuple[Callable[[Tensor, Tensor], Relation | None], ...] = (
    _sign,
    _inverted,
    _zero,
    _factor,
    _offset,
    _function,
    _order,
    _close,
    _some,
)


def _whole(value: float) -> int | None:
    """The whole number that it is, up to rounding."""
    near = round(value) if math.isfinite(value) else 0
    return near if near and abs(value - near) <= 1e-6 * near else None


def _number(value: float) -> str:
    """A factor or a difference, short: "2", "1/3", "0.125"."""
    for negative in ("", "-"):
        size = -value if negative else value
        if size > 0 and _whole(1 / size) and size < 1:
            return f"{negative}1/{_whole(1 / size)}"
    return f"{value:.4g}"
