"""`lora-from-scratch course`: a copy of the course's files for teaching it."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_from_scratch.support.course_files import copy_unchanged, course_files
from lora_from_scratch.support.translated_files import files_in
from lora_from_scratch.support.translation import ENGLISH, LANGUAGES

FOLDERS = ("notebooks", "solutions", "course")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "course",
        help="copy the course's files for teaching it (for instructors)",
        description="Copy the notebooks, the solutions and course/ (sources of the units, nbgrader's configuration, "
        "guides) into a folder in which `build`, `grade` and nbgrader can be run. Run it again after an upgrade: files "
        "that you have changed are kept, the others are brought up to date.",
    )
    parser.add_argument(
        "--language",
        choices=sorted(LANGUAGES),
        default=ENGLISH,
        help="the language of the notebooks: en or zh (unit 26, rubrics and guides are in English); default: en",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder; created if it does not exist")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print what was copied.

    Raises:
        ValueError: the folder is the one that the files come from.
        OSError: the folder cannot be written to.
    """
    source, folder = course_files(), options.folder
    if folder.resolve() == source.resolve():
        raise ValueError(f"{folder} is where the course's files are; name another folder")
    with files_in(options.language, source, FOLDERS) as files:
        copied = copy_unchanged(files, folder, FOLDERS)
    print(f"{len(copied.new)} new and {len(copied.updated)} updated files in {folder}.")
    for name in copied.kept:
        print(f"There is a newer version of {name}; yours was kept.")
    print(f"Read {folder / 'course' / 'instructor_guide.md'} first.")
    return 0
