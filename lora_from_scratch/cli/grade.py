"""`lora-from-scratch grade`: grade submissions and write the gradebook, the feedback and a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_from_scratch.cli import INTERRUPTED
from lora_from_scratch.support.plain_text import one_line

if TYPE_CHECKING:
    from lora_from_scratch.grading.shards import ShardSummary
    from lora_from_scratch.grading.summary import Summary

DESCRIPTION = """\
Grade everything in submitted/ of an nbgrader course. Every notebook runs in a sandbox; the points are computed outside
it. Writes nbgrader's gradebook, autograded/, feedback/, and a report: reports/unit_NN.html and .md. A submission is
graded again only if it, the release or the checks have changed, so a run that was stopped resumes where it was.
Points and comments given by hand are kept.

exit code: 0 everything is graded; 1 something needs a human (see the report); 2 something could not be graded
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "grade",
        help="grade a unit (for instructors)",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("unit", metavar="UNIT", help='the unit, such as "09" or "unit_09"')
    parser.add_argument(
        "--course", type=Path, metavar="DIR", help="the course's folder (default: this folder or one above it)"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="worker processes (default: one per CPU)")
    parser.add_argument(
        "--isolation",
        default="bubblewrap",
        choices=["bubblewrap", "none"],
        help="the sandbox (default), or none: submissions then run with your permissions, and every report says so",
    )
    parser.add_argument("--again", action="store_true", help="grade everything again, even what has not changed")
    parser.add_argument("--db", metavar="URL", help="the gradebook, such as postgresql://user:password@host/name")
    parser.add_argument("--no-feedback", action="store_true", help="do not write feedback pages")
    parser.add_argument(
        "--cohort-seed", metavar="SECRET", help="the cohort's secret, on the first run (default: generated)"
    )
    machines = parser.add_argument_group("several machines (docs/clusters.md)")
    machines.add_argument(
        "--shard", metavar="K/N", help="mark only shard K of N, and write neither gradebook nor report"
    )
    machines.add_argument(
        "--cluster", metavar="ADDRESS", help="mark on the Dask cluster of this scheduler, such as tcp://10.0.0.1:8786"
    )
    machines.add_argument("--collect", action="store_true", help="mark nothing; enter what the shards have marked")
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.grading.grade import Options, grade
    from lora_from_scratch.grading.shards import grade_shard
    from lora_from_scratch.support.shard import parse_shard

    if options.workers < 0:
        raise ValueError(f"--workers must be at least 1, or 0 for one per CPU, got {options.workers}")
    if options.collect and (options.shard or options.again):
        raise ValueError("--collect marks nothing, so it does not go with --shard or --again")
    if options.cluster and (options.shard or options.collect):
        raise ValueError("--cluster does it all, so it does not go with --shard or --collect")
    number = Path(options.unit).stem.removeprefix("unit_").zfill(2)
    settings = Options(
        place=options.course,
        workers=options.workers,
        isolation=options.isolation,
        again=options.again,
        collect=options.collect,
        cluster=options.cluster,
        db=options.db,
        feedback=not options.no_feedback,
        cohort_seed=options.cohort_seed,
    )
    try:
        if options.shard:
            return print_shard(grade_shard(number, parse_shard(options.shard), settings))
        summary = grade(number, settings)
    except KeyboardInterrupt:
        print("\nstopped; finished grading is kept, run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    print_summary(summary)
    return summary.code


def print_shard(summary: ShardSummary) -> int:
    """Print what a shard has done; returns the exit code."""
    print(
        f"unit {summary.unit}, shard {summary.shard}: {summary.learners} submissions, {summary.marked} graded now",
        end="",
    )
    print(f", in {summary.seconds:.0f} s")
    for sentence in summary.trouble:
        print(f"not graded: {one_line(sentence)}", file=sys.stderr)
    return 2 if summary.trouble else 0


def print_summary(summary: Summary) -> None:
    """Print what was graded and what is left to do."""
    rows = summary.rows
    print(f"unit {summary.unit.number}: {len(rows)} submissions, {summary.marked} graded now", end="")
    print(f", in {summary.seconds:.0f} s", end="")
    if summary.peak_bytes:
        print(f"; {summary.workers} processes of at most {summary.peak_bytes / 2**20:.0f} MiB each", end="")
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
