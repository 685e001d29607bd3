"""What the general rules say of a wrong result is true of it, whatever the two values are."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.diagnosis import RULES
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.checks.relation import RELATIONS, relation

ENTRIES = st.sampled_from([0.0, 0.0, 1.0, 1.0, -1.0, 2.0, 3.0, 0.5, 7.25, 1e-9, 1e6, float("inf"), float("nan")])
SHAPES = st.sampled_from([(), (1,), (2,), (5,), (2, 2), (3, 3), (2, 3), (2, 2, 2), (2, 3, 3)])
CHANGES: list[Callable[[Tensor], Tensor]] = [
    lambda e: -e,
    lambda e: 2 * e,
    lambda e: e / 3,
    lambda e: 1.01 * e,
    lambda e: 1.00001 * e,
    lambda e: e + 1,
    lambda e: e - 1e-3,
    lambda e: 1 - e,
    torch.square,
    torch.sqrt,
    torch.reciprocal,
    torch.log,
    torch.exp,
    torch.abs,
    torch.zeros_like,
    lambda e: e.mT if e.ndim > 1 else e.flip(0) if e.ndim else e,
    lambda e: e.flip(-1) if e.ndim else e,
    lambda e: e.flatten().roll(1).view(e.shape),
    lambda e: e.masked_fill(e == 0, 5.0),
    lambda e: e.nan_to_num(0, 0, 0),
    lambda e: torch.where(torch.arange(e.numel()).view(e.shape) % 3 == 0, e + 4, e),
]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A wrong result and the right one of the same shape; mostly the wrong one is made from the right one."""
    shape = draw(SHAPES)
    count = int(np.prod(shape))
    expected = torch.tensor(draw(st.lists(ENTRIES, min_size=count, max_size=count)), dtype=torch.float64).view(shape)
    if draw(st.booleans()):
        unrelated = draw(st.lists(ENTRIES, min_size=count, max_size=count))
        return torch.tensor(unrelated, dtype=torch.float64).view(shape), expected
    seen = draw(st.sampled_from(CHANGES))(expected)
    return (draw(st.sampled_from(CHANGES))(seen) if draw(st.booleans()) else seen), expected


def equal(one: Any, other: Any, size: float = 1e-4) -> bool:
    """Up to a share of the largest finite entry."""
    one, other = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    finite = np.abs(other[np.isfinite(other)])
    scale = finite.max() if finite.size else 0.0
    with np.errstate(invalid="ignore"):
        return bool(
            np.all((one == other) | (np.abs(one - other) <= size * scale + 1e-12) | (one != one) & (other != other))
        )


def number_in(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(Fraction(found[1]))


def factor_holds(text: str, s: np.ndarray, e: np.ndarray) -> bool:
    return equal(s, number_in(text, r"is (\S+) times") * e, 1e-3)  # the factor is shown with four digits


def offset_holds(text: str, s: np.ndarray, e: np.ndarray) -> bool:
    by = number_in(text, r"is (\S+) too") * (1 if "too large" in text else -1)
    return bool(np.allclose(s - e, by, rtol=1e-3, atol=1e-4 * np.abs(e).max()))


def function_holds(text: str, s: np.ndarray, e: np.ndarray) -> bool:
    functions: dict[str, Callable] = {
        "the square of": lambda x: x * x,
        "the square root of": np.sqrt,
        "one divided by": lambda x: 1 / x,
        "the logarithm of": np.log,
        "the exponential of": np.exp,
        "the absolute value of": np.abs,
    }
    [function] = [function for name, function in functions.items() if f"is {name} what" in text]
    return equal(s, function(e))


def order_holds(text: str, s: np.ndarray, e: np.ndarray) -> bool:
    if "reverse" in text:
        axis = int(number_in(text, r"axis (\d+)")) if "axis" in text else 0
        return equal(s, np.flip(e, axis))
    return equal(np.sort(s, axis=None), np.sort(e, axis=None))


def transposed_holds(text: str, s: np.ndarray, e: np.ndarray) -> bool:
    axes = re.search(r"axes (\d) and (\d)", text)
    return equal(s, np.swapaxes(e, int(axes[1]), int(axes[2])) if axes else e.T)


def close_holds(text: str, s: np.ndarray, e: np.ndarray) -> bool:
    share = number_in(text, r"at most (\S+) %") / 100
    return float(np.abs(s - e).max()) <= 1.1 * share * float(np.abs(e).max()) and share <= 0.02


def some_holds(text: str, s: np.ndarray, e: np.ndarray) -> bool:
    finite = np.abs(e[np.isfinite(e)])
    with np.errstate(invalid="ignore"):
        near = np.abs(s - e) <= 1e-4 * (finite.max() if finite.size else 0) + 1e-12
    right = (s == e) | near | ((s != s) & (e != e))
    only = re.search(r"only at index (\d+) of axis (\d+)", text)
    if only:
        index, axis = int(only[1]), int(only[2])
        elsewhere = np.delete(right, index, axis)
        return bool(elsewhere.all()) and not np.take(right, index, axis).all()
    wrong, count = re.search(r"in (\d+) of its (\d+)", text).groups()  # type: ignore[union-attr]
    first = tuple(int(one) for one in re.search(r"is \[(.*)\]", text)[1].split(","))  # type: ignore[index]
    return (int(wrong), int(count)) == ((~right).sum(), right.size) and first == tuple(np.argwhere(~right)[0])


HOLDS: dict[str, Callable[[str, np.ndarray, np.ndarray], bool]] = {
    "sign": lambda text, s, e: equal(s, -e),
    "zero": lambda text, s, e: not s.any() and not equal(s, e),
    "factor": factor_holds,
    "offset": offset_holds,
    "inverted": lambda text, s, e: bool(np.all(s == 1 - e)) and set(e.flatten()) <= {0, 1},
    "function": function_holds,
    "order": order_holds,
    "transposed": transposed_holds,
    "close": close_holds,
    "some entries": some_holds,
}


@given(pairs())
def test_what_is_said_of_two_tensors_is_true(pair: tuple[Tensor, Tensor]) -> None:
    seen, expected = pair
    if same(seen, expected) or (found := relation(seen, expected)) is None:
        return
    assert HOLDS[found[0]](found[1], seen.numpy(), expected.numpy()), found[1]


@pytest.mark.parametrize(
    ("seen", "expected", "said"),
    [
        ([2.0, 4.0], [1.0, 2.0], "is 2 times what it should be in every entry"),
        ([1.0, 2.0], [3.0, 6.0], "is 1/3 times"),
        (6, 3, "is 2 times what it should be:"),
        (7, 6, "is 1 too large."),
        (5.0, 6.0, "is 1 too small."),
        ([4.0, 5.0], [1.0, 2.0], "is 3 too large in every entry"),
        ([1.0, 4.0, 9.0], [1.0, 2.0, 3.0], "is the square of what it should be"),
        ([3.0, 1.0, 2.0], [2.0, 1.0, 3.0], "in reverse order"),
        ([3.0, 1.0, 2.0], [1.0, 2.0, 3.0], "not in the right places"),
        ([0.0, 0.0], [1.0, 2.0], "has zeros only"),
        (0, 4, "is 0, and should not be"),
        ([True, False, False], [False, True, True], "the wrong way round"),
        ([1.0, 2.0, 9.0], [1.0, 2.0, 3.0], "is wrong in 1 of its 3 entries, of which the first is [2]"),
        ([[1.0, 2.0], [3.0, 4.0]], [[1.0, 3.0], [2.0, 4.0]], "is transposed"),
        ([[1.0, 2.0], [8.0, 9.0]], [[1.0, 2.0], [3.0, 4.0]], "is wrong only at index 1 of axis 0"),
        ([1.0, 2.0, 3.01], [1.0, 2.0, 3.0], "off by at most 0.33 % of the largest entry"),
    ],
)
def test_the_relation_is_found(seen: Any, expected: Any, said: str) -> None:
    values = [torch.tensor(one) if isinstance(one, list) else one for one in (seen, expected)]
    found = relation(*values)
    assert found is not None
    assert said in found[1]


@pytest.mark.parametrize(
    ("seen", "expected", "said"),
    [
        ([0, 2], [0, 1, 2], "lacks 1 of the 3 items that it should have."),
        ([0, 1, 3], [0, 1], "has 3, which should not be in it."),
        (["a", "c"], ["a", "b"], "lacks 1 of the 2 items that it should have and has 'c', which should not be in it."),
        (["b", "a"], ["a", "b"], "has the right items in another order."),
        ([1, 1], [1, 1, 1], "should have 3 entries, but has 2."),
        ("one two\n", "one two", "has something after the end of the right text: the characters are 1 too many."),
        ("one two", "one two three", "lacks the end of the right text: the characters are 6 too few."),
        ("one too", "one two", "is right up to 'one t', and then goes on with another text."),
        ("two one", "one two", "does not begin like the right text."),
        (False, True, "should be True, but is False."),
    ],
)
def test_what_is_said_of_lists_and_texts(seen: Data, expected: Data, said: str) -> None:
    found = relation(seen, expected)
    assert found is not None
    assert found[1] == said


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([0.0, 1.0, 6.0], [0.0, 0.0, 3.0]),  # something else where zero is expected
        ([5.0, 1.0, 6.0], [0.0, 0.0, 3.0]),
        ([float("inf"), 6.0, 2.0], [1.0, 3.0, 1.0]),
    ],
)
def test_a_constant_factor_is_not_said_where_zeros_are_expected_and_something_else_is(
    seen: list, expected: list
) -> None:
    found = relation(torch.tensor(seen), torch.tensor(expected))
    assert found is None or found[0] != "factor"


def diagnosis(seen: Data, expected: Data) -> tuple[str, str]:
    return next(found for rule in RULES if (found := rule(Seen(seen), Seen(expected))) is not None)


def test_the_part_that_is_wrong_is_named() -> None:
    right: Data = [torch.ones(2), {"bias": torch.arange(3.0), "kept": True}]
    wrong: Data = [torch.ones(2), {"bias": 2 * torch.arange(3.0), "kept": True}]
    assert diagnosis(wrong, right)[1].startswith("Result 2, `bias` is 2 times what it should be in every entry")
    assert diagnosis([torch.ones(2), {"bias": torch.arange(3.0), "kept": False}], right) == (
        "yes or no",
        "Result 2, `kept` should be True, but is False.",
    )


@pytest.mark.parametrize(
    ("seen", "expected", "name", "said"),
    [
        ([None, 1.0], [torch.ones(2), 1.0], "another type", "Result 1 should be a tensor of shape (2,), but is None."),
        ({"a": 1}, {"a": 1, "b": 2}, "keys", "The result lacks the key 'b'."),
        ({"a": 1, "c": 2}, {"a": 1}, "keys", "The result has the key 'c', which should not be there."),
        ([1.0, [1, 2]], [1.0, [1, 2, 3]], "items", "Result 2 lacks 1 of the 3 items that it should have."),
        ([torch.ones(1), "float32"], [torch.ones(1), "float64"], "dtype", "The values are right, but the dtype should"),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1), "int8"], "number of results", "should be 2 results, but"),
        ([torch.ones(2), 3], [torch.ones(2, 1), 3], "shape", "The shape of result 1 should be (2, 1), but is (2,)."),
        (torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf, 1.0]), "not finite", "The result has entries"),
    ],
)
def test_what_is_said_of_types_keys_and_shapes(seen: Data, expected: Data, name: str, said: str) -> None:
    assert diagnosis(seen, expected)[0] == name
    assert said in diagnosis(seen, expected)[1]


def test_an_error_outside_the_learners_lines_is_not_called_theirs() -> None:
    error = ("AttributeError", "Exception")
    [rule, *_] = RULES
    outside = rule(Seen(errors=error, message="no attribute 'merge'"), Seen(1))
    inside = rule(Seen(errors=error, message="no attribute 'merge'", where="merge, line 3"), Seen(1))
    assert outside is not None
    assert inside is not None
    assert outside[1].startswith("Outside your own lines")
    assert inside[1].startswith("Your code raised AttributeError (in merge, line 3)")


def test_every_relation_has_a_test_of_its_truth() -> None:
    assert len(RELATIONS) == len(HOLDS) - 1  # one of them tells transposed from another order
