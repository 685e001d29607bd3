"""Packing a submitted folder into bytes, to mark it on another machine."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from lora_from_scratch.grading.submissions.folder import ROOM, entries, open_plain

LARGEST = ROOM + 32_000_000  # the maximum total size of the files in bytes; grading has the same limit


def pack(folder: Path, below: Path) -> bytes | None:
    """Pack the files of a submitted folder into a tar file.

    Args:
        folder: the submitted folder.
        below: the folder submitted/.

    Returns:
        The tar file; or None if the submission must be marked on this machine, because it contains something other than
        folders and readable files, is too large, or has a link in its path below `below`.
    """
    if any(path.is_symlink() for path in (folder, *folder.parents) if path.is_relative_to(below)):
        return None
    made, room = io.BytesIO(), LARGEST
    with tarfile.open(fileobj=made, mode="w") as archive:
        for entry in entries(folder):
            info = tarfile.TarInfo(entry.path.as_posix())
            if entry.kind == "folder":
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
                continue
            if entry.kind != "file" or entry.size > room:
                return None
            try:
                with open_plain(folder / entry.path) as file:
                    content = file.read(room + 1)
            except OSError:
                return None
            room -= len(content)
            if room < 0:
                return None
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Unpack the result of `pack` into a new folder."""
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
