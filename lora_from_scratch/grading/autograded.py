"""The folder autograded/: what the formgrader and the feedback pages show of a submission.

It is shown in the instructor's browser, where a script could change grades. So whatever a learner wrote goes through
`harmless`; of other files only pictures are taken over, and no link is followed.
"""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_from_scratch.grading.course_folder import CourseFolder
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.support.files import write_atomically
from lora_from_scratch.support.plain_text import in_html, plain

TIMESTAMP = "timestamp.txt"
LONGEST_TIMESTAMP = 200  # bytes
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
LARGEST_PICTURE = 5_000_000
MOST_PICTURES = 20
WORDS = {"note": "Note", "repaired": "Repaired", "lost": "Points lost", "human": "A person will look at this"}


def write(course: CourseFolder, learner: str, notebook: str) -> None:
    """Write the published files of a submission; files that are up to date are left alone.

    Args:
        notebook: the result of `shown`.
    """
    folder = course.autograded(learner)
    _put(course, folder / f"{course.assignment}.ipynb", notebook.encode())
    handed_in = course.handed_in(learner)
    when = read_small(handed_in / TIMESTAMP, LONGEST_TIMESTAMP)
    if when is not None:
        _put(course, folder / TIMESTAMP, when)
    own = {path.name: path.read_bytes() for path in course.released.parent.glob("*") if _is_extra(path)}
    for name, content in (dict(_pictures(handed_in)) | own).items():
        _put(course, folder / name, content)


def shown(graded: Graded, released: Any) -> str:
    """The autograded notebook for publishing: sanitised, with the findings at the top.

    Only cells that equal released ones are left unchanged.
    """
    import nbformat

    from lora_from_scratch.grading import outputs

    notebook = nbformat.reads(graded.notebook, as_version=4)
    notebook.metadata = copy.deepcopy(released.metadata)
    known = {(cell.cell_type, cell.source): cell for cell in released.cells}
    notebook.cells = [_shown(cell, known.get((cell.cell_type, cell.source))) for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = list(map(outputs.harmless, cell.outputs))
    if graded.findings:
        found = _findings(graded.findings)
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(found, id="found-by-grading"))
    return nbformat.writes(notebook) + "\n"


def changed_cells(before: Path, now: str) -> set[str]:
    """The grade_ids of cells that differ from what a person saw before; all of them if that is unknown.

    Args:
        before: the path of the previous autograded notebook, which need not exist.
        now: the notebook that will replace it.
    """
    new = _answers(now)
    try:
        old = _answers(before.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set(new)
    return {name for name, answer in new.items() if old.get(name) != answer}


def _answers(notebook: str) -> dict[str, tuple[str, str]]:
    """By grade_id, what the learner has written: text and pictures."""
    import nbformat

    cells = nbformat.reads(notebook, as_version=4).cells
    return {
        cell.metadata.nbgrader["grade_id"]: (cell.source, json.dumps(cell.get("attachments", {}), sort_keys=True))
        for cell in cells
        if "grade_id" in cell.metadata.get("nbgrader", {})
    }


def read_small(path: Path, limit: int) -> bytes | None:
    """The contents of a learner's small file; None if it is a link, not a regular file, too large or missing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        return file.read() if stat.S_ISREG(found.st_mode) and found.st_size <= limit else None


def _put(course: CourseFolder, path: Path, content: bytes) -> None:
    """Write the file if it differs, with the permissions that nbgrader gives to its own."""
    if path.is_file() and not path.is_symlink() and path.read_bytes() == content:
        return
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    path.chmod(0o664 if course.directory.groupshared else 0o444)


def _is_extra(path: Path) -> bool:
    return path.is_file() and path.suffix != ".ipynb" and not path.name.startswith(".")


def _pictures(folder: Path) -> Iterator[tuple[str, bytes]]:
    if folder.is_symlink() or not folder.is_dir():
        return
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(PICTURES))
    for name in names[:MOST_PICTURES]:
        content = read_small(folder / name, LARGEST_PICTURE)
        if content is not None:
            yield name, content


def _findings(findings: Iterable[Finding]) -> str:
    """The findings as a Markdown cell."""
    from lora_from_scratch.grading import harmless

    items = ""
    for finding in findings:
        where = f", cell `{finding.cell}`" if finding.cell else ""
        items += f"<li>{in_html(f'{WORDS[finding.severity]}{where}: {finding.message}')}</li>"
    return harmless.from_html(f"<p><strong>What grading found in this notebook</strong></p><ul>{items}</ul>")


def _shown(cell: Any, released: Any | None) -> Any:
    """A cell as it is published.

    Args:
        released: the equal cell of the release, if there is one.
    """
    from lora_from_scratch.grading import harmless

    attachments = cell.pop("attachments", None)
    if released is not None:
        if "attachments" in released:
            cell.attachments = released.attachments
    elif cell.cell_type == "code":
        cell.source = plain(cell.source)
    elif cell.cell_type == "markdown":
        cell.source = harmless.from_markdown(cell.source, attachments)
    else:
        cell.cell_type, cell.source = "markdown", harmless.from_text(cell.source)
    cell.metadata = {"nbgrader": cell.metadata.nbgrader} if "nbgrader" in cell.metadata else {}
    return cell
