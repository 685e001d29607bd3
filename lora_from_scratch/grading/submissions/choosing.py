"""Choose which of a learner's notebooks counts: browsers and Jupyter rename them, archives unpack into subfolders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_from_scratch.grading.graded import Finding
from lora_from_scratch.grading.submissions.folder import entries
from lora_from_scratch.grading.submissions.matching import match
from lora_from_scratch.grading.submissions.released import Release
from lora_from_scratch.grading.submissions.submission import Submission, clean, read

MOST_OTHERS = 5  # other notebooks that are read
CHECKPOINTS = ".ipynb_checkpoints"  # Jupyter's copies of earlier versions


def choose(path: Path, below: Path, released: Any) -> tuple[Submission, Path]:
    """The submission and its file: the expected one, unless only another notebook has anything written in it.

    Args:
        path: submitted/LEARNER/unit_NN/unit_NN.ipynb.
        below: see `submission.read`.
        released: the notebook of the release.
    """
    wanted = read(path, below)
    others = _others(path)
    if not others or any(finding.kind == "symbolic link" for finding in wanted.findings):
        return wanted, path
    has_content = is_written(wanted.notebook, released)
    found = {other: read(other, below) for other in others if not (has_content and CHECKPOINTS in other.parts)}
    written = [other for other in found if is_written(found[other].notebook, released)]
    written = [other for other in written if CHECKPOINTS not in other.parts] or written
    if has_content:
        different = [other for other in written if _sources(found[other]) != _sources(wanted)]
        return _with(wanted, _beside(path, different)), path
    if not written and wanted.notebook is None and len(found) == 1:  # the only one there is
        written = list(found)
    if len({_sources(found[other]) for other in written}) == 1:
        return _with(found[written[0]], [_taken(path, written[0])]), written[0]
    if written or wanted.notebook is None:
        there = ", ".join(_named(path, other) for other in written or found)
        message = f"`{path.name}` is empty or missing, and there are other notebooks: {there}."
        message += " It is not clear which one counts; a person will look at it."
        return Submission(wanted.notebook, (*wanted.findings, Finding("which notebook", "human", "", message))), path
    return wanted, path


def is_written(notebook: Any, released: Any) -> bool:
    """Whether the learner has written anything in a solution or answer cell."""
    if notebook is None:
        return False
    cells = {cell.id: cell for cell in match(notebook, released).notebook.cells}
    release = Release.of(released)
    return any(
        cells[place.cell_id].source.strip() not in ("", place.source.strip()) or cells[place.cell_id].get("attachments")
        for place in (*release.solutions, *release.answers)
    )


def _others(path: Path) -> list[Path]:
    found = [path.parent / entry.path for entry in entries(path.parent) if _is_notebook(entry.path, entry.kind)]
    return [other for other in found if other != path][:MOST_OTHERS]


def _is_notebook(path: Path, kind: str) -> bool:
    return kind == "file" and path.suffix == ".ipynb" and "__MACOSX" not in path.parts


def _sources(submission: Submission) -> tuple[str, ...]:
    return tuple(cell.source for cell in submission.notebook.cells) if submission.notebook is not None else ()


def _with(submission: Submission, findings: list[Finding]) -> Submission:
    return Submission(submission.notebook, (*submission.findings, *findings))


def _named(path: Path, other: Path) -> str:
    return f"`{clean(str(other.relative_to(path.parent)))[:80]}`"


def _taken(path: Path, other: Path) -> Finding:
    message = f"Your notebook is called {_named(path, other)}; it should be `{path.name}`. It was graded anyway"
    message += f", because nothing is written in `{path.name}`." if path.exists() else "."
    return Finding("renamed file", "repaired", "", message)


def _beside(path: Path, others: list[Path]) -> list[Finding]:
    if not others:
        return []
    there = ", ".join(_named(path, other) for other in others)
    return [
        Finding("other notebooks", "note", "", f"`{path.name}` counts, but there is also something written in {there}.")
    ]
