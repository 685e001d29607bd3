"""Why a mutant that no check catches is right: `explained/unit_NN.toml`, a list of entries for each exercise.

    [[row_echelon]]
    reason = "The rows below the pivot are zero but for rounding either way."
    mutants = ['''`echelon[k + 1:, k] = 0` -> `echelon[k + 2:, k] = 0`''']   # their names
    matching = ['device=']                                                # regular expressions that occur in names

An entry without a mutant that survives is refused.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from benchmarks.answer_mutants.judging import Outcome

FOLDER = Path(__file__).with_name("explained")


def entries(unit: str) -> dict[str, list[dict]]:
    """By exercise."""
    file = FOLDER / f"unit_{unit}.toml"
    if not file.exists():
        return {}
    return tomllib.loads(file.read_text(encoding="utf-8"))


def explained(found: Iterable[Outcome], listed: list[dict]) -> tuple[set[str], list[str]]:
    """The names of an exercise's survivors that are explained, and what explains nothing.

    Raises:
        ValueError: an entry has no reason.
    """
    found = list(found)
    survivors = [one.mutant.name for one in found if one.survives]
    stopped = [one.mutant.name for one in found if one.stopped]  # on a busy machine also one that is right
    names: set[str] = set()
    stale = []
    for entry in listed:
        if not entry.get("reason"):
            raise ValueError(f"an entry has no reason: {entry}")
        exact = [(text, re.escape(text) + r"\Z") for text in entry.get("mutants", [])]
        for text, pattern in exact + [(f".*{text}", f".*{text}") for text in entry.get("matching", [])]:
            matched = {name for name in survivors if re.match(pattern, name)}
            names |= matched
            if not matched and not any(re.match(pattern, name) for name in stopped):
                stale.append(text.removeprefix(".*"))
    return names, stale
