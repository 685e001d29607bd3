"""Replaces `checks.notebook` inside the sandbox, where nothing is judged and nothing is shown.

`stripped` copies this file, fills in `OBJECTS`, and adds `unusable` from the real module.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.observation import plain
from lora_from_scratch.checks.verdict import Verdict, describe

# The module of each exercise of the course, by the exercise's name.
OBJECTS: dict[str, str] = {}

__all__ = ["Exercise", "ModuleType", "Verdict", "describe", "inspect", "plain"]  # what `unusable` needs


class UnknownExerciseError(ValueError):
    """There is no exercise of that name."""


def check(name: str, seed: int | None = None, namespace: Mapping[str, Any] | None = None) -> None:
    """Does nothing: the grader makes the checks, outside the sandbox."""


def hint(name: str) -> None:
    """Does nothing: there is nobody to read it."""


def progress(unit: str | int | None = None) -> None:
    """Does nothing: there is nobody to read it."""


def join(invitation: str, name: str) -> None:
    """Does nothing: there is no network."""


def leave() -> None:
    """Does nothing: there is no network."""


def set_language(code: str) -> None:
    """Does nothing: verdicts are in English here, and translated when they are shown."""


def library(name: str) -> Any:
    """The library's own version, if it is in the sandbox."""
    if name not in OBJECTS:
        raise UnknownExerciseError(f"there is no exercise {name!r}")
    return getattr(importlib.import_module(OBJECTS[name]), name)


def working(name: str, namespace: Mapping[str, Any] | None = None) -> Any:
    """The notebook's own version if there is one, right or wrong, otherwise the library's."""
    names = notebook() if namespace is None else namespace
    own = names.get(name)
    return own if callable(own) else library(name)


def notebook() -> Mapping[str, Any]:
    """The names defined in the notebook."""
    return vars(sys.modules["__main__"])
