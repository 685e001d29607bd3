"""`lora-from-scratch teaching`: report how a unit can be improved, based on the results of a class."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Write a report on a graded unit: for each exercise, the share of right answers, the tries, opened hints and time, the
most common misconceptions, and the wrong answers without a diagnosis, grouped by behavior; and suggestions which hint,
sentence or message to improve. The report contains no names. Tries, hints and times are known only for learners who
hand in ~/.lora-from-scratch/progress.json with their notebook.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "teaching",
        help="report what to improve in a unit (for instructors)",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("unit", metavar="UNIT", help='the unit, such as "09" or "unit_09"')
    parser.add_argument(
        "--progress",
        type=Path,
        metavar="DIR",
        help="a folder with LEARNER.json for learners who did not hand in their progress file",
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
