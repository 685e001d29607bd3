"""Copy downloaded submissions to submitted/LEARNER/unit_NN/, where grading reads them."""

from __future__ import annotations

import filecmp
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from lora_from_scratch.grading.course_folder import CourseFolder, unfit
from lora_from_scratch.grading.intake.downloads import Part, Received, parts_of_zip, read_download, safe
from lora_from_scratch.grading.intake.roster import Learner, Roster
from lora_from_scratch.grading.submissions.folder import MOST_ENTRIES, ROOM, TIMESTAMP

VERSION = re.compile(r"-(\d+)$")  # the suffix that Canvas adds to the file name for later attempts
COPY = re.compile(r" ?\(\d+\)$")  # the suffix that browsers add to copies
LARGEST_LIST = 5_000_000  # bytes of the list of files in a zip file that a learner handed in
TIMES = ("%A, %d %B %Y, %I:%M %p", "%A, %d %B %Y, %H:%M", "%A, %B %d, %Y, %I:%M %p")  # Moodle's formats, in English


class UnreadableError(Exception):
    """A file of a download cannot be read, such as a damaged file in a zip file."""


@dataclass
class TakenIn:
    """The result of `take_in`.

    Attributes:
        new: the learners whose work was added to submitted/.
        unchanged: the learners whose work was already there.
        replaced: the learners whose work was replaced.
        kept: the learners whose existing work differs and was kept.
        problems: one sentence for each problem that a person must resolve.
    """

    new: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def take_in(course: CourseFolder, downloads: list[Path], roster: Roster, zone: str, *, replace: bool) -> TakenIn:
    """Import downloads into submitted/. All downloads are read before any file is written.

    Args:
        course: the course's folder.
        downloads: zip files, or folders into which they were unpacked.
        roster: the learners.
        zone: the time zone of times without one (Moodle's).
        replace: whether to replace existing work that differs from the download.

    Raises:
        ValueError, OSError: a download cannot be read.
    """
    done = TakenIn()
    placed: dict[str, str] = {}
    received = [(platform, one) for path in downloads for platform, found in [read_download(path)] for one in found]
    for platform, one in received:
        if not one.files:
            done.problems.append(f"{one.label}: there is no file that was handed in")
            continue
        for keys in one.people or [[]]:
            learner, why = roster.find(keys)
            if learner is None:
                done.problems.append(f"{one.label}: {why}")
            elif why := unfit(learner.name):
                done.problems.append(f"{one.label}: {learner.name!r} cannot be the name of a folder: {why}")
            elif learner.name in placed:
                other = placed[learner.name]
                done.problems.append(f"{one.label}: {learner.name} has also handed in {other}, which counts")
            else:
                placed[learner.name] = one.label
                _place(course, one, learner, _time(one, learner, platform, zone), replace, done)
    return done


def _place(course: CourseFolder, one: Received, learner: Learner, time: str, replace: bool, done: TakenIn) -> None:
    target = course.handed_in(learner.name)
    with TemporaryDirectory(dir=_made(course.submitted), prefix=".intake.") as made:
        folder = Path(made) / "new"
        folder.mkdir()
        left_out = _write(one, folder, course.assignment)
        if time:
            (folder / TIMESTAMP).write_text(f"{time}\n", encoding="utf-8")
        done.problems += [f"{learner.name}: {sentence}" for sentence in left_out]
        if target.is_dir() and _same(folder, target):
            done.unchanged.append(learner.name)
        elif target.exists() and not replace:
            done.kept.append(learner.name)
        else:
            (done.replaced if target.exists() else done.new).append(learner.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(Path(made) / "old")
            folder.rename(target)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(one: Received, folder: Path, unit: str) -> list[str]:
    """Write the files, unpacking zip files, and give the notebook the name that grading expects.

    Returns:
        A sentence for each file that was left out.
    """
    left_out: list[str] = []
    room, count = ROOM, 0
    for name, part in _unpacked(one.files, left_out):
        path = safe(name)
        if path is None or path.name == TIMESTAMP:  # the time is the platform's, not the learner's
            continue
        count += 1
        if count > MOST_ENTRIES or part.size > room:
            left_out.append(f"{path} was left out, because there are too many or too large files")
            continue
        try:
            room -= _copy(part, folder.joinpath(*path.parts), room)
        except UnreadableError as error:
            folder.joinpath(*path.parts).unlink(missing_ok=True)
            left_out.append(f"{path} was left out, because it cannot be read ({error})")
    notebooks = sorted(path for path in folder.glob("*.ipynb") if path.is_file())
    if (newest := _newest(notebooks, unit)) is not None and newest.stem != unit:
        earlier = folder / f"{unit}.ipynb"
        if earlier.exists():
            earlier.rename(folder / f"{unit} (earlier).ipynb")
        newest.rename(earlier)
    return left_out


def _newest(notebooks: list[Path], unit: str) -> Path | None:
    """The unit's notebook with the highest attempt number; None if copies made by a browser make it ambiguous."""
    mine: dict[int, Path] = {}
    for path in notebooks:
        stem = COPY.sub("", path.stem)
        version = VERSION.search(stem)
        if VERSION.sub("", stem).replace(" ", "_").casefold() == unit:
            number = int(version[1]) if version else 0
            if number in mine:
                return None
            mine[number] = path
    return mine[max(mine)] if mine else None


def _unpacked(files: dict[str, Part], left_out: list[str]) -> Iterator[tuple[str, Part]]:
    for name, part in files.items():
        if not name.lower().endswith(".zip"):
            yield name, part
            continue
        with _opened(part) as archive:
            if archive is None:
                left_out.append(f"{safe(name)} cannot be unpacked")
            else:
                yield from ((inner.name, inner) for inner in parts_of_zip(archive))


@contextmanager
def _opened(part: Part) -> Iterator[zipfile.ZipFile | None]:
    with TemporaryDirectory() as made:
        copy = Path(made) / "archive.zip"
        try:
            _copy(part, copy, ROOM)
            archive = zipfile.ZipFile(copy) if _is_small(copy) else None
        except Exception:  # whatever is wrong with the file, it is one learner's
            archive = None
        if archive is None:
            yield None
        else:
            with archive:
                yield archive


def _is_small(path: Path) -> bool:
    """Whether a zip file lists few files, as its last bytes say; reading the list takes ten times its size."""
    end = path.read_bytes()[-(22 + 65_535) :]
    place = end.rfind(b"PK\5\6")
    if place < 0 or len(end) < place + 22 or end[max(0, place - 20) : place].startswith(b"PK\6\7"):  # none, or "zip64"
        return False
    return int(struct.unpack_from("<I", end, place + 12)[0]) <= LARGEST_LIST


def _copy(part: Part, path: Path, room: int) -> int:
    """Write at most `room` bytes of a file, and return the number of bytes written.

    Raises:
        UnreadableError: the file cannot be read.
        OSError: it cannot be written.
    """
    if path.exists() or any(parent.is_file() for parent in path.parents):
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    left = room
    with path.open("wb") as target:
        for chunk in _chunks(part, room):
            target.write(chunk)
            left -= len(chunk)
    return room - left


def _chunks(part: Part, room: int) -> Iterator[bytes]:
    try:
        with part.open() as source:
            while room > 0 and (chunk := source.read(min(1 << 20, room))):
                yield chunk
                room -= len(chunk)
    except Exception as error:  # a damaged file, an unknown compression, a password, a mode without reading
        raise UnreadableError(f"{type(error).__name__}: {error}"[:200]) from None


def _same(one: Path, other: Path) -> bool:
    names = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    if names != {path.relative_to(other) for path in other.rglob("*") if path.is_file()}:
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def _time(one: Received, learner: Learner, platform: str, zone: str) -> str:
    """The content of timestamp.txt. If it is not a valid time, grading asks a person to look at the submission."""
    said = one.time or (learner.time if platform == "Moodle" else "")
    for form in TIMES:
        try:
            return f"{datetime.strptime(said, form)} {zone}"
        except ValueError:
            continue
    return said or (f"late, says {platform}" if one.late else "")
