"""The verdict of a check as data, and descriptions of values for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_from_scratch.checks.observation import Data, Opaque

MAX_ENTRIES_SHOWN = 12  # a tensor with more entries is described by its shape, dtype and range
LONGEST = 600  # maximum number of characters in a description
MAX_ITEMS = 60  # items visited for one description
LARGEST_SHOWN = 10**60  # larger integers are described by their size; Python limits int-to-str conversion anyway


@dataclass(frozen=True)
class CaseResult:
    name: str
    part: str
    right: bool
    tried: bool = True  # False if an earlier case ran out of time


@dataclass(frozen=True)
class Failure:
    """The first case that failed: its inputs, what the answer gave, and what was expected."""

    case: str
    inputs: Mapping[str, str]
    got: str
    expected: str  # the value or its kind; empty if `got` is a record made by the probe
    printed: str = ""  # the beginning of what the answer printed
    sentence: str = ""  # of the statement, which the case tests


@dataclass(frozen=True)
class Verdict:
    """The verdict on an answer.

    Attributes:
        status: "passed", "failed", "stopped" (out of time), "not started", "missing" (the notebook has no such
            function), "library" (it is the library's own version), "unknown" (no such exercise) or "broken" (the check
            itself failed).
        misconception: the name of the mistake; "" if there is none or it is not known.
        message: what is wrong, in words for the learner.
    """

    exercise: str
    status: str
    points: float
    max_points: float
    cases: tuple[CaseResult, ...] = ()
    seed: int = 0
    failure: Failure | None = None
    misconception: str = ""
    message: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def describe(value: Data) -> str:
    """Describe a value in a few lines at most: a small one in full, a large one by its shape, dtype and range."""
    return _describe(value, [MAX_ITEMS])


def _describe(value: Data, room: list[int]) -> str:
    """`room` holds how many more items may be visited: nested values could otherwise take exponentially many."""
    room[0] -= 1
    text = _in_words(value, room) if room[0] >= 0 else "..."
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def _in_words(value: Data, room: list[int]) -> str:
    if isinstance(value, Tensor):
        return _describe_tensor(value)
    if isinstance(value, Opaque):
        return f"a {value!s}"
    if isinstance(value, list) and any(isinstance(item, Tensor | list | dict) for item in value):
        results = without_dtypes(value)
        more = "; ..." if len(results) > 6 else ""
        count = f"{len(results)} results: " if len(results) > 1 or len(value) == 1 else ""
        return count + "; ".join(_describe(item, room) for item in results[:6]) + more
    if isinstance(value, list):
        return "[" + ", ".join(_describe(item, room) for item in value[:6]) + (", ...]" if len(value) > 6 else "]")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key[:200]}: {_describe(item, room)}" for key, item in list(value.items())[:6]) + "}"
    if isinstance(value, int) and abs(value) >= LARGEST_SHOWN:
        return f"a whole number of {value.bit_length():,} bits"
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def without_dtypes(results: list[Data]) -> list[Data]:
    """The learner's own results, without the dtype names ("uint8") that probes add where the dtype matters."""
    return [result for result in results if not is_dtype(result)]


def is_dtype(value: Data) -> bool:
    """Whether it is the name of a dtype, "uint8"."""
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _describe_tensor(value: Tensor) -> str:
    kind = f"shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if value.numel() <= MAX_ENTRIES_SHOWN and all(size <= MAX_ENTRIES_SHOWN for size in value.shape):
        return f"{_numbers(value.tolist())} ({kind})"
    if value.is_complex():
        return f"a tensor ({kind})"
    finite = value.double()[value.isfinite()]
    strange = value.numel() - finite.numel()
    odd = f", {strange} of them NaN or infinite" if strange else ""
    between = f", from {finite.min():.4g} to {finite.max():.4g}" if finite.numel() else ""
    return f"{value.numel():,} numbers ({kind}{between}{odd})"


def _numbers(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_numbers(item) for item in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
