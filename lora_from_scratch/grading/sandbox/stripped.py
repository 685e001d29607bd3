"""The sandbox's copy of the library, without the answers to the unit and without the judge.

One copy is made for each state of the library and mounted where the library is installed, whichever way it was
installed; nothing else of the project is visible.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_from_scratch.checks import notebook
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.units import Unit, unit_files, units
from lora_from_scratch.grading.building.solution import BEGIN, END, solved_source
from lora_from_scratch.grading.sandbox import standin

PACKAGE = Path(__file__).resolve().parents[2]
NAME = PACKAGE.name
ASSETS = "assets"
EXTRA = "extra"  # the folder for modules outside the library, such as an instructor's own exercises
LEFT_OUT = frozenset({"cli", "grading", "room", ASSETS, "__main__.py"})
OF_CHECKS = frozenset({"__init__", "exercise", "observation", "verdict"})  # besides what the unit's own checks import
NEVER = frozenset({"bank", "diagnosis", "judge"})
RUNNER = ("forking.py", "inside.py", "lockdown.py", "pristine.py", "seccomp.py", "wire.py")

# The message of the error that a removed body raises, by which calls of it are recognised.
TAKEN_OUT = "which is removed from the library while a notebook is graded"
MODULE = "taken_out"
SOURCE = f'''"""What the removed bodies raise."""

called = set()


def taken_out(name):
    called.add(name)
    return NotImplementedError(f"this is the library's `{{name}}`, {TAKEN_OUT}")
'''


@dataclass(frozen=True)
class StrippedLibrary:
    """A copy of the library.

    Attributes:
        folder: holds the package, and `EXTRA`.
        hidden: files of an instructor's own modules that hold answers and may be visible, with what hides each.
    """

    folder: Path
    hidden: tuple[tuple[Path, Path], ...] = ()

    @property
    def package(self) -> Path:
        return self.folder / NAME

    @property
    def extra(self) -> Path:
        return self.folder / EXTRA


def find_unit(number: str) -> Unit:
    """The unit of that number.

    Raises:
        ValueError: there is none.
    """
    for unit in units():
        if unit.number == number:
            return unit
    raise ValueError(f"there is no unit {number!r}; the units are: {', '.join(u.number for u in units())}")


def stripped(unit: Unit, without: Iterable[str], cache: Path, assets: bool = False) -> StrippedLibrary:
    """The library without the bodies of these exercises, from the cache or newly made.

    Args:
        without: names of exercises of the unit.
        assets: whether to link the assets; otherwise an empty folder is made as their mount point.

    Raises:
        ValueError: `without` contains a name that is not an exercise of the unit.
    """
    names = sorted(set(without))
    unknown = set(names) - {exercise.name for exercise in unit.exercises}
    if unknown:
        raise ValueError(f"unit {unit.number} has no exercise {', '.join(sorted(unknown))}")
    files = dict(_files(unit, [e for e in unit.exercises if e.name in names]))
    state = hashlib.sha256(repr((sorted(files.items()), assets, str(PACKAGE))).encode()).hexdigest()[:20]
    folder = cache.absolute() / f"library-{unit.number}-{state}"
    if not folder.is_dir():
        _write(files, folder, assets)
    return StrippedLibrary(folder, tuple(_hidden(unit, folder)))


def _write(files: dict[str, str], folder: Path, assets: bool) -> None:
    """Write the copy atomically; if another process is first, its copy is used."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix="making-"))
    made.chmod(0o755)
    for name, text in files.items():
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (made / EXTRA).mkdir(exist_ok=True)
    if assets:
        (made / NAME / ASSETS).symlink_to(PACKAGE / ASSETS, target_is_directory=True)
    else:
        (made / NAME / ASSETS).mkdir()
    with contextlib.suppress(OSError):
        made.rename(folder)
    shutil.rmtree(made, ignore_errors=True)
    if not folder.is_dir():
        raise OSError(f"the library's copy for the sandbox could not be made in {folder.parent}")


# --- What is in it -----------------------------------------------------------------------------------


def _files(unit: Unit, blanked: list[Exercise]) -> Iterator[tuple[str, str]]:
    """Every file of the copy: its path and its text."""
    sources = {path: path.read_text(encoding="utf-8") for path in (*_library(unit), *_tops(unit))}
    for exercise in blanked:
        path = file_of(exercise.object)
        if path not in sources:
            raise ValueError(f"{exercise.name} is defined in {path}, which the sandbox does not know")
        sources[path] = without_body(sources[path], exercise)
    top = _tops(unit)
    for path, text in sources.items():
        if path.is_relative_to(PACKAGE / "checks"):
            yield f"{NAME}/{path.relative_to(PACKAGE).as_posix()}", without_predictions(text)
        elif path.is_relative_to(PACKAGE):
            yield f"{NAME}/{path.relative_to(PACKAGE).as_posix()}", text
        else:
            yield f"{EXTRA}/{path.relative_to(top[path]).as_posix()}", text
    yield f"{NAME}/{MODULE}.py", SOURCE
    yield (
        f"{NAME}/checks/unit_{unit.number}/exercises.py",
        without_predictions(_checks_of(unit).read_text(encoding="utf-8")),
    )
    yield f"{NAME}/checks/notebook.py", _standin()
    for folder in ("grading", "grading/sandbox"):
        yield f"{NAME}/{folder}/__init__.py", ""
    for name in RUNNER:
        yield f"{NAME}/grading/sandbox/{name}", Path(__file__).with_name(name).read_text(encoding="utf-8")


def _library(unit: Unit) -> list[Path]:
    """The library's own files that are copied, unchanged or without bodies."""
    of_checks = {PACKAGE / "checks" / f"{name}.py" for name in OF_CHECKS | _checks_imported(unit)}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        top = path.relative_to(PACKAGE).parts[0]
        if path in of_checks or top not in LEFT_OUT | {"checks"}:
            found.append(path)
    return found


def _checks_imported(unit: Unit) -> set[str]:
    """The modules of `checks` that the unit's checks import, directly or indirectly.

    Raises:
        ValueError: the judge is among them, or something that only the judge may know.
    """
    found: set[str] = set()
    waiting = [_checks_of(unit)]
    while waiting:
        for name in _imported_of_checks(waiting.pop()) - found:
            path = PACKAGE / "checks" / f"{name}.py"
            if name in NEVER or path.name.startswith("answers"):
                raise ValueError(f"the checks of unit {unit.number} need checks/{name}.py, which is not in the sandbox")
            if path.is_file():
                found.add(name)
                waiting.append(path)
    return found - {"notebook"}


def _imported_of_checks(path: Path) -> set[str]:
    package = f"{NAME}.checks"
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            names.add(str(node.module).removeprefix(f"{package}.").replace(".", "/"))
    return names


def _checks_of(unit: Unit) -> Path:
    """The file with the unit's checks: the package's or the instructor's."""
    files = unit_files("exercises.py", f"unit_{unit.number}")
    if not files:
        raise ValueError(f"there is no unit_{unit.number}/exercises.py, which should contain the checks of the unit")
    return files[-1]


def _standin() -> str:
    """The source of the stand-in, with the exercises' modules and `unusable` (why an answer cannot be tried)."""
    objects = {e.name: e.object.__module__ for unit in units() for e in unit.exercises}
    text = inspect.getsource(standin)
    empty = "OBJECTS: dict[str, str] = {}"
    assert empty in text
    parts = [text.replace(empty, f"OBJECTS: dict[str, str] = {objects!r}")]
    parts += [inspect.getsource(function) for function in (notebook.unusable, notebook._in_words)]
    return "\n\n".join(parts)


# --- An instructor's own modules ------------------------------------------------------------------


def file_of(target: Any) -> Path:
    """Where an object is defined."""
    file = inspect.getsourcefile(inspect.unwrap(target))
    if file is None:
        raise ValueError(f"{target.__name__} has no source, so its body cannot be removed")
    return Path(file).resolve()


def _tops(unit: Unit) -> dict[Path, Path]:
    """The files of exercises' modules outside the library, each with its folder on the module search path."""
    tops: dict[Path, Path] = {}
    for exercise in unit.exercises:
        path = file_of(exercise.object)
        if path.is_relative_to(PACKAGE):
            continue
        name = exercise.object.__module__
        if "." in name:
            package = Path(str(sys.modules[name.partition(".")[0]].__file__)).resolve().parent
            tops |= dict.fromkeys(package.rglob("*.py"), package.parent)
        else:
            tops |= dict.fromkeys(_imported(path), path.parent)
    return tops


def _imported(path: Path) -> set[Path]:
    """A module, and the modules of the same folder that it imports, directly or indirectly."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            waiting += [p for name in names if (p := path.parent / f"{name.partition('.')[0]}.py").is_file()]
    return found


def _hidden(unit: Unit, folder: Path) -> Iterator[tuple[Path, Path]]:
    """The installed files of an instructor's modules, each with what to mount over it; compiled files too."""
    for path, top in _tops(unit).items():
        yield path, folder / EXTRA / path.relative_to(top)
        if (path.parent / "__pycache__").is_dir():
            yield path.parent / "__pycache__", folder / NAME / ASSETS


# --- Removing answers --------------------------------------------------------------------------------------


def without_body(text: str, exercise: Exercise) -> str:
    """A module's source without the body of an exercise, or of the methods that its `blank` names.

    Raises:
        ValueError: the object's source is not in the text.
    """
    whole = inspect.getsource(inspect.unwrap(exercise.object)).rstrip("\n")
    if text.count(whole) != 1:
        raise ValueError(f"the source of {exercise.name} has changed since it was imported; run the command again")
    kept: list[str] = []
    inside = False
    for line in solved_source(exercise.object, exercise.blank).splitlines():
        mark = line.strip()
        if mark == BEGIN:
            indent = line[: len(line) - len(line.lstrip())]
            kept += [
                f"{indent}from {NAME}.{MODULE} import taken_out",
                "",
                f"{indent}raise taken_out({exercise.name!r})",
            ]
        if mark in (BEGIN, END):
            inside = mark == BEGIN
        elif not inside:
            kept.append(line)
    return text.replace(whole, "\n".join(kept))


def without_predictions(text: str) -> str:
    """A module's source without `PREDICTIONS`, which contains the answers; other modules are unchanged."""
    tree = ast.parse(text)
    lines = text.splitlines(keepends=True)
    for statement in reversed(tree.body):
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "PREDICTIONS" for target in targets):
            lines[statement.lineno - 1 : statement.end_lineno] = ["PREDICTIONS = []\n"]
    return "".join(lines)
