"""Read downloads of submissions from the platforms: a zip file, or the folder into which it was unpacked.

| Platform | Names inside |
|---|---|
| Canvas, "Download Submissions" | `dialloamina_LATE_4711_98765_unit_09-1.ipynb`: name, late or not, Canvas's numbers of the learner and of the file, file name; "-1" is the second attempt (lib/content_zipper.rb of Canvas) |
| Moodle, "Download all submissions" | `Amina Diallo_12345_assignsubmission_file_/unit_09.ipynb`, or without folders `..._assignsubmission_file_unit_09.ipynb`: full name, number of the participant |
| Gradescope, "Export Submissions" | `assignment_1_export/submission_2/unit_09.ipynb`, and submission_metadata.yml with the submitters and the time of each submission |

Names in a download are passed through `safe` before they are used as paths on this machine.
"""  # noqa: E501

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from lora_from_scratch.grading.intake.roster import Key
from lora_from_scratch.grading.submissions.folder import DEEPEST, MOST_ENTRIES, entries, open_plain

CANVAS = re.compile(
    r"(?P<name>.*?)_?(?P<late>LATE_)?(?:anon_(?P<anonymous>\w+?)|(?P<user>\d+))_(?P<number>\d+)_(?P<file>.+)"
)
MOODLE = re.compile(r"(?P<name>.+)_(?P<participant>\d+)_assignsubmission_(?P<kind>file|onlinetext)_?(?P<rest>.*)")
METADATA = "submission_metadata.yml"
LARGEST_METADATA = 50_000_000
MOST_PARTS = 100_000  # the maximum number of files in a download
LONGEST = 150  # the maximum number of bytes of a file's or folder's name
NOISE = ("__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Part:
    """A file in a download: its name, its size, and a function that opens it."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


@dataclass
class Received:
    """The submission of a person or a group.

    Attributes:
        people: for each person, the keys that identify them.
        label: the name of the submission in the download.
        files: name -> file.
        time: the time of submission in the platform's format; "" if unknown.
        late: whether the platform marks the submission as late.
    """

    people: list[list[Key]]
    label: str
    files: dict[str, Part] = field(default_factory=dict)
    time: str = ""
    late: bool = False


def read_download(path: Path) -> tuple[str, list[Received]]:
    """Read a download.

    Returns:
        The name of the platform, and the submissions.

    Raises:
        ValueError, OSError: the download cannot be read, or is not from one of the platforms.
    """
    parts = [part for part in _parts(path) if not any(piece in NOISE for piece in PurePosixPath(part.name).parts)]
    described = _described(parts)
    if described:
        return "Gradescope", _gradescope(parts, described)
    below = [_without(part, _common(parts)) for part in parts]
    # Learners choose part of the names, so one name proves nothing: the platform is the one that fits more of them.
    moodle = sum(MOODLE.fullmatch(part.name.partition("/")[0]) is not None for part in below)
    canvas = sum(CANVAS.fullmatch(part.name) is not None for part in below)
    if moodle > canvas:
        return "Moodle", _moodle(below)
    if canvas:
        return "Canvas", _canvas(below)
    example = "amina_4711_98765_unit_09.ipynb, Amina Diallo_123_assignsubmission_file_/unit_09.ipynb"
    raise ValueError(
        f"{path} is not a download of submissions from Canvas, Moodle or Gradescope. Names inside should look like "
        f"{example}, or there should be a {METADATA}"
    )


def safe(name: str) -> PurePosixPath | None:
    """Convert a file name into a safe relative path, or None if nothing is left of it.

    The path has no "..", at most `DEEPEST` parts (the last ones), and parts that every file system can hold.
    """
    pieces = [piece for piece in re.split(r"[/\\]+", name) if piece not in ("", ".", "..")][-DEEPEST:]
    clean = [_cut("".join(c if c.isprintable() and c not in ':*?"<>|' else "_" for c in piece)) for piece in pieces]
    if not clean or any(piece in NOISE for piece in clean):
        return None
    return PurePosixPath(*clean)


def _cut(name: str) -> str:
    """Shorten a name to `LONGEST` bytes and keep its suffix."""
    suffix = PurePosixPath(name).suffix if len(PurePosixPath(name).suffix) <= 10 else ""
    room = LONGEST - len(suffix.encode())
    return name if len(name.encode()) <= LONGEST else name.encode()[:room].decode(errors="ignore") + suffix


def parts_of_zip(file: zipfile.ZipFile) -> Iterator[Part]:
    """The regular files in a zip file. Links and encrypted files are skipped."""
    for info in file.infolist()[:MOST_PARTS]:
        kind = info.external_attr >> 28
        if info.is_dir() or kind not in (0, 8) or info.flag_bits & 1:
            continue
        yield Part(info.filename, info.file_size, lambda info=info: file.open(info))  # type: ignore[misc]


def _parts(path: Path) -> list[Part]:
    if path.is_dir():
        return list(_of_folder(path))
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    try:
        return list(parts_of_zip(zipfile.ZipFile(path)))
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is neither a folder nor a zip file: {error}") from None


def _of_folder(path: Path) -> Iterator[Part]:
    for top in sorted(path.iterdir()):
        below = entries(top) if top.is_dir() and not top.is_symlink() else ()
        found = [top, *(top / entry.path for entry in below if entry.kind == "file")]
        for file in found[: MOST_ENTRIES + 1]:
            if file.is_file() and not file.is_symlink():
                name = file.relative_to(path).as_posix()
                yield Part(name, file.stat().st_size, lambda file=file: open_plain(file))  # type: ignore[misc]


def _common(parts: Iterable[Part]) -> str:
    """The folder that contains all files and is not a learner's, as some unpacking programs create; "" if none."""
    tops = {part.name.split("/")[0] for part in parts if "/" in part.name}
    alone = all("/" in part.name for part in parts) and len(tops) == 1
    top = next(iter(tops)) if alone else ""
    return "" if MOODLE.match(top) else top


def _without(part: Part, top: str) -> Part:
    return Part(part.name.removeprefix(f"{top}/"), part.size, part.open) if top else part


def _canvas(parts: Iterable[Part]) -> list[Received]:
    named = [(part, matched) for part in parts if (matched := CANVAS.fullmatch(part.name))]
    known = {part.name for part, _ in named}
    found = {part.name: Received([], part.name) for part in parts if part.name not in known}  # text entries, links
    for part, matched in sorted(named, key=lambda one: int(one[1]["number"])):  # the newest file with a name is used
        who = matched["user"] or f"anon_{matched['anonymous']}"
        keys = [("number", matched["user"] or ""), ("slug", matched["name"])]
        received = found.setdefault(who, Received([keys], f"{matched['name']}_{who}".strip("_")))
        received.late |= bool(matched["late"])
        received.files[matched["file"]] = part
    return list(found.values())


def _moodle(parts: Iterable[Part]) -> list[Received]:
    found: dict[str, Received] = {}
    for part in parts:
        top, _, inside = part.name.partition("/")
        matched = MOODLE.fullmatch(top)
        if not matched:
            found[part.name] = Received([], part.name)
            continue
        who = matched["participant"]
        keys = [("participant", f"Participant {who}"), ("name", matched["name"])]
        received = found.setdefault(who, Received([keys], f"{matched['name']}_{who}"))
        if matched["kind"] == "file":
            received.files[inside or matched["rest"]] = part
    return list(found.values())


def _described(parts: Iterable[Part]) -> Part | None:
    """Gradescope's metadata: beside the folders of the submissions. In these folders, names are those of learners."""
    found = [part for part in parts if PurePosixPath(part.name).name == METADATA]
    top = [part for part in found if "/" not in part.name]
    below = [part for part in found if part.name.count("/") == 1 and not MOODLE.match(part.name)]
    return next(iter(top or below), None)


def _gradescope(parts: list[Part], described: Part) -> list[Received]:
    import yaml

    with described.open() as file:
        text = file.read(LARGEST_METADATA + 1)
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        metadata = yaml.load(text, loader) if len(text) <= LARGEST_METADATA else None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{METADATA} cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{METADATA} is empty or too large")
    root = PurePosixPath(described.name).parent
    found = {}
    for folder, said in metadata.items():
        if isinstance(said, dict):
            found[str(folder)] = Received(list(_submitters(said)), str(folder), time=_time(said.get(":created_at")))
    for part in parts:
        path = PurePosixPath(part.name)
        if path.is_relative_to(root) and len(inside := path.relative_to(root).parts) > 1 and inside[0] in found:
            found[inside[0]].files["/".join(inside[1:])] = part
    return list(found.values())


def _submitters(said: dict[Any, Any]) -> Iterator[list[Key]]:
    for one in said.get(":submitters") or ():
        if isinstance(one, dict):
            kinds = {":sid": "id", ":email": "email", ":name": "name"}
            yield [(kind, str(one[key])) for key, kind in kinds.items() if one.get(key) is not None]


def _time(value: Any) -> str:
    """A time in the format of timestamp.txt, with a time zone. YAML converts times to UTC."""
    if not hasattr(value, "isoformat"):
        return str(value or "")
    zone = "" if getattr(value, "tzinfo", None) else " UTC"
    return f"{value.isoformat(' ')}{zone}"
