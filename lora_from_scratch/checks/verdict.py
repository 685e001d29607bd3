"""What a check says: the verdict, as data, as plain text and as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lora_from_scratch.checks.observation import Data, Opaque

SHOWN = 12  # a tensor of at most so many entries is shown whole


@dataclass(frozen=True)
class CaseResult:
    name: str
    part: str
    right: bool


@dataclass(frozen=True)
class Failure:
    """The first case that failed: what went in, what came out, and what kind of thing should have."""

    case: str
    inputs: Mapping[str, str]
    got: str
    expected: str
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
    if isinstance(value, Tensor):
        kind = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        if value.numel() <= SHOWN:
            return f"{_numbers(value.tolist())}, {kind}"
        if value.is_floating_point() or not value.is_complex():
            low, high = value.double().min().item(), value.double().max().item()
            return f"tensor {kind}, from {low:.4g} to {high:.4g}"
        return f"tensor {kind}"
    if isinstance(value, Opaque):
        return f"a {value!s}"
    if isinstance(value, list):
        return "[" + ", ".join(describe(item) for item in value[:6]) + (", ...]" if len(value) > 6 else "]")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in list(value.items())[:6]) + "}"
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def _numbers(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_numbers(item) for item in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
