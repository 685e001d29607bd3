"""`lora-from-scratch build`: build the course's notebooks from their sources."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "build",
        help="build the course's notebooks from their sources (for authors)",
        description="Build notebooks/ and solutions/ from course/units and the library. The solved notebooks are run "
        "from top to bottom, and nothing is written if anything is wrong. course/README.md explains how to "
        "write a unit.",
    )
    parser.add_argument(
        "units", nargs="*", metavar="UNIT", help='units to build, such as "01" (default: all that have a source)'
    )
    parser.add_argument("--check", action="store_true", help="only check the sources; run and write nothing")
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="the project's folder (default: this folder or one above it)"
    )
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
                print(f"unit {unit.number}: no problems in the source")
            else:
                cost = build.build(unit, root)
                print(f"unit {unit.number}: built; {cost.seconds:.0f} s of CPU time, {cost.mebibytes:.0f} MiB")
        except Refused as problem:
            refused += 1
            print(f"unit {unit.number}: refused", file=sys.stderr)
            for line in problem.problems:
                print(f"  {line}", file=sys.stderr)
    return 2 if refused else 0
