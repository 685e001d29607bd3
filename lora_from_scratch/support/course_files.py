"""The course's files (notebooks, solutions, documents for instructors), and copies of them for people to work on."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

from lora_from_scratch.support.files import write_atomically

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = PACKAGE / "course_files"  # written by setup.py when a wheel is built
RECORD = ".released.json"  # in a copy: the SHA-256 of each file as it was copied
IGNORED = (".ipynb_checkpoints", "__pycache__")


def course_files() -> Path:
    """The folder that contains `notebooks/`, `solutions/` and `course/`.

    In a clone it is the clone itself; in an installed wheel it is a folder inside the package.
    """
    return INSTALLED if INSTALLED.is_dir() else PACKAGE.parent


def install_command(extra: str = "") -> str:
    """The command that installs this package again, with an extra such as "[course]"."""
    if INSTALLED.is_dir():
        return f"python -m pip install 'lora-from-scratch{extra}'"
    return f"python -m pip install -e '.{extra}' -c constraints.txt"


class Copied(NamedTuple):
    """The names of the files that `copy_unchanged` added, updated, or kept although there is a newer version."""

    new: list[str]
    updated: list[str]
    kept: list[str]


def copy_unchanged(source: Path, folder: Path, inside: tuple[str, ...] = ("",)) -> Copied:
    """Copy the files that `folder` lacks, and update those that nobody has changed since they were copied.

    A file that differs from what was copied is somebody's work and is left alone, unless it is only the beginning of
    the file, as a full disk may leave it.

    Args:
        inside: the folders of `source` to copy; all of it by default.

    Raises:
        OSError: there is nothing to copy, or the folder cannot be written to.
    """
    files = [file for name in inside for file in sorted((source / name).rglob("*")) if file.is_file()]
    files = [file for file in files if not set(IGNORED) & set(file.parts)]
    if not files:
        raise FileNotFoundError(f"there are no course files in {source}; install the course again")
    record, copied = _record(folder), Copied([], [], [])
    for file in files:
        name = file.relative_to(source).as_posix()
        copy, now, before = folder / name, _sha256(file), record.get(name)
        missing = not copy.exists() or _is_cut(copy, file)
        mine = None if missing else _sha256(copy)
        if missing or mine == before != now:
            write_atomically(copy, functools.partial(shutil.copyfile, file))
            (copied.new if missing else copied.updated).append(name)
        elif mine != now:
            if before not in (None, now):
                copied.kept.append(name)
            continue
        record[name] = now
    text = json.dumps(record, indent=1, sort_keys=True)
    write_atomically(folder / RECORD, lambda place: place.write_text(text, encoding="utf-8"))
    return copied


def _record(folder: Path) -> dict[str, str]:
    """The hashes of the files as they were copied; empty if the record is missing or damaged."""
    try:
        found = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _is_cut(copy: Path, file: Path) -> bool:
    """Whether a file is only the beginning of what it should be a copy of."""
    size = copy.stat().st_size if copy.is_file() else file.stat().st_size
    return size < file.stat().st_size and file.read_bytes().startswith(copy.read_bytes())
