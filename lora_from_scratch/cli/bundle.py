"""`lora-from-scratch bundle`: create an autograder for Gradescope or PrairieLearn from this course's checks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

DESCRIPTION = """\
Write a zip file for another platform: for Gradescope, the autograder to upload; for PrairieLearn, a question and the
sources of its image. Both give the same points as `grade`. The file contains the cohort's secret, so do not share it.
The instructor guide describes how well the containers isolate a learner's code.
"""
IMAGE = "lora-from-scratch-grader"


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bundle",
        help="create an autograder for Gradescope or PrairieLearn (for instructors)",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("unit", metavar="UNIT", help='the unit, such as "09" or "unit_09"')
    parser.add_argument(
        "--for", dest="platform", required=True, choices=["gradescope", "prairielearn"], help="the platform"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the zip file (default: PLATFORM-unit_NN.zip in this folder)"
    )
    parser.add_argument(
        "--visibility",
        default="visible",
        choices=["visible", "after_due_date", "after_published", "hidden"],
        help="when learners see the results on Gradescope (default: visible)",
    )
    parser.add_argument(
        "--image", default=IMAGE, metavar="NAME", help=f"the image's name for PrairieLearn (default: {IMAGE})"
    )
    parser.add_argument(
        "--course", type=Path, metavar="DIR", help="the course's folder (default: this folder or one above it)"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.grading.cohort import secret_of
    from lora_from_scratch.grading.course_folder import open_course
    from lora_from_scratch.grading.platforms.bundle import Platform, write_bundle
    from lora_from_scratch.grading.tasks import unit_of

    unit = unit_of(Path(options.unit).stem.removeprefix("unit_").zfill(2))
    course = open_course(f"unit_{unit.number}", options.course)
    if not course.released.is_file():
        raise FileNotFoundError(f"there is no {course.released}; release the unit first")
    platform: Platform = options.platform
    assert platform in get_args(Platform)
    path = options.output or Path(f"{platform}-{course.assignment}.zip")
    write_bundle(platform, unit, course.released, secret_of(course.root), path, options.visibility, options.image)
    most = sum(item.points for item in unit.checked)
    print(f"{path}: {most:g} points are given automatically; open questions are graded by hand")
    return 0
