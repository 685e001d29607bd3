"""A submitted folder as bytes, so that another machine can mark it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from lora_from_scratch.grading.submissions.folder import ROOM, entries, open_plain

LARGEST = ROOM + 32_000_000  # bytes of all files in total; grading itself takes no more


def pack(folder: Path, below: Path) -> bytes | None:
    """The files of a submitted folder as a tar file.

    Args:
        below: the folder submitted/. If a part of the path below it is a link, the answer is None.

    Returns:
        None if there is anything else than folders and files that can be read, or too much: then only this machine
        sees exactly what was handed in.
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
    """Write what `pack` has packed."""
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
