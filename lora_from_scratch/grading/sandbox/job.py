"""The input and output of the sandbox, both plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_from_scratch.checks.observation import Data, Seen

MIB = 2**20

Isolation = Literal["bubblewrap", "user", "none"]

FINISHED = "finished"
ExitReason = Literal[
    "exited",  # it ended itself: exit(), os._exit(), or a signal to itself that is not a crash
    "crashed",  # killed by a signal: a segmentation fault, an abort
    "memory",
    "wall time",  # of one cell or probe, or in total
    "processor time",
    "threads",
    "files",  # more than a sandbox may contain
    "frames",  # it sent too much, or something that the runner does not send
]


@dataclass(frozen=True)
class Run:
    """Run the source of a cell as IPython does; an error does not stop the rest."""

    cell_id: str
    source: str


@dataclass(frozen=True)
class Probe:
    """Try the *current* value of an exercise's name on the cases of this seed."""

    name: str
    seed: int
    cell_id: str


@dataclass(frozen=True)
class Guess:
    """Read the *current* value of a prediction's variable."""

    name: str
    cell_id: str


Step = Run | Probe | Guess


@dataclass(frozen=True)
class Limits:
    """Resource limits for a submission, in bytes and seconds.

    Attributes:
        memory: memory of the process, beyond what Python and PyTorch use at the start.
        seconds: wall time of the whole submission, including all restarts but not start-up.
        cell_seconds: wall time of one cell.
        patience: factor on the exercise's own `seconds` for a probe, because a grader's processor may be slower.
        processor_seconds: processor time of one process, summed over its threads.
        file: size of the largest single file.
        folder: total size of /tmp, which contains the home and working folders.
        shared: total size of /dev/shm.
        files: number of files and folders in /tmp.
        threads: number of threads.
        printed: characters kept of a cell's standard output, and of its standard error.
        observation: size of one exercise's observations as sent.
        sent: total size of everything that one process sends.
    """

    memory: int = 2048 * MIB
    seconds: float = 300.0
    cell_seconds: float = 60.0
    patience: float = 2.0
    processor_seconds: int = 600
    file: int = 64 * MIB
    folder: int = 256 * MIB
    shared: int = 16 * MIB
    files: int = 20_000
    threads: int = 128
    printed: int = 10_000
    observation: int = 16 * MIB
    sent: int = 128 * MIB


@dataclass(frozen=True)
class Job:
    """One submission to be observed.

    Attributes:
        unit: the unit's number, "09".
        steps: the steps in the order of the notebook, with unique `cell_id`s.
        cache: a folder in which the stripped copies of the library are kept between submissions; created if missing.
            Several processes may share it.
        files: a folder with the learner's own data files, copied into the working folder; or None. Symbolic links, and
            files beyond `Limits.folder`, are left out.
        without: the exercises whose bodies are removed from the library; None means all of the unit's.
        isolation: "bubblewrap", or a plain process, which has the resource limits and sees what its user sees: that of
            the user nobody with "user" (only the superuser can start it), of the grader with "none".
    """

    unit: str
    steps: tuple[Step, ...]
    cache: Path
    files: Path | None = None
    without: frozenset[str] | None = None
    limits: Limits = field(default_factory=Limits)
    isolation: Isolation = "bubblewrap"


@dataclass(frozen=True)
class ProbeResult:
    """The result of a `Probe`.

    Attributes:
        status: "seen" (there is one `Seen` per case, to be judged), "missing" (the name is not defined or its value
            cannot be tried; see `message`), "library" (it is the library's own), "lost" (the process ended before or
            during the probe; `Observations.early_exits` says why).
        message: for "missing", "library" and "lost", an explanation for the learner.
        changed: functions of PyTorch, NumPy, Python or the library that the notebook had replaced ("torch.equal") and
            that were restored before the answer was tried. A reason for a person to look, not to deduct points.
    """

    name: str
    status: Literal["seen", "missing", "library", "lost"]
    message: str = ""
    seen: tuple[Seen, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """The output of a cell. All texts come from the learner: escape them before they go into a page.

    Attributes:
        status: "ran", "error" (it raised), "stopped" (out of time; the notebook continued), "died" (the process ended
            in it), "not run" (the time was already up).
        stdout, stderr: the beginning of each stream.
        error: for example "ValueError: negative rank"; for "stopped" and "died", what happened in words.
        traceback: the end of the traceback, as plain text without colours.
    """

    status: Literal["ran", "error", "stopped", "died", "not run"]
    stdout: str = ""
    stderr: str = ""
    error: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class EarlyExit:
    """The end of a process that did not finish.

    Attributes:
        why: see `ExitReason`.
        cell_id: the cell or check in which it ended; "" before the first and after the last.
        message: one or two sentences to the learner, in the second person.
    """

    why: ExitReason
    cell_id: str
    message: str


@dataclass(frozen=True)
class Observations:
    """All observations of one submission.

    Attributes:
        probes: by the `cell_id` of each `Probe`, its result.
        guesses: by the `cell_id` of each `Guess`, the value as plain data; a lost value is missing.
        outputs: by the `cell_id` of each `Run`.
        early_exits: each process that ended early, in order; empty if the notebook ran to its end.
        isolation: the isolation in which it ran.
    """

    probes: Mapping[str, ProbeResult]
    guesses: Mapping[str, Data]
    outputs: Mapping[str, Output]
    early_exits: tuple[EarlyExit, ...]
    isolation: Isolation

    @property
    def ended(self) -> str:
        """Either "finished", or why the first unfinished process ended, such as "memory"."""
        return self.early_exits[0].why if self.early_exits else FINISHED
