"""The instructor's course folder: nbgrader's configuration, and the paths of all files that grading uses."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "nbgrader_config.py"
LONGEST_NAME = 128  # maximum length of a learner's name in nbgrader's gradebook


@dataclass(frozen=True)
class CourseFolder:
    """A course as nbgrader sees it, for one unit.

    Attributes:
        assignment: nbgrader's name for the unit: "unit_09".
        place: the folder of nbgrader_config.py.
        config: all of nbgrader's settings (traitlets' Config).
        directory: nbgrader's CourseDirectory.
    """

    assignment: str
    place: Path
    config: Any
    directory: Any

    @property
    def root(self) -> Path:
        return Path(self.directory.root)

    @property
    def db_url(self) -> str:
        return self.directory.db_url

    @property
    def released(self) -> Path:
        """The released notebook."""
        folder = self.directory.format_path(self.directory.release_directory, ".", self.assignment)
        return Path(os.path.normpath(folder)) / f"{self.assignment}.ipynb"

    @property
    def solved(self) -> Path:
        """The solved notebook, with answers and rubrics, from which the released one was made."""
        folder = self.directory.format_path(self.directory.source_directory, ".", self.assignment)
        return Path(os.path.normpath(folder)) / f"{self.assignment}.ipynb"

    @property
    def submitted(self) -> Path:
        """The folder below which no path may be a symbolic link."""
        return self.root / self.directory.submitted_directory

    def handed_in(self, learner: str) -> Path:
        return Path(self.directory.format_path(self.directory.submitted_directory, learner, self.assignment))

    def autograded(self, learner: str) -> Path:
        return Path(self.directory.format_path(self.directory.autograded_directory, learner, self.assignment))

    def feedback(self, learner: str) -> Path:
        return Path(self.directory.format_path(self.directory.feedback_directory, learner, self.assignment))

    def record(self, learner: str) -> Path:
        """The file with the learner's `Graded`."""
        return self.root / "graded" / learner / f"{self.assignment}.json"

    def failed(self, learner: str) -> Path:
        """The file with the key of the learner's submission that could not be marked last time."""
        return self.root / "graded" / learner / f"{self.assignment}.failed"

    def feedback_mark(self, learner: str) -> Path:
        """The file with the hash of the inputs of the learner's feedback page."""
        return self.root / "graded" / learner / f"{self.assignment}.feedback"

    @property
    def baseline(self) -> Path:
        """The points before the grading in progress; deleted when it is finished."""
        return self.root / "graded" / f".{self.assignment}.before.json"

    @property
    def version(self) -> Path:
        """The version of the course that the shards of the grading in progress have; deleted when it is finished."""
        return self.root / "graded" / f".{self.assignment}.version.json"

    @property
    def lock(self) -> Path:
        return self.root / "graded" / f".{self.assignment}.lock"

    @property
    def cache(self) -> Path:
        """The folder of grading's cache."""
        return self.root / "graded" / ".cache"

    def report(self, suffix: str) -> Path:
        return self.root / "reports" / f"{self.assignment}{suffix}"

    def learners(self) -> tuple[list[str], list[str]]:
        """The learners who have handed in the unit, in order, and a sentence for each folder that cannot be graded."""
        excluded = [name for name in self.directory.student_id_exclude.split(",") if name]
        names, refused = [], []
        for path, name in self._handed_in():
            if name in excluded:
                continue
            why = unfit(name) or _closed(path)
            if why:
                refused.append(f"{path.encode(errors='replace').decode()}: {why}")
            else:
                names.append(name)
        return names, refused

    def _handed_in(self) -> list[tuple[str, str]]:
        """The unit's folders, each with the learner's name. The course's own path is not read as a pattern."""
        step, root = self.directory.submitted_directory, str(self.root)
        pattern = self.directory.format_path(step, self.directory.student_id, self.assignment)
        wanted = self.directory.format_path(step, "(?P<student>.*)", re.escape(self.assignment), escape=True)
        inside = os.path.relpath(pattern, root)
        parts = Path(inside).parts
        there = max((n for n, part in enumerate(parts) if glob.has_magic(part)), default=len(parts) - 1) + 1
        found = []
        for start in sorted(glob.glob(os.path.join(*parts[:there]), root_dir=root, include_hidden=True)):
            path = os.path.join(root, start, *parts[there:])
            matched = re.fullmatch(wanted, path)
            if matched and (os.path.lexists(path) or _closed(path)):
                found.append((path, matched["student"]))
        return found


def open_course(assignment: str, place: Path | None = None, db: str | None = None) -> CourseFolder:
    """Read the course's configuration as nbgrader does: the user's own settings, then the course's.

    Args:
        place: the folder of nbgrader_config.py, or the parent of its folder `course`; None searches from the current
            folder upwards.
        db: the URL of the gradebook, instead of the configured one.

    Raises:
        FileNotFoundError: there is no configuration.
        ValueError: the configuration cannot be read, or the gradebook's URL is invalid.
    """
    from nbgrader.coursedir import CourseDirectory

    file = _find_config(place)
    config = _load(file)
    if db:
        config.CourseDirectory.db_url = db
    directory = CourseDirectory(config=config)
    if "root" not in config.CourseDirectory:
        directory.root = str(file.parent)
    directory.assignment_id = assignment
    _require_url(directory.db_url)
    return CourseFolder(assignment, file.parent, config, directory)


def without_password(url: str) -> str:
    """A gradebook's URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def _find_config(place: Path | None) -> Path:
    start = (place or Path.cwd()).resolve()
    for folder in (start, *([] if place else start.parents)):
        for file in (folder / CONFIG, folder / "course" / CONFIG):
            if file.is_file():
                return file
    where = f"in {place} or its folder course" if place else "here or above"
    raise FileNotFoundError(f"there is no {CONFIG} {where}; give the course's folder with --course")


def _load(file: Path) -> Any:
    from nbgrader.apps.baseapp import NbGrader

    quiet = logging.Logger("nbgrader", logging.ERROR)
    app = NbGrader(log=quiet)
    app.raise_config_file_errors = True
    try:
        with _inside(file.parent):
            app.load_config_file()
    except Exception as error:  # the file is Python: it can raise anything
        raise ValueError(f"{file} cannot be read: {type(error).__name__}: {error}") from None
    return app.config


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Change the current folder, where nbgrader looks for its configuration."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _require_url(url: str) -> None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        dialect = make_url(url).get_dialect()
        dialect.import_dbapi()
    except (ArgumentError, NoSuchModuleError):
        example = "sqlite:////home/me/gradebook.db or postgresql://user:password@host/gradebook"
        raise ValueError(f"the gradebook's URL is invalid; it should look like {example}") from None
    except ImportError:
        install = "for PostgreSQL: pip install -e '.[postgresql]' -c constraints.txt"
        raise ValueError(f"the database driver of {make_url(url).drivername} is not installed; {install}") from None


def unfit(name: str) -> str:
    """Why a learner of this name cannot be graded; "" if there is no obstacle."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "the learner's name is not UTF-8; rename the folder"
    if name != name.strip() or not name.isprintable():
        return "a learner's name must not begin or end with a space or contain control characters; rename the folder"
    if not name or "/" in name:
        return "a learner's name must not be empty or contain a slash"
    if name.startswith("."):
        return "nbgrader ignores folders whose names begin with a dot; rename it, or delete it if it belongs to nobody"
    if len(name) > LONGEST_NAME:
        return f"a learner's name must have at most {LONGEST_NAME} characters; rename the folder"
    return ""


def _closed(path: str) -> str:
    """Why a folder cannot be read; "" if it can, or does not exist."""
    try:
        with os.scandir(path):
            return ""
    except PermissionError:
        return f"you may not read it; give yourself access: chmod -R u+rwX {shlex.quote(path)}"
    except OSError:
        return ""
