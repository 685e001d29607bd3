"""Observe a notebook in the sandbox: run it, restart after crashes, and repeat where the library was needed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import lora_from_scratch
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading.sandbox import bubblewrap, forkserver, supervisor, wire
from lora_from_scratch.grading.sandbox.frames import FrameReader, PartialObservations
from lora_from_scratch.grading.sandbox.job import (
    EarlyExit,
    Guess,
    Job,
    Observations,
    Output,
    Probe,
    ProbeResult,
    Run,
    Step,
)
from lora_from_scratch.grading.sandbox.messages import NOT_RUN, TIME_IS_UP, early_exit_message
from lora_from_scratch.grading.sandbox.stripped import ASSETS, TAKEN_OUT, StrippedLibrary, find_unit, stripped
from lora_from_scratch.support.figures import BUILDING

MOST_STARTS = 8  # of one submission's notebook, including the restarts after crashes
OVERHEAD = 2**20  # bytes of an observation beyond its tensors
NOBODY = 65534  # the user and group of isolation "user"
JOB = "/job"  # where the job is visible inside
PACKAGE = lora_from_scratch.__name__
IMPORTED = ("matplotlib.pyplot", "numpy", "torch", f"{PACKAGE}.grading.sandbox.inside")  # by nearly all notebooks
BOOT = "from lora_from_scratch.grading.sandbox.inside import main; main({folder!r}, {frames})"


class SandboxError(OSError):
    """The sandbox itself does not work, which is not the learner's fault. The message is one line."""


def unavailable() -> str | None:
    """Why the sandbox cannot be used here and what to do about it; None if it can."""
    return bubblewrap.unavailable()


def observe_notebook(job: Job) -> Observations:
    """Run a notebook in the sandbox and return the observations. Nothing that a learner does raises an error here.

    Call it from the main thread, or from one that lives longer than the call: bubblewrap ends with its thread.

    Raises:
        ValueError: there is no such unit or exercise, or the ids of the steps are not unique.
        SandboxError: the sandbox cannot be started here.
    """
    unit = find_unit(job.unit)
    exercises = {exercise.name: exercise for exercise in unit.exercises}
    ids = [step.cell_id for step in job.steps]
    unknown = [step.name for step in job.steps if isinstance(step, Probe) and step.name not in exercises]
    if unknown or len(set(ids)) != len(ids):
        raise ValueError(f"unknown exercises: {unknown}" if unknown else "two steps have the same cell_id")
    if job.isolation == "bubblewrap" and (why := unavailable()) is not None:
        raise SandboxError(why)
    observing = _NotebookObserver(job, unit, exercises)
    observing.run(frozenset(exercises) if job.without is None else job.without)
    if job.without is None:
        observing.rerun()
    return observing.observed()


class _NotebookObserver:
    """Observes one submission.

    In the first run, the bodies of all of the unit's exercises are removed from the library. An answer that calls the
    library's version of another exercise is run again with only its own body removed, and so is an answer whose probe
    needs another exercise.
    """

    def __init__(self, job: Job, unit: Unit, exercises: Mapping[str, Exercise]) -> None:
        self.job, self.unit, self.exercises = job, unit, exercises
        self.left = job.limits.seconds
        self.found = PartialObservations()

    def observed(self) -> Observations:
        found, job = self.found, self.job
        for step in job.steps:
            if isinstance(step, Run):
                found.outputs.setdefault(step.cell_id, Output("not run", error=NOT_RUN))
            elif isinstance(step, Probe):
                found.probes.setdefault(step.cell_id, ProbeResult(step.name, "lost", NOT_RUN))
        return Observations(found.probes, found.guesses, found.outputs, tuple(found.early_exits), job.isolation)

    # --- Runs

    def rerun(self) -> None:
        """Run again the answers that need other bodies: together, then separately if they need each other's."""
        probes = {step.cell_id: step for step in self.job.steps if isinstance(step, Probe)}
        again = {cell for cell in probes if self._needs_more(cell)}
        if not again:
            return
        names = frozenset(probes[cell].name for cell in again)
        called = self._rerun_only(again, names)
        if len(names) > 1:
            for name in sorted({probes[cell].name for cell in again if called.get(cell, set()) - {probes[cell].name}}):
                self._rerun_only({cell for cell in again if probes[cell].name == name}, frozenset({name}))

    def _needs_more(self, cell: str) -> bool:
        """Whether the removed body of another exercise kept this answer from being observed."""
        tried = self.found.probes.get(cell)
        if tried is None or tried.status in ("library", "lost"):
            return False
        if self.found.called.get(cell, set()) - {tried.name}:
            return True
        failed = False  # a cell above ended in such a body
        for step in self.job.steps:
            if step.cell_id == cell:
                break
            output = self.found.outputs.get(step.cell_id)
            failed = failed or (output is not None and TAKEN_OUT in output.error)
        return failed and (tried.status == "missing" or any(seen.raised for seen in tried.seen))

    def _rerun_only(self, cells: set[str], without: frozenset[str]) -> dict[str, set[str]]:
        """Run for these answers only; the new observations replace the previous ones."""
        first, died = self.found, {cell for cell, output in self.found.outputs.items() if output.status == "died"}
        steps = [s for s in self.job.steps if s.cell_id in cells or (isinstance(s, Run) and s.cell_id not in died)]
        while steps and isinstance(steps[-1], Run):
            steps.pop()
        self.found = PartialObservations()
        self.run(without, steps)
        second, self.found = self.found, first
        first.probes |= {cell: tried for cell, tried in second.probes.items() if tried.status == "seen"}
        return second.called

    def run(self, without: frozenset[str], steps: Iterable[Step] | None = None) -> None:
        """Run the steps, restarting after each crash, up to `MOST_STARTS` times."""
        waiting = list(self.job.steps if steps is None else steps)
        library = stripped(self.unit, without, self.job.cache, assets=self.job.isolation != "bubblewrap")
        left_out: list[tuple[Step, EarlyExit]] = []
        for _ in range(MOST_STARTS):
            if self.left <= 0:
                self.found.early_exits.append(EarlyExit("wall time", "", TIME_IS_UP))
                return
            unknown = [step for step in waiting if not self._is_known(step)]
            reader = FrameReader(self.job, self.exercises, self.found, unknown, left_out, self.left)
            end = self._start(reader, library)
            self.left -= end.seconds
            if end.why == "finished":
                return
            if end.why == "not started":
                raise SandboxError(f"the sandbox did not start ({end.detail}): {end.output[-500:]}")
            at = reader.current
            message = early_exit_message(end.why, end.detail, self.job.limits)
            early_exit = EarlyExit(end.why, at.cell_id if at else "", message)  # type: ignore[arg-type]
            self.found.early_exits.append(early_exit)
            if at is None:
                return
            self._leave_out(at, early_exit)
            left_out.append((at, early_exit))
            waiting.remove(at)

    def _is_known(self, step: Step) -> bool:
        """Whether a step was observed before a crash, and is skipped after it. Cells always run again."""
        return step.cell_id in self.found.probes or step.cell_id in self.found.guesses

    def _leave_out(self, step: Step, early_exit: EarlyExit) -> None:
        if isinstance(step, Run):
            self.found.outputs[step.cell_id] = Output("died", error=early_exit.message)
        elif isinstance(step, Probe):
            self.found.probes[step.cell_id] = ProbeResult(step.name, "lost", early_exit.message)

    # --- One process

    def _start(self, reader: FrameReader, library: StrippedLibrary) -> supervisor.ProcessExit:
        with tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True) as made:
            folder = reader.folder = Path(made)
            (folder / "job").write_bytes(wire.pack(self._describe(reader.steps)))
            (folder / "files").mkdir()
            key = os.urandom(wire.KEY_SIZE)
            begin = self._start_in_bubblewrap if self.job.isolation == "bubblewrap" else self._start_plain
            try:
                started = begin(folder, library, key)
            except OSError as error:
                raise SandboxError(f"the sandbox cannot be started: {error}") from None
            return supervisor.Supervisor(started, key, self.job.limits, reader).run()

    def _start_in_bubblewrap(self, folder: Path, library: StrippedLibrary, key: bytes) -> supervisor.SandboxProcess:
        package = os.path.dirname(os.path.abspath(lora_from_scratch.__file__))
        own = Path(lora_from_scratch.__file__).resolve().parent
        bound = [(library.folder, str(library.folder)), (own / ASSETS, f"{library.package}/{ASSETS}")]
        bound += bubblewrap.mounted([(library.package, package)])  # over the library with the answers
        bound += bubblewrap.mounted([(cover, str(path)) for path, cover in library.hidden])
        bound += [(folder, JOB)] + ([(self.job.files, f"{JOB}/files")] if self.job.files else [])
        bound += [(matplotlib := fonts(self.job.cache), str(matplotlib))]
        environment = environment_of(bubblewrap.HOME, library, matplotlib) | {"PWD": bubblewrap.WORK}
        limits = self.job.limits

        def command(filtered: int, info: int) -> list[str]:
            return bubblewrap.command(limits.folder, limits.shared, bound, environment, filtered, info)

        modules = [*IMPORTED, f"{PACKAGE}.checks.unit_{self.unit.number}.exercises"]
        server = forkserver.server(environment, [name for name in modules if _is_installed(name)])
        return supervisor.start_in_bubblewrap(command, lambda frames: runner(JOB, frames), key, server)

    def _start_plain(self, folder: Path, library: StrippedLibrary, key: bytes) -> supervisor.SandboxProcess:
        work, home = folder / "notebook", folder / "home"
        work.mkdir()
        home.mkdir()
        if self.job.files:
            (folder / "files").rmdir()
            shutil.copytree(self.job.files, folder / "files", symlinks=True)
        user = NOBODY if self.job.isolation == "user" else None
        if user is not None:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, user, user, follow_symlinks=False)
        matplotlib = shutil.copytree(fonts(self.job.cache), home / "matplotlib")
        environment = environment_of(str(home), library, matplotlib)
        return supervisor.start(lambda frames: runner(str(folder), frames), key, str(work), environment, user)

    def _describe(self, steps: Iterable[Step]) -> dict[str, Data]:
        """The job as the runner reads it."""
        limits = self.job.limits
        return {
            "unit": self.unit.number,
            "steps": [self._describe_step(step) for step in steps],
            "printed": limits.printed,
            "folder": limits.folder,
            "memory": limits.memory,
            "processor_seconds": limits.processor_seconds,
            "file": limits.file,
            "observation": limits.observation - OVERHEAD,
        }

    def _describe_step(self, step: Step) -> dict[str, Data]:
        if isinstance(step, Run):
            return {"kind": "run", "source": step.source, "seconds": self.job.limits.cell_seconds}
        if isinstance(step, Guess):
            return {"kind": "guess", "name": step.name}
        seconds = self.exercises[step.name].seconds * self.job.limits.patience
        return {"kind": "probe", "name": step.name, "seconds": seconds}


def _is_installed(module: str) -> bool:
    """Whether the package of this module can be imported; matplotlib is not needed for grading."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def fonts(cache: Path) -> Path:
    """A folder with matplotlib's font list, which takes seconds to create; empty if there is none."""
    folder = cache.absolute() / "matplotlib"
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ImportError, OSError):
            import matplotlib.font_manager

            for file in Path(matplotlib.get_cachedir()).glob("fontlist-*.json"):
                shutil.copy(file, folder)
    return folder


def runner(folder: str, frames: int) -> str:
    """The runner's program."""
    return BOOT.format(folder=folder, frames=frames)


def environment_of(home: str, library: StrippedLibrary, matplotlib: Path) -> dict[str, str]:
    """The runner's whole environment. `matplotlib` is the folder with the list of fonts."""
    return {
        BUILDING: "1",  # nobody can move a slider
        "HF_HUB_OFFLINE": "1",
        "HOME": home,
        "IPYTHONDIR": f"{home}/ipython",
        "LANG": "C.UTF-8",
        "LOGNAME": "learner",
        "LORA_FROM_SCRATCH_HOME": f"{home}/lora-from-scratch",
        "MKL_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": str(matplotlib),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join((str(library.extra), str(library.folder))),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "USER": "learner",
    }
