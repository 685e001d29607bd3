"""`lora-from-scratch build`: build the course's notebooks from their sources."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_from_scratch.grading.building.build import Built


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
    parser.add_argument(
        "--again", action="store_true", help="run the solved notebooks even if nothing that they depend on has changed"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="units to build at once, 2 GB of memory each (default: 2 if they fit)"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.grading.building import build

    root = options.root.resolve() if options.root else build.course_root()
    numbers = [unit.number for unit in build.find_units(options.units, root)]
    jobs = min(options.jobs or _jobs(), len(numbers))
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    task = functools.partial(_check if options.check else _build, root=root, again=options.again)
    refused = 0
    if jobs == 1:
        for number in numbers:
            refused += _report(number, task(number), root)
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for waiting in as_completed(futures := {pool.submit(task, number): number for number in numbers}):
                refused += _report(futures[waiting], waiting.result(), root)
    return 2 if refused else 0


def _check(number: str, root: Path, again: bool) -> list[str] | None:
    """The problems in a unit's source, or None if there are none."""
    from lora_from_scratch.grading.building import build
    from lora_from_scratch.grading.building.refused import Refused

    try:
        build.draft(build.find_units([number], root)[0], root)
    except Refused as refused:
        return refused.problems
    return None


def _build(number: str, root: Path, again: bool) -> list[str] | Built:
    """Build a unit; return it, or the problems in its source."""
    from lora_from_scratch.grading.building import build
    from lora_from_scratch.grading.building.refused import Refused

    try:
        return build.write(build.find_units([number], root)[0], root, again)
    except Refused as refused:
        return refused.problems


def _report(number: str, result: list[str] | Built | None, root: Path) -> bool:
    """Print the result for a unit and record it; return whether the unit was refused."""
    from lora_from_scratch.grading.building import dependencies

    if isinstance(result, list):
        print("\n  ".join([f"unit {number}: refused", *result]), file=sys.stderr)
        return True
    if result is None:
        print(f"unit {number}: no problems in the source")
        return False
    dependencies.record(root, result.name, result.hashes)
    if result.cost is None:
        print(f"unit {number}: written, but not run: nothing that its outputs depend on has changed", flush=True)
        return False
    cost = f"{result.cost.seconds:.0f} s of CPU time, {result.cost.mebibytes:.0f} MiB"
    print(f"unit {number}: run, because {' and '.join(result.why)}; {cost}", flush=True)
    for line in result.differences:
        print(f"  the output has changed: {line}", flush=True)
    return False


def _jobs() -> int:
    """Two if there are two cores and 6 GB of free memory, otherwise one."""
    import psutil

    return 2 if (os.cpu_count() or 1) > 1 and psutil.virtual_memory().available > 6e9 else 1
