"""Keys of everything that the grading of a submission depends on: equal keys mean equal results.

A key has named parts, so that comparing two shows what has changed: "submission:1f... release:88... checks:...".
"""

from __future__ import annotations

import hashlib
import inspect
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_from_scratch.checks import units
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading.submissions.folder import entries, open_plain

PACKAGE = units.PACKAGE.parent
# The library's files on which no verdict depends.
WITHOUT = (
    "cli/",
    "grading/building/",
    "grading/cluster/",
    "grading/intake/",
    "grading/platforms/",
    *(f"grading/{name}.py" for name in ("autograded", "course_folder", "exporters", "feedback", "formgrader", "grade")),
    *(f"grading/{name}.py" for name in ("gradebook", "keys", "late", "marking_run", "pool", "preprocessors")),
    *(f"grading/{name}.py" for name in ("report", "shards", "similarity", "similarity_report", "summary", "tasks")),
    "grading/rubrics.py",
    "grading/teaching.py",
)
LARGEST_FILE = 25_000_000  # bytes; of larger files only the size is used
DIGITS = 16
REASONS = {
    "submission": "handed in again",
    "release": "the released notebook has changed",
    "checks": "the checks have changed",
    "library": "the library or its versions have changed",
    "seed": "the cohort's secret has changed",
    "isolation": "graded with a different isolation",
}


def key_of(submission: Path, course: str) -> str:
    """The key of one submission.

    Args:
        submission: the submitted folder.
        course: the result of `course_key`.
    """
    return f"submission:{_digest(_entries(submission))} {course}"


def course_key(released: Path, unit: Unit, secret: str, isolation: str) -> str:
    """The part of the key that all submissions to a unit share."""
    checks, library = _sources(unit)
    parts = {
        "release": _digest([released.read_bytes()]),
        "checks": _digest(_files(checks)),
        "library": _digest([*_versions(), *_files(library)]),
        "seed": _digest([secret.encode()]),
        "isolation": isolation,
    }
    return " ".join(f"{name}:{value}" for name, value in parts.items())


def why_changed(before: str, now: str) -> str:
    """The differences between two keys in words; "" if there are none."""
    old, new = (dict(part.split(":", 1) for part in key.split() if ":" in part) for key in (before, now))
    if not old:
        return "the previous grading was not finished" if new else ""
    return "; ".join(words for name, words in REASONS.items() if old.get(name) != new.get(name))


def _sources(unit: Unit) -> tuple[list[Path], list[Path]]:
    """The files that define the unit's checks, and all other files of the library on which a verdict depends."""
    name = f"unit_{unit.number}"
    own = {Path(inspect.getfile(exercise.object)).resolve() for exercise in unit.exercises}
    own |= {path.resolve() for path in units.unit_files("*.py", name)}
    package = [path for path in sorted(PACKAGE.rglob("*")) if path.suffix in (".py", ".safetensors", ".json", ".txt")]
    library = [
        path
        for path in package
        if path not in own
        and not path.relative_to(PACKAGE).as_posix().startswith(WITHOUT)
        and not path.parent.match("checks/unit_*")
    ]
    return sorted(own), library


def _versions() -> list[bytes]:
    import numpy
    import torch

    return [platform.python_version().encode(), torch.__version__.encode(), numpy.__version__.encode()]


def _files(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        yield path.name.encode()
        yield hashlib.sha256(path.read_bytes()).digest()


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:DIGITS]


def _entries(folder: Path) -> Iterator[bytes]:
    """The contents of a submitted folder as bytes. No link is followed, and only regular files are opened."""
    if folder.is_symlink():
        yield os.fsencode(os.readlink(folder))
        return
    for entry in entries(folder):
        yield os.fsencode(f"{entry.path} {entry.kind} {entry.detail}")
        if entry.kind == "file" and entry.size > LARGEST_FILE:
            yield str(entry.size).encode()
        elif entry.kind == "file":
            try:
                with open_plain(folder / entry.path) as file:
                    yield hashlib.file_digest(file, "sha256").digest()
            except OSError as error:
                yield type(error).__name__.encode()
