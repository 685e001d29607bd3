"""The folder autograded/: what the formgrader and the feedback pages show of a submission.

It is shown in the instructor's browser, where a script could change grades. So whatever a learner wrote is shown as
text, unless it is plain formatting; of other files only pictures are taken over, and no link is followed.
"""

from __future__ import annotations

import html.parser
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_from_scratch.grading.course_folder import CourseFolder
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.support.files import write_atomically

TIMESTAMP = "timestamp.txt"
LONGEST_TIMESTAMP = 200  # bytes
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
LARGEST_PICTURE = 5_000_000
MOST_PICTURES = 20
# What Markdown makes, and what people write by hand in it.
TAGS = (
    "a abbr b blockquote br code dd del details div dl dt em h1 h2 h3 h4 h5 h6 hr i img ins kbd li mark ol p pre q s "
    "small span strong sub summary sup table tbody td th thead tr tt u ul var"
)
ATTRIBUTES = "align alt class colspan height href id open rowspan src start style title width"
SCHEMES = ("http:", "https:", "mailto:", "attachment:", "data:image/png", "data:image/jpeg", "data:image/gif")
ACTIVE_MATHS = re.compile(r"\\(href|require|style|class|cssId|mmlToken)\b")  # what MathJax makes links and HTML of
WORDS = {"note": "Note", "repaired": "Put right", "lost": "Points lost", "human": "Somebody will look at this"}


def write(course: CourseFolder, learner: str, notebook: str) -> None:
    """Write what is shown of a submission; files that are as they should be are left alone.

    Args:
        notebook: what `shown` gave.
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
    """The autograded notebook as it is shown: with what was found about it on top, and harmless."""
    import nbformat

    notebook = nbformat.reads(graded.notebook, as_version=4)
    known = {(cell.cell_type, cell.source) for cell in released.cells}
    for cell in notebook.cells:
        if (cell.cell_type, cell.source) not in known:
            _disarm(cell)
    if graded.findings:
        notebook.cells.insert(0, nbformat.v4.new_markdown_cell(_findings(graded.findings), id="found-by-grading"))
        _disarm(notebook.cells[0])
    return nbformat.writes(notebook) + "\n"


def changed_cells(before: Path, now: str) -> set[str]:
    """The grade_ids of cells that are not what a person saw before; all of them where nobody knows.

    Args:
        before: an autograded notebook, which need not be there.
        now: what it will be replaced by.
    """
    new = _answers(now)
    try:
        old = _answers(before.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set(new)
    return {name for name, answer in new.items() if old.get(name) != answer}


def _answers(notebook: str) -> dict[str, tuple[str, str]]:
    """By grade_id, what a learner has written there: text and pictures."""
    import nbformat

    cells = nbformat.reads(notebook, as_version=4).cells
    return {
        cell.metadata.nbgrader["grade_id"]: (cell.source, json.dumps(cell.get("attachments", {}), sort_keys=True))
        for cell in cells
        if "grade_id" in cell.metadata.get("nbgrader", {})
    }


def read_small(path: Path, limit: int) -> bytes | None:
    """A learner's small file; None where it is a link, no file, too large or not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        return file.read() if stat.S_ISREG(found.st_mode) and found.st_size <= limit else None


def _put(course: CourseFolder, path: Path, content: bytes) -> None:
    """With the permissions that nbgrader gives its own."""
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
    """The findings as Markdown. They quote learners: nothing of them may be read as HTML."""
    lines = ["**What grading found in this notebook**", ""]
    for finding in findings:
        text = " ".join(finding.message.split()).replace("&", "&amp;").replace("<", "&lt;")
        where = f", cell `{finding.cell}`" if finding.cell else ""
        lines.append(f"- {WORDS[finding.severity]}{where}: {text}")
    return "\n".join(lines)


def _disarm(cell: Any) -> None:
    """Make a learner's cell harmless: Markdown with anything active in it, and raw cells, become text."""
    if cell.cell_type == "raw":
        cell.cell_type, cell.source = "markdown", _fenced(cell.source)
        cell.metadata.pop("format", None)
        cell.metadata.pop("raw_mimetype", None)
    elif cell.cell_type == "markdown":
        attachments = cell.get("attachments", {})
        for name in [name for name, data in attachments.items() if any("svg" in kind for kind in data)]:
            del attachments[name]
        if not _is_harmless(cell.source):
            cell.source = _fenced(cell.source)


def _fenced(text: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _is_harmless(text: str) -> bool:
    """Does the Markdown become formatting only?"""
    from nbconvert.filters import markdown2html

    if ACTIVE_MATHS.search(text):
        return False
    reader = _Reader()
    try:
        reader.feed(markdown2html(text))
        reader.close()
    except Exception:  # whatever the renderer cannot read is shown as it is
        return False
    return reader.harmless


class _Reader(html.parser.HTMLParser):
    harmless = True

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            target = "".join((value or "").split()).lower()
            if name in ("href", "src") and ":" in target.split("/")[0] and not target.startswith(SCHEMES):
                self.harmless = False
            if name not in ATTRIBUTES.split() or (name == "style" and ("url" in target or "expression" in target)):
                self.harmless = False
        if tag not in TAGS.split():
            self.harmless = False

    def handle_decl(self, decl: str) -> None:
        self.harmless = False

    def unknown_decl(self, data: str) -> None:
        self.harmless = False

    def handle_pi(self, data: str) -> None:
        self.harmless = False
