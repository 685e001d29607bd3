"""`lora-from-scratch similar`: report answers in a class that are the same code apart from names and layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Compare the answers to a graded unit and write a report on answers that are the same code apart from names and layout,
for a person to judge. No points are changed. The report also says how often independent answers are the same.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "similar",
        help="report answers that are the same code (for instructors)",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("unit", metavar="UNIT", help='the unit, such as "09" or "unit_09"')
    parser.add_argument(
        "--course", type=Path, metavar="DIR", help="the course's folder (default: this folder or one above it)"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.grading.course_folder import open_course
    from lora_from_scratch.grading.similarity_report import write_similarity_report
    from lora_from_scratch.grading.tasks import unit_of

    unit = unit_of(Path(options.unit).stem.removeprefix("unit_").zfill(2))
    path, count = write_similarity_report(unit, open_course(f"unit_{unit.number}", options.course))
    print(f"pairs of learners with similar answers: {count}; report: {path}")
    return 0
