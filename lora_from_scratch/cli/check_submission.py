"""`lora-from-scratch check-submission`: check the structure of a notebook before handing it in."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lora_from_scratch.cli.lab import NOTEBOOKS

COMPLETE, INCOMPLETE, UNGRADABLE = 0, 1, 2  # exit codes
LABELS = {"note": "note", "repaired": "fix", "lost": "lost", "human": "fix"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "check-submission",
        help="check a notebook before you hand it in",
        description="Report what grading will find in your notebook: missing, moved or duplicated cells, and parts "
        "that you have not written yet. Nothing is run and nothing is changed. Exit code 0: no problems; 1: there is "
        "something to fix or to write; 2: it cannot be graded.",
    )
    parser.add_argument(
        "notebook", type=Path, metavar="NOTEBOOK", help="your notebook, such as work/unit_09/unit_09.ipynb"
    )
    parser.add_argument("--unit", metavar="NN", help="the unit (default: taken from the notebook's name)")
    parser.add_argument(
        "--released",
        type=Path,
        metavar="FILE",
        help="the notebook as you received it (default: the installed course's own copy)",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Print each finding on one line and return the exit code.

    Raises:
        ValueError: the unit cannot be told from the notebook's name, or this is the released notebook itself.
        OSError: there is no such notebook.
    """
    from lora_from_scratch.grading.submissions.handing_in import look_at

    path: Path = options.notebook
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"there is no notebook {path}")
    released = _released(options)
    outlook = look_at(path, released)
    lines = [f"{LABELS[finding.severity]}: {finding.message}" for finding in outlook.findings]
    lines += [f"to do: {sentence}" for sentence in outlook.to_do]
    for line in lines:
        print(line.replace("`", ""))
    if not outlook.readable:
        print("This notebook cannot be graded.")
        return UNGRADABLE
    print(f"{outlook.written} of {outlook.all} exercises, predictions and open questions have been filled in.")
    if any(finding.severity != "note" for finding in outlook.findings) or outlook.to_do:
        return INCOMPLETE
    print("Nothing to fix. The checks in the notebook tell you whether your answers are right.")
    return COMPLETE


def _released(options: argparse.Namespace) -> object:
    """The notebook as the learner received it."""
    import nbformat

    file = options.released
    if file is None:
        found = re.search(r"unit[_ -]?(\d\d)", options.notebook.name.lower())
        number = (options.unit or (found[1] if found else "")).lower().removeprefix("unit").strip("_ ").zfill(2)
        if number == "00" and not found and not options.unit:
            raise ValueError(
                f"cannot tell the unit from the name {options.notebook.name}; give it with --unit, such as --unit 09"
            )
        file = NOTEBOOKS / f"unit_{number}" / f"unit_{number}.ipynb"
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; give the notebook as you received it with --released")
    if file.resolve() == options.notebook.resolve():
        raise ValueError(
            f"{file} is the course's own copy; check and hand in your copy (`lora-from-scratch lab` makes one)"
        )
    try:
        return nbformat.read(file, as_version=4)
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not a notebook: {error}") from None
