"""Grading a unit for a large class: memory, accuracy of the estimated remaining time, and scaling with the workers.

    python -m benchmarks.large_class [--unit 09] [--submissions 600] [--workers 1 2 4] [--stand-in]

The class is that of `benchmarks.grading_speed`, with a few random edits in each solved notebook. For each number of
workers, the class is graded from the beginning. The row shows the submissions per minute; the memory of the command
(which writes the gradebook) after a tenth of the class and at the end; and the remaining time that the progress bar
showed after a tenth, divided by the actual remaining time. Goals: memory grows by at most 100 MiB, and the estimated
remaining time is accurate within 20 %.

With `--stand-in`, submissions are marked without running them, which measures only the command itself: reading,
matching, the gradebook, and the notebooks for the formgrader.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.grading_speed import is_solution, make_course
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.finetune.peak_memory import resident_bytes
from lora_from_scratch.grading import marking_run
from lora_from_scratch.grading.grade import Options, grade
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.grading.marking import Settings, nothing

EDITS = ((" + ", " - "), ("==", "!="), ("0.0", "1.0"), ("dim=-1", "dim=0"), (" @ ", " * "), ("sqrt", "exp"))
MIB = 2**20
MOST_GROWTH, WITHIN = 100, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit", default="09")
    parser.add_argument("--submissions", type=int, default=600)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--stand-in", action="store_true", help="do not run the notebooks")
    parser.add_argument("--isolation", default="bubblewrap", choices=["bubblewrap", "none"])
    args = parser.parse_args()
    print("| Workers | Submissions a minute | MiB after a tenth | MiB at the end | Time left, said / taken |")
    print("|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        course = make_course(Path(folder) / "course", f"unit_{args.unit}", args.submissions)
        edit(course, f"unit_{args.unit}")
        for workers in args.workers:
            for left in ("graded", "autograded", "reports"):
                shutil.rmtree(course / left, ignore_errors=True)
            options = Options(place=course / "course", workers=workers, isolation=args.isolation, feedback=False)
            if args.stand_in:
                options = Options(
                    **{**vars(options), "marker": "benchmarks.large_class:mark_file", "isolation": "none"}
                )
            measured = Watched.grade(args.unit, options)
            print(f"| {workers} | {measured.row(args.submissions)} |", flush=True)


def edit(course: Path, unit: str) -> None:
    """Make the submissions differ by replacing a token in up to three answers of each."""
    draw = random.Random(0)
    for path in sorted(course.glob(f"submitted/*/{unit}/{unit}.ipynb")):
        notebook: Any = json.loads(path.read_text())
        cells = [cell for cell in notebook["cells"] if is_solution(_Cell(cell))]
        for cell in draw.sample(cells, min(3, len(cells))):
            old, new = draw.choice(EDITS)
            text = "".join(cell["source"])
            cell["source"] = f"{text.replace(old, new, 1)}\n# {draw.random()}"
        path.write_text(json.dumps(notebook))


class _Cell:
    """A notebook cell from a JSON document, with the attributes that `is_solution` reads."""

    def __init__(self, cell: dict[str, Any]) -> None:
        self.cell_type, self.metadata = cell["cell_type"], cell["metadata"]


class Watched(marking_run.Progress):
    """A progress bar that records memory and time."""

    last: Watched

    def __init__(self, name: str, submissions: int, workers: int, **options: Any) -> None:
        super().__init__(name, submissions, workers, disable=False, file=io.StringIO(), **options)
        self.submissions, self.started = submissions, time.monotonic()
        self.tenth: tuple[float, float, float] | None = None  # time, displayed remaining time, memory
        self.end = (0.0, 0.0)
        Watched.last = self

    def finished(self, count: int) -> None:
        super().finished(count)
        said = self.bar.format_dict
        if self.tenth is None and self.waiting == 0 and said["n"] >= self.submissions / 10:
            rate = (said["n"] - said["initial"]) / (time.time() - self.bar.start_t)
            self.tenth = (time.monotonic(), (self.submissions - said["n"]) / rate, resident_bytes() / MIB)
        self.end = (time.monotonic(), resident_bytes() / MIB)

    @classmethod
    def grade(cls, unit: str, options: Options) -> Watched:
        before, marking_run.Progress = marking_run.Progress, cls  # type: ignore[misc]
        try:
            grade(unit, options)
        finally:
            marking_run.Progress = before  # type: ignore[misc]
        return cls.last

    def row(self, submissions: int) -> str:
        assert self.tenth is not None
        when, left, memory = self.tenth
        end, most = self.end
        good = most - memory <= MOST_GROWTH and abs(left / (end - when) - 1) <= WITHIN
        rate = 60 * submissions / (end - self.started)
        return f"{rate:.0f} | {memory:.0f} | {most:.0f} | {left / (end - when):.2f}{'' if good else ' MISSED'}"


def mark_file(
    path: Path, released: Any, unit: Unit, learner: str, secret: str, settings: Settings, *, key: str = ""
) -> Graded:
    """A stand-in for marking: the submission is read and matched, but not run."""
    from lora_from_scratch.grading.submissions.choosing import choose

    choose(path, path.absolute().parents[2], released)
    return nothing(released, unit, learner, [Finding("stand-in", "note", "", "Not run.")], settings.isolation, key)


if __name__ == "__main__":
    main()
