"""`lora-from-scratch check-submission`: what grading will say of your notebook's structure, before you hand it in."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lora_from_scratch.cli.lab import NOTEBOOKS
from lora_from_scratch.support.plain_text import one_line

FINE, TO_MEND, UNUSABLE = 0, 1, 2
MARKS = {"note": "note", "repaired": "mend", "lost": "lost", "human": "mend"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "check-submission",
        help="check a notebook before you hand it in",
        description="Says what grading will find in your notebook: cells that are missing, moved or there twice, and "
        "what is not written yet. Nothing is run and nothing is changed. Exit code 0: all is well; 1: there is "
        "something to mend or to write; 2: it cannot be graded.",
    )
    parser.add_argument("notebook", type=Path, metavar="NOTEBOOK", help="yours, such as work/unit_09/unit_09.ipynb")
    parser.add_argument("--unit", metavar="NN", help="the unit (default: from the notebook's name)")
    parser.add_argument(
        "--released",
        type=Path,
        metavar="FILE",
        help="the notebook as you got it (default: the one of the course that is installed here)",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Print what was found, one line each.

    Raises:
        ValueError: it cannot be known which unit it is, or it is the released notebook itself.
        OSError: there is no such notebook.
    """
    from lora_from_scratch.grading.submissions.handing_in import look_at

    path: Path = options.notebook
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"there is no notebook {path}")
    released = _released(options)
    outlook = look_at(path, released)
    lines = [f"{MARKS[finding.severity]}: {finding.message}" for finding in outlook.findings]
    lines += [f"to do: {sentence}" for sentence in outlook.to_do]
    for line in lines:
        print(one_line(line).replace("`", ""))
    if not outlook.readable:
        print("This cannot be graded.")
        return UNUSABLE
    print(f"{outlook.written} of {outlook.all} exercises, predictions and open questions have something in them.")
    if any(finding.severity != "note" for finding in outlook.findings) or outlook.to_do:
        return TO_MEND
    print("Nothing to mend. Whether the answers are right, the checks in the notebook tell you.")
    return FINE


def _released(options: argparse.Namespace) -> object:
    """The notebook that the learner got."""
    import nbformat

    file = options.released
    if file is None:
        found = re.search(r"unit[_ -]?(\d\d)", options.notebook.name.lower())
        number = (options.unit or (found[1] if found else "")).lower().removeprefix("unit").strip("_ ").zfill(2)
        if number == "00" and not found and not options.unit:
            raise ValueError(f"which unit is {options.notebook.name}? Say it with --unit, for example --unit 09")
        file = NOTEBOOKS / f"unit_{number}" / f"unit_{number}.ipynb"
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; name the notebook as you got it with --released")
    if file.resolve() == options.notebook.resolve():
        raise ValueError(
            f"{file} is the course's own copy; check and hand in yours (`lora-from-scratch lab` makes one)"
        )
    try:
        return nbformat.read(file, as_version=4)
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not a notebook: {error}") from None
