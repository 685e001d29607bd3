"""`lora-from-scratch build`: the course's notebooks from their sources."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "build",
        help="build the course's notebooks from their sources (for authors)",
        description="Builds notebooks/ and solutions/ from course/units and the library: the solved notebooks are run "
        "from top to bottom, and nothing is written when anything is wrong. course/README.md says how a "
        "unit is written.",
    )
    parser.add_argument(
        "units", nargs="*", metavar="UNIT", help='units, such as "01" (default: all that have a source)'
    )
    parser.add_argument("--check", action="store_true", help="check the sources only; run and write nothing")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the project's folder (default: found from here)")
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.grading.building import build
    from lora_from_scratch.grading.building.refused import Refused

    root = options.root.resolve() if options.root else build.course_root()
    refused = 0
    for unit in build.find_units(options.units, root):
        try:
            if options.check:
                build.draft(unit, root)
                print(f"unit {unit.number}: nothing to mend before it is run")
            else:
                cost = build.build(unit, root)
                print(f"unit {unit.number}: built; {cost.seconds:.0f} s of processor time, {cost.mebibytes:.0f} MiB")
        except Refused as problem:
            refused += 1
            print(f"unit {unit.number}: refused", file=sys.stderr)
            for line in problem.problems:
                print(f"  {line}", file=sys.stderr)
    return 2 if refused else 0
