"""`python -m benchmarks.answer_mutants`: see the package's docstring."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import os
import sys
from pathlib import Path

import benchmarks.answer_mutants
from benchmarks.answer_mutants.judging import SEEDS
from benchmarks.answer_mutants.report import judged, table, total
from lora_from_scratch.checks.units import units

TABLE = Path(__file__).parents[1] / "answer_mutants.md"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=benchmarks.answer_mutants.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", metavar="UNIT | EXERCISE", help="of these only; default: all")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), metavar="N", help="how many (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="at a time (%(default)s)")
    parser.add_argument("--list-survivors", action="store_true", help="those that pass without an explanation")
    parser.add_argument("--list-vague", action="store_true", help="those caught by a rule that says next to nothing")
    parser.add_argument("--list-all", action="store_true", help="all, with the message of the first seed")
    parser.add_argument("--write", action="store_true", help=f"write the table to {TABLE.name}")
    args = parser.parse_args()
    if args.write and args.what:
        parser.error("the table has all exercises: --write goes without UNIT or EXERCISE")
    every = [(unit, exercise) for unit in units() for exercise in unit.exercises]
    known = {unit.number for unit, _ in every} | {exercise.name for _, exercise in every}
    if strange := sorted(set(args.what) - known):
        parser.error(f"there is no unit or exercise {', '.join(strange)}")
    chosen = [(unit.number, one) for unit, one in every if not args.what or {unit.number, one.name} & set(args.what)]
    rows = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:  # each thread waits for a child process
        for row in pool.map(functools.partial(judged, seeds=range(args.seeds)), *zip(*chosen, strict=True)):
            rows.append(row)
            print(row.line(), flush=True)
            row.show_faults(survivors=args.list_survivors, vague=args.list_vague, everything=args.list_all)
    print(total(rows))
    if args.write:
        TABLE.write_text(table(rows), encoding="utf-8")
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
