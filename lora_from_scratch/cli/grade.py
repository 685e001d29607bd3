"""`lora-from-scratch grade`: from what was handed in to the gradebook, the feedback and a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_from_scratch.cli import INTERRUPTED
from lora_from_scratch.support.plain_text import one_line

if TYPE_CHECKING:
    from lora_from_scratch.grading.grade import Summary

DESCRIPTION = """\
Grades what lies in submitted/ of an nbgrader course: every notebook runs in a sandbox, the points are made outside it.
Writes nbgrader's gradebook, autograded/, feedback/, and a report: reports/unit_NN.html and .md. What is graded already
is not graded again unless it, the release or the checks have changed; so a run that was stopped goes on where it was.
Points and comments that a person gave stay.

exit code: 0 all is decided; 1 something needs a human (the report says what); 2 something could not be graded
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "grade",
        help="grade a unit (for instructors)",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("unit", metavar="UNIT", help='the unit, such as "09" or "unit_09"')
    parser.add_argument("--course", type=Path, metavar="DIR", help="the course's folder (default: found from here)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one a processor)")
    parser.add_argument(
        "--isolation",
        default="bubblewrap",
        choices=["bubblewrap", "none"],
        help="the sandbox (default), or none: submissions can do what you can do, and every report says so",
    )
    parser.add_argument("--again", action="store_true", help="grade everything again, also what has not changed")
    parser.add_argument("--db", metavar="URL", help="the gradebook, e.g. postgresql://user:password@host/name")
    parser.add_argument("--no-feedback", action="store_true", help="leave the feedback pages as they are")
    parser.add_argument("--cohort-seed", metavar="SECRET", help="the cohort's secret, the first time (default: made)")
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.grading.grade import Options, grade

    if options.workers < 0:
        raise ValueError(f"--workers must be at least 1, or 0 for one a processor, got {options.workers}")
    try:
        summary = grade(
            Path(options.unit).stem.removeprefix("unit_").zfill(2),
            Options(
                place=options.course,
                workers=options.workers,
                isolation=options.isolation,
                again=options.again,
                db=options.db,
                feedback=not options.no_feedback,
                cohort_seed=options.cohort_seed,
            ),
        )
    except KeyboardInterrupt:
        print("\nstopped; what is graded is kept, and the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    say(summary)
    return summary.code


def say(summary: Summary) -> None:
    """What was done, and what is left to do."""
    rows = summary.rows
    print(f"unit {summary.unit.number}: {len(rows)} submissions, {summary.marked} graded now", end="")
    print(f", in {summary.seconds:.0f} s", end="")
    if summary.peak_bytes:
        print(f"; {summary.workers} processes, each at most {summary.peak_bytes / 2**20:.0f} MiB", end="")
    print()
    people = [one_line(row.learner) for row in rows if row.needs_a_human]
    if people:
        shown = ", ".join(people[:10]) + (", ..." if len(people) > 10 else "")
        print(f"need a human: {len(people)} ({shown})")
    for sentence in summary.refused:
        print(f"not graded: {one_line(sentence)}", file=sys.stderr)
    if summary.failed:
        print(f"could not be graded: {summary.failed}; run the command again", file=sys.stderr)
    if summary.isolation == "none":
        print("graded without a sandbox (--isolation none)")
    print(f"report: {summary.course.report('.html')}")
