"""Writing files atomically, so that an incomplete file is never visible."""

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
    """Let `write` write a temporary file beside `path`, then rename it to `path` in one step.

    After a crash, a kill or a full disk, the previous file is unchanged and nothing incomplete remains at `path`.

    Args:
        path: the file to write; its folder is created if necessary.
        write: called with the temporary path.

    Raises:
        OSError: the disk is full or the folder cannot be written to.
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
    """Let `write` fill a temporary directory, then move its files into `directory`, each in one step.

    Other files in `directory` are kept. If `write` fails, `directory` is left unchanged.

    Raises:
        OSError: the disk is full, or `directory` is a file or cannot be written to.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, not a directory; choose another directory")
    with _folder(directory):
        # Inside, not beside: `directory` may be the only writable place, and on a separate disk.
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
    """Write JSON atomically. NaN and infinity, which JSON does not have, become null."""
    text = json.dumps(_finite(document), indent=1, default=str, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_writable(directory: str | Path) -> None:
    """Check that files can be written under `directory`, which need not exist. Nothing is created.

    Raises:
        OSError: they cannot be written; the message says why.
    """
    place = Path(directory)
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent  # the nearest existing path
    if not place.is_dir():
        raise NotADirectoryError(f"cannot write to {directory}: {place} is not a directory; choose another directory")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {directory}: {error.strerror}; choose another directory") from None


def is_leftover(path: Path) -> bool:
    """Whether the path has the name of a temporary file of the functions above."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(directory: str | Path) -> None:
    """Remove temporary files that a killed process left in `directory` while using the functions above."""
    for path in filter(is_leftover, Path(directory).glob(".*.part")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _folder(directory: Path) -> Iterator[None]:
    """Create a directory for the body of the `with` statement; if that fails, remove the created directories."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for place in missing:
            try:
                place.rmdir()
            except OSError:  # another process has written something there
                break
        raise


def _finish(file: Path) -> None:
    """Flush the file to disk and give it the default permissions (`tempfile` creates files with 0600)."""
    with file.open("r+b") as written:  # Windows flushes only files that are open for writing
        os.fsync(written.fileno())
    os.chmod(file, 0o666 & ~_umask())


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Convert the errors with which torch and safetensors report a full disk into an `OSError` in plain words."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(next(place for place in path.absolute().parents if place.is_dir())).free
        raise OSError(
            f"could not write {path}: the disk or your quota may be full ({free / 1e6:,.0f} MB are free on the disk)"
        ) from error


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
