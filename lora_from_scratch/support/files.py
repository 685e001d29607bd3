"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_LEFTOVER = re.compile(r"\..+\.\w{8}\.part")  # the names that `tempfile` makes below


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    A crash, a kill or a full disk leaves what was there before, and nothing half-written.

    Args:
        path: where the file is to be; its folder is made if need be.
        write: called with the temporary path.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    with _folder(path.parent):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        try:
            with _disk_errors(path):
                write(temporary)
            _finish(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_directory_atomically(directory: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary directory, then put its files into `directory`, one step for each.

    Other files that are already in `directory` stay. If `write` fails, `directory` is as it was.

    Raises:
        OSError: the disk is full, or `directory` is a file or cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, not a directory; choose another place to save to")
    with _folder(directory):
        # Inside, not beside: `directory` may be the one place that can be written, on a disk of its own.
        temporary = Path(tempfile.mkdtemp(dir=directory, prefix=".new.", suffix=".part"))
        try:
            with _disk_errors(directory):
                write(temporary)
            files = sorted(temporary.iterdir())
            for file in files:
                _finish(file)
            for file in files:
                os.replace(file, directory / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, document: Any) -> None:
    """Write JSON, whole or not at all. What is not a number (NaN, infinity) becomes null: JSON knows no such thing."""
    text = json.dumps(_finite(document), indent=1, default=str, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_writable(directory: str | Path) -> None:
    """Find out whether files can be written under `directory`, which need not exist, and leave no trace.

    Raises:
        OSError: they cannot; the message says why.
    """
    place = Path(directory)
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent  # the nearest thing that is there
    if not place.is_dir():
        raise NotADirectoryError(f"cannot write to {directory}: {place} is not a directory; choose another place")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {directory}: {error.strerror}; choose another place") from None


def is_leftover(path: Path) -> bool:
    """Whether it is named like what the functions above write before it is whole."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(directory: str | Path) -> None:
    """Remove what a killed process was writing in `directory` with the functions above."""
    for path in filter(is_leftover, Path(directory).glob(".*.part")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _folder(directory: Path) -> Iterator[None]:
    """Make a directory for what happens inside; if that fails, the directories that were made go again."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for place in missing:
            try:
                place.rmdir()
            except OSError:  # somebody else has put something there
                break
        raise


def _finish(file: Path) -> None:
    """On the disk, and readable by whom it should be: `tempfile`'s own 0600 is for secrets."""
    with file.open("rb") as written:
        os.fsync(written.fileno())
    os.chmod(file, 0o666 & ~_umask())


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """torch and safetensors report a full disk with errors of their own: make them the OSError that they are."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {str(error).splitlines()[0]}") from error


def _finite(document: Any) -> Any:
    if isinstance(document, dict):
        return {name: _finite(value) for name, value in document.items()}
    if isinstance(document, list | tuple):
        return [_finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
