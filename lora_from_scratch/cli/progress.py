"""`lora-from-scratch progress`: show your progress in the course."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "progress",
        help="show your progress in the course",
        description="Show what you have passed in the course, by unit and by idea. Everything stays on this computer.",
    )
    parser.add_argument("unit", nargs="?", metavar="UNIT", help="the number of a unit, to list its exercises")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the tables."""
    from lora_from_scratch.checks.progress_report import report

    tables, notes = report(options.unit)
    print("\n\n".join([*(text for _, text in tables), "\n".join(notes)]))
    return 0
