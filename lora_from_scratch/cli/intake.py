"""`lora-from-scratch intake`: import submissions downloaded from Canvas, Moodle or Gradescope."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lora_from_scratch.support.plain_text import one_line

DESCRIPTION = """\
Copy downloaded submissions to submitted/LEARNER/unit_NN/, where `grade` reads them. A download is the zip file from
Canvas ("Download Submissions"), Moodle ("Download all submissions") or Gradescope ("Export Submissions"), without
changes, or the folder into which it was unpacked. The learners are those in the gradebook and in --roster.

exit code: 0 all submissions were imported; 1 some need the attention of a person
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "intake",
        help="import submissions downloaded from a platform (for instructors)",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("unit", metavar="UNIT", help='the unit, such as "09" or "unit_09"')
    parser.add_argument("downloads", type=Path, nargs="+", metavar="DOWNLOAD", help="a zip file or folder")
    parser.add_argument(
        "--roster",
        type=Path,
        action="append",
        default=[],
        metavar="CSV",
        help="a table of learners in addition to the gradebook: Canvas's gradebook export, Moodle's grading worksheet "
        "(with the times of submission), Gradescope's roster, or a list for `nbgrader db student import`; repeatable",
    )
    parser.add_argument("--replace", action="store_true", help="replace existing work that differs from the download")
    parser.add_argument(
        "--timezone", default="UTC", metavar="NAME", help="the time zone of Moodle's times, such as Europe/Oslo"
    )
    parser.add_argument(
        "--course", type=Path, metavar="DIR", help="the course's folder (default: this folder or one above it)"
    )
    parser.add_argument("--db", metavar="URL", help="the gradebook's URL, as for `grade`")
    return parser


def run(options: argparse.Namespace) -> int:
    from zoneinfo import ZoneInfo

    from lora_from_scratch.grading.course_folder import open_course
    from lora_from_scratch.grading.gradebook import students_of
    from lora_from_scratch.grading.intake.roster import read_roster
    from lora_from_scratch.grading.intake.take_in import take_in
    from lora_from_scratch.grading.tasks import unit_of

    try:
        ZoneInfo(options.timezone)
    except (ValueError, KeyError):
        raise ValueError(f"--timezone should be a name such as Europe/Oslo or UTC, got {options.timezone!r}") from None
    unit = unit_of(Path(options.unit).stem.removeprefix("unit_").zfill(2))
    course = open_course(f"unit_{unit.number}", options.course, options.db)
    roster = read_roster(students_of(course), options.roster)
    if not roster.learners:
        raise ValueError("nobody is in the gradebook; give a table of learners with --roster")
    done = take_in(course, options.downloads, roster, options.timezone, replace=options.replace)
    print(f"{course.assignment}: {len(done.new)} taken in", end="")
    print(f", {len(done.replaced)} replaced, {len(done.unchanged)} unchanged")
    if done.kept:
        who = ", ".join(map(one_line, done.kept))
        print(f"kept, though the download differs (take the new work with --replace): {who}", file=sys.stderr)
    for sentence in done.problems:
        print(f"needs a person: {one_line(sentence)}", file=sys.stderr)
    return 1 if done.problems or done.kept else 0
