"""The table of units and points in course/syllabus.md, generated from the units.

python -m lora_from_scratch.grading.building.syllabus      # writes it
"""

from __future__ import annotations

import re
from pathlib import Path

from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.support.files import write_atomically

BEGIN, END = "<!-- units:", "<!-- end -->"
HEAD = """\
| Unit | Exercises | Minutes for exercises | Points: exercises | Predictions | Open question | Total |
|---|---:|---:|---:|---:|---:|---:|
"""


def table(root: Path) -> str:
    """A row for each unit, the totals, and a sentence on what the command `progress` counts of them."""
    rows = [_row(unit, root) for unit in units()]
    sums = [sum(row[column] for row in rows) for column in range(6)]
    lines = [f"| {unit.number} {unit.title} | {_cells(row)} |\n" for unit, row in zip(units(), rows, strict=True)]
    counted = (
        "\nThe command `lora-from-scratch progress` counts exercises and predictions, "
        f"{sums[2] + sums[3]} of these points; the other {sums[4]} are open questions.\n"
    )
    return HEAD + "".join(lines) + f"| **Total** | {_cells(sums)} |\n" + counted


def _row(unit: Unit, root: Path) -> list[int]:
    exercises = [item.points for item in unit.exercises]
    minutes = sum(item.minutes for item in unit.exercises if isinstance(item, Exercise))
    predictions = sum(item.points for item in unit.predictions)
    text = (root / "course" / "units" / f"unit_{unit.number}.py").read_text(encoding="utf-8")
    by_hand = sum(int(points) for points in re.findall(r'^# %%.*open_question="\w+" points=(\d+)', text, re.MULTILINE))
    return [len(exercises), minutes, sum(exercises), predictions, by_hand, sum(exercises) + predictions + by_hand]


def _cells(row: list[int]) -> str:
    return " | ".join(f"{number:,}" for number in row)


def renewed(text: str, root: Path) -> str:
    """The syllabus with an up-to-date table.

    Raises:
        ValueError: the syllabus lacks the markers around the table.
    """
    found = re.search(rf"({re.escape(BEGIN)}[^\n]*\n).*?({re.escape(END)})", text, re.DOTALL)
    if not found:
        raise ValueError(
            f"the syllabus has no markers for the table: it needs a line that begins with {BEGIN} and a line {END}"
        )
    return text[: found.end(1)] + table(root) + text[found.start(2) :]


def main() -> None:
    root = Path(__file__).parents[3]
    place = root / "course" / "syllabus.md"
    text = renewed(place.read_text(encoding="utf-8"), root)
    write_atomically(place, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
