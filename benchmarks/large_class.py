"""Grading a unit for a large class: memory, accuracy of the estimated remaining time, and scaling with the workers.

    python -m benchmarks.large_class [--unit 09] [--submissions 600] [--workers 1 2 4] [--stand-in] [--write]

The class is that of `benchmarks.grading_speed`, with up to three answers of each notebook replaced: half of them by an
answer from the bank, right or wrong (except those that never end), half by a random edit. For each number of workers,
the class is graded from the beginning. The row shows the submissions per minute; the memory of the command
(which writes the gradebook) after a tenth of the class and at the end; and the remaining time that the progress bar
showed after a tenth, divided by the actual remaining time. Goals: memory grows by at most 100 MiB, and the estimated
remaining time is accurate within 20 %.

With `--stand-in`, submissions are marked without running them, which measures only the command itself: reading,
matching, the gradebook, and the notebooks for the formgrader. `--write` writes the table to grading.md.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import io
import json
import random
import shutil
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

from benchmarks.grading_speed import is_solution, make_course
from benchmarks.grading_table import Section
from lora_from_scratch.checks import bank
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.finetune.peak_memory import resident_bytes
from lora_from_scratch.grading import marking_run
from lora_from_scratch.grading.grade import Options, grade
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.grading.marking import Settings, nothing

EDITS = ((" + ", " - "), ("==", "!="), ("0.0", "1.0"), ("dim=-1", "dim=0"), (" @ ", " * "), ("sqrt", "exp"))
BANK = "lora_from_scratch.checks"
MIB = 2**20
MOST_GROWTH, WITHIN = 100, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit", default="09")
    parser.add_argument("--submissions", type=int, default=600)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--stand-in", action="store_true", help="do not run the notebooks")
    parser.add_argument("--isolation", default="bubblewrap", choices=["bubblewrap", "none"])
    parser.add_argument("--write", action="store_true", help="write the table to grading.md")
    args = parser.parse_args()
    table = Section("A large class", "benchmarks.large_class")
    table.add(
        "| Workers | Submissions a minute | MiB after a tenth | MiB at the end | Time left, said / taken | Report |",
        "|---:|---:|---:|---:|---:|---:|",
    )
    with tempfile.TemporaryDirectory() as folder:
        course = make_course(Path(folder) / "course", f"unit_{args.unit}", args.submissions)
        made = edit(course, f"unit_{args.unit}")
        for workers in args.workers:
            for left in ("graded", "autograded", "reports"):
                shutil.rmtree(course / left, ignore_errors=True)
            options = Options(place=course / "course", workers=workers, isolation=args.isolation, feedback=False)
            if args.stand_in:
                options = Options(
                    **{**vars(options), "marker": "benchmarks.large_class:mark_file", "isolation": "none"}
                )
            measured = Watched.grade(args.unit, options)
            size = (course / "reports" / f"unit_{args.unit}.html").stat().st_size / 1000
            table.add(f"| {workers} | {measured.row(args.submissions)} | {size:.0f} kB |")
    table.add("", f"{args.submissions} submissions of unit {args.unit}, of which {made}.")
    if args.write:
        table.write()


def edit(course: Path, unit: str) -> str:
    """Replace up to three answers of each submission, or a token in them; returns a sentence on how many differ."""
    draw, texts, taken, edited = random.Random(0), set(), 0, 0
    for path in sorted(course.glob(f"submitted/*/{unit}/{unit}.ipynb")):
        notebook: Any = json.loads(path.read_text())
        cells = [cell for cell in notebook["cells"] if is_solution(_Cell(cell))]
        for cell in draw.sample(cells, min(3, len(cells))):
            answers = from_bank(cell["metadata"]["nbgrader"]["grade_id"])
            if answers and draw.random() < 0.5:
                cell["source"], taken = draw.choice(answers), taken + 1
                continue
            old, new = draw.choice(EDITS)
            text = "".join(cell["source"])
            cell["source"], edited = f"{text.replace(old, new, 1)}\n# {draw.random()}", edited + 1
        path.write_text(json.dumps(notebook))
        texts.add(path.read_text())
    return f"{len(texts)} differ; {taken} answers were taken from the bank and {edited} were edited"


@functools.cache
def from_bank(exercise: str) -> tuple[str, ...]:
    """The bank's answers to an exercise as the sources of cells. One that uses another answer fails in the notebook."""
    sources = []
    for answer in (*bank.right_answers(exercise), *bank.wrong_answers(exercise)):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(answer.object)))
            module = ast.parse(inspect.getsource(sys.modules[answer.object.__module__]))
        except (OSError, TypeError, SyntaxError):
            continue
        used = [line for line in module.body if isinstance(line, ast.Import | ast.ImportFrom)]
        imports = [ast.unparse(line) for line in used if not getattr(line, "module", "").startswith(BANK)]
        [made] = tree.body[:1]
        if isinstance(made, ast.FunctionDef | ast.ClassDef) and not answer.hangs:
            made.decorator_list, made.name = [], exercise
            sources.append("\n".join((*imports, "", ast.unparse(made))))
    return tuple(sources)


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
        measured = self.waiting == 0 and said["n"] > said["initial"]  # after each worker's first submission
        if self.tenth is None and measured and said["n"] >= self.submissions / 10:
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
        if self.tenth is None:
            raise ValueError(f"{submissions} submissions are too few to measure the time left")
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
