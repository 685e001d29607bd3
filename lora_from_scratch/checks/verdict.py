"""What a check says: the verdict, as data, as plain text and as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_from_scratch.checks.observation import Data, Opaque

SHOWN = 12  # a tensor of at most so many entries is shown whole
LONGEST = 600  # characters of a description
MOST_THINGS = 60  # that are looked at for a description
LARGEST_SHOWN = 10**60  # Python itself refuses to write out whole numbers of some thousand digits


@dataclass(frozen=True)
class CaseResult:
    name: str
    part: str
    right: bool
    tried: bool = True  # False: an earlier one did not end in time


@dataclass(frozen=True)
class Failure:
    """The first case that failed: what went in, what came out, and what kind of thing should have."""

    case: str
    inputs: Mapping[str, str]
    got: str
    expected: str  # what kind of thing; empty where `got` is what the probe recorded
    printed: str = ""  # what the answer printed meanwhile, its beginning


@dataclass(frozen=True)
class Verdict:
    """What is said of an answer.

    Attributes:
        status: "passed", "failed", "stopped" (out of time), "not started", "missing" (the notebook has no such
            function), "library" (it is the library's own version), "unknown" (no such exercise) or "broken" (the check
            itself failed).
        misconception: the name of what is wrong; "" when nothing is, or nothing can be said.
        message: the same in words.
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
    """A value in at most a few lines: small ones whole, large ones by shape, dtype and range."""
    return _describe(value, [MOST_THINGS])


def _describe(value: Data, room: list[int]) -> str:
    """`room` holds how many more things may be looked at: a nested value can name six things six times over."""
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
    """What the learner's code returned: where the dtype counts, the probe adds its name ("uint8")."""
    return [r for r in results if not (isinstance(r, str) and isinstance(getattr(torch, r, None), torch.dtype))]


def _describe_tensor(value: Tensor) -> str:
    kind = f"shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if value.numel() <= SHOWN and all(size <= SHOWN for size in value.shape):
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
