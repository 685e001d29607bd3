"""Several runs in parallel, each in its own process, so that its peak memory can be measured.

Two processes with one thread each are faster than one process with two threads: small matrices do not keep two threads
busy. A finished run is not repeated unless something about it has changed.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, fields
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.evaluation import CARDS, Scores
from lora_from_scratch.finetune.run import REPORT, Report, Run, finetune
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import NonFiniteLossError, TrainingSettings
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.methods.method import Method
from lora_from_scratch.support.allocator import quick_allocator
from lora_from_scratch.support.files import write_json

FINISHED = "finished.json"  # beside a report: identifies the run that the report belongs to
KILLED = (
    "a training process was killed, possibly because memory ran out; "
    "run the same command again to resume from the last checkpoint"
)

Message = str | Report | Exception  # from the process of a run: what it prints, and finally its result


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jobs_at_once(jobs: int | None = None) -> int:
    """The number of runs to carry out at a time: `jobs`, or by default two if there are two cores.

    Raises:
        ValueError: `jobs` is less than 1.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    return jobs or min(2, cores())


def tuned_run(
    method: Method,
    output: Path,
    *,
    rate: float,
    model: str = "bundled",
    steps: int = defaults.STEPS,
    seed: int = 0,
    split: str = "test",
    cards: int = CARDS,
    device: str = "cpu",
) -> Run:
    """A run on the story cards, with settings that are the same for every method except the learning rate."""
    settings = TrainingSettings(
        steps=steps,
        learning_rate=rate,
        warmup_steps=defaults.warmup_steps_for(steps),
        weight_decay=defaults.WEIGHT_DECAY,
        seed=seed,
    )
    return Run(
        method=method,
        settings=settings,
        output=output,
        model=model,
        batch_size=defaults.BATCH_SIZE,
        device=device,
        split=split,
        cards=cards,
        overwrite=True,  # the demo and the shootout repeat changed runs in their own folders
    )


# --- Processes -------------------------------------------------------------------------------------


def run_in_processes(
    runs: Sequence[Run],
    jobs: int | None = None,
    done: Callable[[int, Report], object] | None = None,
    diverged: Callable[[int, NonFiniteLossError], object] | None = None,
) -> list[Report]:
    """Carry out runs, each in a new process, `jobs` of them at a time (see `jobs_at_once`); they share the cores.

    Args:
        done: called when a run is finished, with its index in `runs`.
        diverged: called for a run whose loss became infinite, which then has no report; None: raise the error.

    Returns:
        The reports, in the order of `runs`.

    Raises:
        ChildProcessError: a process was killed.
        ValueError, OSError: as for `finetune`. The other runs are stopped; all resume where they were if called again.
    """
    reports: dict[int, Report] = {}
    messages = _messages(runs, min(jobs_at_once(jobs), max(1, len(runs))))
    with closing(_Display(runs)) as display, closing(messages):
        for place, message in messages:
            display.show(place, message)
            if isinstance(message, Report):
                reports[place] = message
                if done:
                    done(place, message)
            elif isinstance(message, NonFiniteLossError) and diverged:
                diverged(place, message)
            elif isinstance(message, Exception):
                raise _with_run_name(runs[place], message)
    return [reports[place] for place in sorted(reports)]


def _messages(runs: Sequence[Run], at_once: int) -> Generator[tuple[int, Message], None, None]:
    """Yield the messages of the processes, each with the index of its run. Closing it early ends the processes."""
    waiting = list(range(len(runs)))
    running: dict[Connection, tuple[int, Any]] = {}  # connection -> index in `runs`, process
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                place = waiting.pop(0)
                connection, process = _start(runs[place], threads=max(1, cores() // at_once))
                running[connection] = place, process
            for connection in cast("list[Connection]", wait(list(running))):
                place, process = running[connection]
                try:
                    message: Message = connection.recv()
                except EOFError:
                    raise ChildProcessError(KILLED) from None
                if not isinstance(message, str):  # the last message
                    del running[connection]
                    process.join()
                yield place, message
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _start(run: Run, threads: int) -> tuple[Connection, Any]:
    """Start a process that carries out the run. Its messages are strings and finally a report or an error."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, finetune, run, threads), daemon=True)
    with quick_allocator():
        process.start()
    there.close()  # now only the child has it: if the child dies, `here` raises EOFError
    return here, process


def _child(connection: Connection, work: Callable[[Run], Report], run: Run, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends this process
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    sys.stdout = sys.stderr = _Sender(connection)
    try:
        connection.send(work(run))
    except Exception as error:
        error.add_note(traceback.format_exc())
        connection.send(error)


def _with_run_name(run: Run, error: Exception) -> Exception:
    """Prefix the message of a `ValueError` with the name of the run."""
    return ValueError(f"{run.output.name}: {error}") if isinstance(error, ValueError) else error


class _Sender(io.TextIOBase):
    """Sends the output of a process to the parent, which has the terminal."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def write(self, text: str) -> int:
        self.connection.send(text)
        return len(text)


class _Display:
    """Shows progress: a bar for each run in progress (on a terminal), and a line for each that has ended."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.names = [run.output.name for run in runs]
        self.began, self.ended = time.monotonic(), 0
        self.bars: dict[int, Any] = {}

    def show(self, place: int, message: Message) -> None:
        """Display a message of a run's process."""
        if not isinstance(message, str):
            self._end(place, "done" if isinstance(message, Report) else "failed")
        elif message.startswith("\r"):  # the process's own bar, "lora:  60%|######    | 300/500 [...]"
            self._bar(place, message.strip().partition(": ")[2])
        elif message == "\n" and place in self.bars:  # the end of that bar
            self._bar(place, "trained, evaluating")
        elif message.strip():
            tqdm.write(f"{self.names[place]}: {message.strip()}", file=sys.stderr)

    def _bar(self, place: int, text: str) -> None:
        if place not in self.bars and sys.stderr.isatty():
            self.bars[place] = tqdm(bar_format="{desc}", leave=False)
        if place in self.bars and text:
            width = max(map(len, self.names))
            self.bars[place].set_description_str(f"{self.names[place]:<{width}}  {text}")

    def _end(self, place: int, how: str) -> None:
        if place in self.bars:
            self.bars.pop(place).close()
        self.ended += 1
        to_come = len(self.names) - self.ended
        left = (time.monotonic() - self.began) / self.ended * to_come
        rest = f", about {_minutes(left)} left" if to_come else ""
        tqdm.write(f"{self.names[place]}: {how}, {self.ended} of {len(self.names)}{rest}", file=sys.stderr)

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()


def _minutes(seconds: float) -> str:
    return f"{math.ceil(seconds)} s" if seconds < 90 else f"{seconds / 60:.0f} min"


# --- Runs that are finished ------------------------------------------------------------------------


def run_or_reload(runs: Sequence[Run], jobs: int | None = None) -> list[Report]:
    """`run_in_processes`, but read the report of a run that is finished with the same settings, model and data.

    Raises:
        ChildProcessError, ValueError, OSError: as for `run_in_processes`.
    """
    identities = _identities(runs)
    reports = {place: report for place, run in enumerate(runs) if (report := finished_report(run, identities[place]))}
    missing = [place for place in range(len(runs)) if place not in reports]
    if reports:
        names = ", ".join(runs[place].output.name for place in sorted(reports))
        print(f"Already finished with the same settings: {names}", file=sys.stderr)

    for place in missing:
        (runs[place].output / FINISHED).unlink(missing_ok=True)  # it belongs to an old report

    def keep(number: int, report: Report) -> None:
        place = missing[number]
        reports[place] = report
        write_json(runs[place].output / FINISHED, identities[place])

    if missing:
        run_in_processes([runs[place] for place in missing], jobs, keep)
    return [reports[place] for place in range(len(runs))]


def reload(runs: Sequence[Run]) -> list[Report | None]:
    """The reports of those of the runs that are finished with the same settings, model and data."""
    return [finished_report(run, identity) for run, identity in zip(runs, _identities(runs), strict=True)]


def _identities(runs: Sequence[Run]) -> list[dict[str, Any]]:
    data = {name: zlib.crc32(repr(load_dataset(name)).encode()) for name in {run.data for run in runs}}
    models = {name: model_fingerprint(name) for name in {run.model for run in runs}}
    return [_identity(run, models[run.model], data[run.data]) for run in runs]


def _identity(run: Run, model: str, data: int) -> dict[str, Any]:
    """Everything that a run's report depends on, as JSON: settings, weights, examples, but not the output folder."""
    settings = {
        name: value for name, value in asdict(run).items() if name not in ("output", "checkpoint_every", "overwrite")
    }
    document = {"method": run.method.name, "run": settings, "model": model, "data": data}
    loaded: dict[str, Any] = json.loads(json.dumps(document, default=str))
    return loaded


def model_fingerprint(model: str) -> str:
    """A CRC-32 of a checkpoint's files, to tell models apart."""
    crc = 0
    for file in sorted(checkpoint_directory(model).iterdir()):
        if file.suffix in (".safetensors", ".bin", ".json", ".txt"):
            crc = zlib.crc32(file.read_bytes(), crc)
    return f"{crc:08x}"


def finished_report(run: Run, wanted: dict[str, Any]) -> Report | None:
    """The report in the output folder of this run, if it belongs to the same run."""
    try:
        if json.loads((run.output / FINISHED).read_text(encoding="utf-8")) != wanted:
            return None
        return read_report(run.output / REPORT)
    except (OSError, ValueError):  # missing or damaged: carry out the run
        return None


def read_report(path: Path) -> Report:
    """Read a report written by `finetune`. A number that is null in the file was infinite.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    try:
        values = {f.name: document["report"][f.name] for f in fields(Report)}
        scores = values["scores"]
        if scores is not None:
            values["scores"] = Scores(**{k: math.inf if v is None else v for k, v in scores.items()})
        if values["tale_perplexity_before"] is None:
            values["tale_perplexity_before"] = math.nan
        return Report(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the report of a run: {error}") from None
