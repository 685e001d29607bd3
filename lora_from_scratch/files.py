"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        with _disk_errors(path):
            write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 is for secrets
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_directory_atomically(directory: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary directory, then put its files into `directory`, one step for each.

    Other files that are already in `directory` stay. If `write` fails, `directory` is as it was.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file, not a directory; choose another place to save to")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.", suffix=".part"))
    try:
        with _disk_errors(directory):
            write(temporary)
        directory.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.chmod(file, 0o666 & ~_umask())
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """torch and safetensors report a full disk with errors of their own: make them the OSError that they are."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {str(error).splitlines()[0]}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
