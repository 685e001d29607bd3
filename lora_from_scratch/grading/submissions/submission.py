"""Read a submission: from bytes to a notebook, or to a finding that says why it cannot be read.

The file is untrusted. It may not be a notebook or even a regular file, or may be crafted to be hard to read, so nothing
is assumed about its structure.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_from_scratch.grading.graded import Finding
from lora_from_scratch.grading.submissions.folder import open_plain

LARGEST = 20_000_000  # bytes of a notebook, including its pictures
MOST_CELLS = 2_000
MOST_TEXT = 2_000_000  # characters of all cells in total
MOST_ATTACHMENTS = 10_000_000  # characters of all pictures in text cells in total
CELL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
PICTURE = re.compile(r"image/[\w.+-]{1,40}")
FORMATS = (3, 4)  # nbformat's major versions
KEPT = (
    "grade",
    "grade_id",
    "solution",
    "locked",
    "task",
    "points",
    "schema_version",
    "cell_type",
)  # nbgrader's metadata
EARLIER = {"heading": "markdown", "html": "markdown"}  # cell types of nbformat 3
ELSEWHERE = "Open your notebook in JupyterLab, save it, and hand in that file"


@dataclass(frozen=True)
class Submission:
    """What was handed in.

    Attributes:
        notebook: an nbformat 4.5 NotebookNode without outputs, with a unique id for every cell; None if it cannot be
            read.
        findings: what was repaired while reading it, or why it cannot be read (severity "human").
    """

    notebook: Any
    findings: tuple[Finding, ...]


class UnreadableError(ValueError):
    """Why a submission cannot be read: the finding's kind and message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read(path: Path, below: Path | None = None) -> Submission:
    """Read a submission. Whatever is wrong with it becomes a finding, never an error.

    Args:
        path: submitted/LEARNER/unit_NN/unit_NN.ipynb.
        below: no part of the path below this folder (the course's submitted/) may be a symbolic link. With None, only
            the file itself must not be one.
    """
    findings: list[Finding] = []
    try:
        _require_no_links(path, below or path.parent)
        text, encoding = _decoded(_bytes_of(path))
        data = _parsed(text)
        findings += encoding
        return Submission(normal(data, findings), tuple(findings))
    except UnreadableError as why:
        return Submission(None, (*findings, Finding(why.kind, "human", "", str(why))))


def normal(data: Any, findings: list[Finding]) -> Any:
    """Convert JSON data to an nbformat 4.5 notebook without outputs, keeping only values of the expected types.

    Raises:
        UnreadableError: the data is not a notebook, or is too large.
    """
    import nbformat

    if not isinstance(data, dict) or not isinstance(data.get("cells", data.get("worksheets")), list):
        raise UnreadableError("no notebook", f"What you handed in is not a Jupyter notebook. {ELSEWHERE}.")
    if data.get("nbformat") not in FORMATS:
        findings.append(_note("old format", "Your notebook is in an unusual format. It was read as far as possible."))
    raw = _raw_cells(data)
    if len(raw) > MOST_CELLS:
        raise UnreadableError("too large", f"Your notebook has {len(raw):,} cells; the maximum is {MOST_CELLS:,}.")
    cells = list(_cells(raw))
    if sum(len(cell["source"]) for cell in cells) > MOST_TEXT:
        raise UnreadableError("too large", f"Your notebook has more than {MOST_TEXT:,} characters in its cells.")
    pictures = sum(
        len(text) for cell in cells for files in cell.get("attachments", {}).values() for text in files.values()
    )
    if pictures > MOST_ATTACHMENTS:
        for cell in cells:
            cell.pop("attachments", None)
        findings.append(Finding("pictures", "human", "", "The pictures in your text are too large and were left out."))
    given = data.get("metadata")
    metadata = {
        key: {name: clean(value) for name, value in given[key].items() if isinstance(value, str)}
        for key in ("kernelspec", "language_info")
        if isinstance(given, dict) and isinstance(given.get(key), dict)
    }
    return nbformat.from_dict({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


# --- The file ----------------------------------------------------------------------------------------------


def _require_no_links(path: Path, below: Path) -> None:
    parts = [path, *path.parents]
    for part in parts[: parts.index(below)] if below in parts else [path]:
        if part.is_symlink():
            message = f"`{clean(part.name)}` is a symbolic link, not a file of yours. Hand in the file itself."
            raise UnreadableError("symbolic link", message)


def _bytes_of(path: Path) -> bytes:
    """The contents of a regular file, without following links and up to the size limit."""
    try:
        with open_plain(path) as file:
            content = file.read(LARGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UnreadableError("missing", f"Your submission contains no `{path.name}`.") from None
    except OSError as error:
        why = f"Your `{path.name}` cannot be read ({error.strerror}). {ELSEWHERE}."
        raise UnreadableError("unreadable file", why) from None
    if len(content) > LARGEST:
        advice = "Clear its outputs (Kernel > Restart Kernel and Clear Outputs), save it, and hand it in again"
        raise UnreadableError("too large", f"Your notebook is larger than {LARGEST // 1_000_000} MB. {advice}.")
    if not content.strip(b"\0 \t\r\n"):
        raise UnreadableError("empty file", f"Your notebook file is empty. {ELSEWHERE}.")
    return content


def _decoded(content: bytes) -> tuple[str, list[Finding]]:
    try:
        return content.decode("utf-8"), []
    except UnicodeDecodeError:
        encoding = _encoding_of(content)
    message = f"Your notebook is not encoded in UTF-8. It was read as {encoding.upper()}."
    return content.decode(encoding, errors="replace"), [Finding("encoding", "repaired", "", message)]


def _encoding_of(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if content[1:2] == b"\0":
        return "utf-16-le"
    if content[:1] == b"\0":
        return "utf-16-be"
    return "cp1252"


def _parsed(text: str) -> Any:
    text = text.lstrip("\ufeff").strip("\0 \t\r\n")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if re.search(r"^<<<<<<< ", text, re.MULTILINE) and ">>>>>>>" in text:
        message = "Your notebook contains merge conflict markers (from git)."
        raise UnreadableError("no notebook", f"{message} Resolve the conflict, or hand in one of the versions.")
    if text.startswith("{") and '"cells"' in text[:200_000]:
        message = "Your notebook is damaged or incomplete, so it cannot be read."
        raise UnreadableError("damaged notebook", f"{message} {ELSEWHERE}.")
    raise UnreadableError("no notebook", f"What you handed in is not a Jupyter notebook. {ELSEWHERE}.")


# --- The notebook ------------------------------------------------------------------------------------------


def _cells(raw: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The cells, whatever they contain, as cells of nbformat 4.5."""
    used: set[str] = set()
    for number, cell in enumerate(raw):
        source = clean(_text(cell.get("source", cell.get("input", cell.get("code", "")))))
        kind = str(cell.get("cell_type"))
        if kind == "heading":
            level = cell.get("level")
            source = f"{'#' * (level if isinstance(level, int) and 0 < level < 7 else 1)} {source}"
        kind = EARLIER.get(kind, kind if kind in ("code", "markdown") else "raw")
        cell_id = cell.get("id")
        if not isinstance(cell_id, str) or not CELL_ID.fullmatch(cell_id) or cell_id in used:
            cell_id = hashlib.sha256(f"{number} {kind} {source}".encode()).hexdigest()[:12]
        used.add(cell_id)
        made: dict[str, Any] = {"id": cell_id, "cell_type": kind, "source": source, "metadata": _metadata(cell)}
        if kind == "code":
            made |= {"execution_count": None, "outputs": []}
        elif attachments := _attachments(cell):
            made["attachments"] = attachments
        yield made


def _raw_cells(data: dict[str, Any]) -> list[dict[str, Any]]:
    cells = data.get("cells")
    if not isinstance(cells, list):
        sheets = [sheet.get("cells") for sheet in data["worksheets"] if isinstance(sheet, dict)]
        cells = [cell for sheet in sheets if isinstance(sheet, list) for cell in sheet]
    return [cell for cell in cells if isinstance(cell, dict)]


def _metadata(cell: dict[str, Any]) -> dict[str, Any]:
    """nbgrader's metadata as far as it has the expected types; nothing else is needed."""
    metadata = cell.get("metadata")
    said = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    if not isinstance(said, dict):
        return {}
    return {
        "nbgrader": {
            key: clean(said[key]) if isinstance(said[key], str) else said[key]
            for key in KEPT
            if isinstance(said.get(key), bool | int | float | str)
        }
    }


def _attachments(cell: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The pictures in a text cell."""
    given = cell.get("attachments")
    found: dict[str, dict[str, str]] = {}
    for name, files in given.items() if isinstance(given, dict) else []:
        kept = {
            kind: data
            for kind, data in (files.items() if isinstance(files, dict) else [])
            if PICTURE.fullmatch(kind) and isinstance(data, str) and data.isascii()
        }
        if kept:
            found[clean(name)] = kept
    return found


def _text(source: Any) -> str:
    if isinstance(source, list):
        return "".join(part for part in source if isinstance(part, str))
    return source if isinstance(source, str) else ""


def clean(text: str) -> str:
    """The text with lone surrogates replaced, which JSON can contain but UTF-8 cannot encode."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _note(kind: str, message: str) -> Finding:
    return Finding(kind, "note", "", message)
