"""Grading N submissions of unit 09: our command, including the sandbox, against stock nbgrader; wall time and memory.

    python -m benchmarks.grading_speed [--submissions 60] [--workers 2] [--feedback] [--one-worker] [--patience R]
        [--write]

Both grade the same submissions, one after the other, in one run. Stock nbgrader is `nbgrader autograde` with its own
preprocessors (only its own Execute), in its single process. `--feedback` adds `nbgrader generate_feedback` to it and
the feedback pages to ours. Goal: ours takes at most 0.45 of its time on two cores. With `--patience R` stock nbgrader
is stopped when it has taken R times as long as ours; 1 / R is then an upper bound for the ratio. With `--one-worker`
the same class is graded a third time, by one worker, and the verdicts are compared byte for byte. `--write` writes the
table to grading.md.

Of every ten submissions six are solved, two have a wrong answer, one is not started, and one has the cells' metadata
removed. Memory is the high-water mark of each process, read from /proc while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.grading_table import Section, row

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.45
STOCK = """
from nbgrader.converters import Autograde
c.Autograde.sanitize_preprocessors = Autograde.sanitize_preprocessors.default()
c.Autograde.autograde_preprocessors = Autograde.autograde_preprocessors.default()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit", default="09")
    parser.add_argument("--submissions", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--feedback", action="store_true", help="also generate the feedback pages, in both")
    parser.add_argument("--one-worker", action="store_true", help="compare the verdicts with those of one worker")
    parser.add_argument("--patience", type=float, help="stop stock nbgrader after this many times our own time")
    parser.add_argument("--isolation", default="bubblewrap", choices=["bubblewrap", "none"])
    parser.add_argument("--write", action="store_true", help="write the table to grading.md")
    args = parser.parse_args()
    table = Section("Against stock nbgrader", "benchmarks.grading_speed")
    table.add(row(("", "seconds", "seconds per submission", "peak MiB of a process")), "|---|---:|---:|---|")
    unit = f"unit_{args.unit}"
    with tempfile.TemporaryDirectory() as folder:
        ours, one, stock = (
            make_course(Path(folder) / name, unit, args.submissions) for name in ("ours", "one", "stock")
        )
        with (stock / "course" / "nbgrader_config.py").open("a") as config:
            config.write(STOCK)
        command = [sys.executable, "-m", "lora_from_scratch", "grade", args.unit, "--cohort-seed=benchmark"]
        command += [f"--isolation={args.isolation}"] + ["--no-feedback"] * (not args.feedback)
        ours_took = run([[*command, f"--workers={args.workers}"]], ours)
        table.add(measured(f"ours, {args.workers} workers", args.submissions, ours_took))
        if args.one_worker:
            alone = run([[*command, "--workers=1"]], one)
            table.add(measured("ours, one worker", args.submissions, alone))
        nbgrader = [sys.executable, "-m", "nbgrader"]
        commands = [[*nbgrader, "autograde", unit]] + [[*nbgrader, "generate_feedback", unit]] * args.feedback
        stock_took = run(commands, stock, args.patience and args.patience * ours_took.seconds)
        table.add(measured("stock nbgrader", args.submissions, stock_took), "")
        if args.one_worker:
            table.add(*same_verdicts(ours, one))
        if stock_took.finished:
            table.add(same_points(ours, stock, unit))
    ratio = ours_took.seconds / stock_took.seconds
    bound = "" if stock_took.finished else "at most "
    reached = "met" if ratio <= GOAL else "not shown" if bound else "MISSED"
    table.add(f"Ratio of the times, ours to stock nbgrader's: {bound}{ratio:.2f}. Goal: at most {GOAL} ({reached}).")
    if args.write:
        table.write()


def make_course(root: Path, unit: str, count: int) -> Path:
    """Create a course folder with the unit released, entered in the gradebook, and handed in by a class."""
    import nbformat

    for folder in ("solutions", "notebooks"):
        shutil.copytree(ROOT / folder / unit, root / folder / unit)
    (root / "course").mkdir()
    shutil.copy(ROOT / "course" / "nbgrader_config.py", root / "course")
    run([[sys.executable, "-m", "nbgrader", "generate_assignment", unit, "--force"]], root)
    name = f"{unit}.ipynb"
    released = nbformat.read(root / "notebooks" / unit / name, as_version=4)
    solved = nbformat.read(root / "solutions" / unit / name, as_version=4)
    for number in range(count):
        path = root / "submitted" / f"learner{number:03}" / unit / name
        path.parent.mkdir(parents=True)
        nbformat.write(submission(released, solved, number), path)
    return root


def submission(released: Any, solved: Any, number: int) -> Any:
    """The submission of learner `number`."""
    import nbformat

    notebook = nbformat.from_dict(json.loads(nbformat.writes(released)))
    kind = number % 10
    if kind == 9:
        return notebook
    answers = {cell.metadata.nbgrader["grade_id"]: cell.source for cell in solved.cells if is_solution(cell)}
    places = [cell for cell in notebook.cells if is_solution(cell)]
    for place, cell in enumerate(places):
        cell.source = answers[cell.metadata.nbgrader["grade_id"]]
        if kind in (6, 7) and cell.source.startswith("def ") and place % 3 == kind - 6:
            cell.source = cell.source.replace("return ", "return 2 * ", 1)
    if kind == 8:
        for cell in notebook.cells:
            cell.metadata.pop("nbgrader", None)
    return notebook


def is_solution(cell: Any) -> bool:
    return cell.cell_type == "code" and bool(cell.metadata.get("nbgrader", {}).get("solution"))


class Timing(NamedTuple):
    seconds: float  # wall time
    memory: dict[str, float]  # peak MiB of a process, by kind of process
    finished: bool = True  # False: it was stopped


def run(commands: list[list[str]], root: Path, longest: float | None = None) -> Timing:
    """Run commands in the course, one after the other, and stop them after `longest` seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    began, peaks = time.perf_counter(), Peaks()
    for command in commands:
        log = root / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=root / "course", env=environment, stdout=file, stderr=file, start_new_session=True
            )
            with peaks.of(process.pid):
                try:
                    code = process.wait(longest and began + longest - time.perf_counter())
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    return Timing(time.perf_counter() - began, peaks.most, finished=False)
        # 1: something needs a human, or nbgrader could not grade a submission
        assert code in (0, 1), log.read_text(errors="replace")[-3000:]
    return Timing(time.perf_counter() - began, peaks.most)


class Peaks:
    """The memory high-water marks of a process and its descendants, by kind of process, sampled while it runs."""

    def __init__(self) -> None:
        self.most: dict[str, float] = defaultdict(float)
        self.pid = 0

    def of(self, pid: int) -> Peaks:
        self.pid = pid
        return self

    def __enter__(self) -> None:
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.stop.wait(0.05):
            below = [self.pid]
            for pid in below:
                below += children(pid)
            for pid in below:
                kind, mebibytes = look(pid, self.pid)
                self.most[kind] = max(self.most[kind], mebibytes)


def children(pid: int) -> list[int]:
    try:
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def look(pid: int, first: int) -> tuple[str, float]:
    """The kind of this process, and its peak memory in MiB."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "other", 0.0
    peak = next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)
    line = b" ".join(words)
    if pid == first:
        return "command", peak
    if b"spawn_main" in line:
        return "worker", peak
    if b"bwrap" in words[0] or b"resource_tracker" in line:
        return "other", peak
    return "kernel" if b"ipykernel" in line else "sandbox", peak


def measured(name: str, count: int, took: Timing) -> str:
    """A row of the table."""
    kinds = [(kind, peak) for kind, peak in sorted(took.memory.items()) if kind != "other" and peak >= 1]
    said = ", ".join(f"{kind} {peak:.0f}" for kind, peak in kinds)
    if took.finished:
        return row((name, f"{took.seconds:.1f}", f"{took.seconds / count:.2f}", said))
    return row((name, f"stopped after {took.seconds:.0f}, unfinished", "", said))


def same_verdicts(one: Path, other: Path) -> list[str]:
    """Whether all files that grading wrote are identical, byte for byte."""
    lines = []
    for folder in ("graded", "autograded"):
        mine, theirs = (contents(root / folder) for root in (one, other))
        differ = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        said = f"{len(differ)} of {len(mine)} files differ: {', '.join(differ[:4])}" if differ else "the same bytes"
        lines.append(f"One worker, {folder}/: {said}, {len(mine)} files.")
    return lines


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def same_points(ours: Path, stock: Path, unit: str) -> str:
    """How many submissions have the same points in both; where stock nbgrader fails, ours should have more."""
    from nbgrader.api import Gradebook

    totals = []
    for root in (ours, stock):
        with Gradebook(f"sqlite:///{root / 'gradebook.db'}") as gradebook:
            totals.append({one.student.id: round(one.score, 2) for one in gradebook.assignment_submissions(unit)})
    mine, theirs = totals
    other = [f"{who}: {mine[who]:g} and {theirs.get(who, 0):g}" for who in sorted(mine) if mine[who] != theirs.get(who)]
    return "; ".join((f"Same points: {len(mine) - len(other)} of {len(mine)}", *other[:6])) + "."


if __name__ == "__main__":
    main()
