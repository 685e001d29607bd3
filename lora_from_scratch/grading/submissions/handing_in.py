"""Preview what grading will find in a notebook's structure before it is handed in. Nothing is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_from_scratch.grading.graded import Finding
from lora_from_scratch.grading.submissions.definitions import imports_everything, is_python
from lora_from_scratch.grading.submissions.matching import match
from lora_from_scratch.grading.submissions.released import Release, ReleasedCell
from lora_from_scratch.grading.submissions.submission import read


@dataclass(frozen=True)
class Preview:
    """What can be told about a notebook without running it.

    Attributes:
        readable: whether it can be read at all.
        findings: what grading will find, and what it will do about it.
        to_do: what is not written yet, one sentence each.
        written: how many of the exercises, predictions and open questions have been filled in.
        all: how many there are.
    """

    readable: bool
    findings: tuple[Finding, ...]
    to_do: tuple[str, ...] = ()
    written: int = 0
    all: int = 0


def look_at(path: Path, released: Any) -> Preview:
    """Read and match a notebook as grading will.

    Args:
        released: the notebook of the release, read by nbformat.
    """
    submission = read(path)
    if submission.notebook is None:
        return Preview(False, submission.findings)
    matched = match(submission.notebook, released)
    release = Release.of(released)
    places = [*release.solutions, *release.answers]
    to_do = [sentence for place in places if (sentence := _to_do(release, place, matched.notebook))]
    return Preview(True, submission.findings + matched.findings, tuple(to_do), len(places) - len(to_do), len(places))


def _to_do(release: Release, place: ReleasedCell, notebook: Any) -> str:
    """What is missing in one cell of the release; "" if something is written there."""
    own = next(cell for cell in notebook.cells if cell.id == place.cell_id)
    if place.role == "answer":
        empty = own.source.strip() in ("", place.source.strip()) and not own.get("attachments")
        return f"The open question `{place.grade_id}` has no answer yet." if empty else ""
    check = release.check_of(place)
    early = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if check is not None:
        early = early[: next(number for number, cell in enumerate(early) if cell.id == check.cell_id)]
    kinds = [kind for cell in early if (kind := release.kind_of(place.name, cell.source))]
    kind = kinds[-1] if kinds else ""
    if release.is_guess(place):
        return f"You have not made the prediction `{place.name}` yet." if kind in ("", "stub") else ""
    if not kind and any(imports_everything(cell.source) for cell in early):
        return ""
    if not is_python(own.source):
        return f"The cell of `{place.name}` is not valid Python. Run it and fix the error."
    return {
        "real": "",
        "value": "",
        "stub": f"`{place.name}` is not written yet.",
        "library": f"`{place.name}` is the library's version, which earns no points.",
        "": f"No cell above its check defines `{place.name}`.",
    }[kind]
