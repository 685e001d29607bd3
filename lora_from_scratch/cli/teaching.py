"""`lora-from-scratch teaching`: what a class teaches about a unit, so that the unit can be improved."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Write a page about a unit that has been graded: per exercise, how many are right, tries, hints opened, time, the
commonest misconceptions, and wrong answers without a diagnosis grouped by what they do; and, from these, which hint,
sentence or message to improve. The page names nobody. Tries, hints and times are known of learners who hand in
~/.lora-from-scratch/progress.json beside their notebook.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "teaching",
        help="show what to improve in a unit (for instructors)",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("unit", metavar="UNIT", help='the unit, such as "09" or "unit_09"')
    parser.add_argument(
        "--progress",
        type=Path,
        metavar="DIR",
        help="a folder with LEARNER.json, for learners who did not hand theirs in",
    )
    parser.add_argument(
        "--course", type=Path, metavar="DIR", help="the course's folder (default: this folder or one above it)"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.grading.course_folder import open_course
    from lora_from_scratch.grading.tasks import unit_of
    from lora_from_scratch.grading.teaching import write_teaching_report

    unit = unit_of(Path(options.unit).stem.removeprefix("unit_").zfill(2))
    course = open_course(f"unit_{unit.number}", options.course)
    print(f"report: {write_teaching_report(unit, course, options.progress)}")
    return 0
