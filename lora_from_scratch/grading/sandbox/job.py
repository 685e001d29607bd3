"""What goes into the sandbox and what comes out: plain data on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_from_scratch.checks.observation import Data, Seen

MIB = 2**20

Isolation = Literal["bubblewrap", "none"]

FINISHED = "finished"
Why = Literal[
    "exited",  # it ended itself: exit(), os._exit(), a signal to itself that is not a crash
    "crashed",  # killed by a signal: a segmentation fault, an abort
    "memory",
    "wall time",  # of one cell or probe, or of all together
    "processor time",
    "threads",
    "files",  # more of them than a sandbox may hold
    "frames",  # what it sent was too much, or not what the runner sends
]


@dataclass(frozen=True)
class Run:
    """Run the source of a cell, as IPython does; an error does not stop the rest."""

    cell_id: str
    source: str


@dataclass(frozen=True)
class Probe:
    """Try what the name of an exercise is *now* on the cases of this seed."""

    name: str
    seed: int
    cell_id: str


@dataclass(frozen=True)
class Guess:
    """Read the value of a prediction's variable *now*."""

    name: str
    cell_id: str


Step = Run | Probe | Guess


@dataclass(frozen=True)
class Limits:
    """What a submission may use. Bytes and seconds.

    Attributes:
        memory: of the process, beyond what Python and PyTorch take at their start.
        seconds: wall time of the whole submission, all restarts together; start-up is not counted.
        cell_seconds: wall time of one cell.
        patience: a probe gets so many times the exercise's own `seconds`, because graders are busy machines.
        processor_seconds: of one process, its threads together.
        file: the largest single file.
        folder: everything in /tmp together, which is the home and the working folder.
        shared: everything in /dev/shm together.
        files: how many files and folders there may be in /tmp.
        threads: how many threads there may be.
        printed: characters kept of what one cell prints, and as many of what goes to stderr.
        observation: one exercise's observations as they are sent.
        sent: everything that one process sends.
    """

    memory: int = 2048 * MIB
    seconds: float = 300.0
    cell_seconds: float = 60.0
    patience: float = 5.0
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
        steps: in the order of the notebook. `cell_id`s are unique among the steps.
        cache: a folder where the library's stripped copies are kept from one submission to the next; made if
            missing. It may be shared by several processes.
        files: a folder with the learner's own data files, copied into the working folder; or None. Symbolic links
            and what is over `Limits.folder` are left out.
        without: exercises whose bodies are taken out of the library; None: all of the unit's.
        isolation: "bubblewrap", or "none": a plain process, which limits what is used up and hides nothing.
    """

    unit: str
    steps: tuple[Step, ...]
    cache: Path
    files: Path | None = None
    without: frozenset[str] | None = None
    limits: Limits = field(default_factory=Limits)
    isolation: Isolation = "bubblewrap"


@dataclass(frozen=True)
class Tried:
    """What came of a `Probe`.

    Attributes:
        status: "seen" (there is one `Seen` a case, to be judged), "missing" (no such name, or nothing that could be
            tried: the message says what), "library" (it is the library's own), "lost" (the process ended before or
            while it was tried; `Observed.endings` says why).
        message: of "missing", "library" and "lost": in words for the learner.
        changed: what the notebook had replaced in PyTorch, numpy, Python or the library ("torch.equal"): it was put
            back before the answer was tried. A reason to look, not yet to take points.
    """

    name: str
    status: Literal["seen", "missing", "library", "lost"]
    message: str = ""
    seen: tuple[Seen, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """What a cell left behind. All texts are the learner's: escape them before they go into a page.

    Attributes:
        status: "ran", "error" (it raised), "stopped" (out of time; the notebook went on), "died" (the process ended
            in it), "not run" (the time was up before).
        stdout, stderr: the beginnings.
        error: "ValueError: negative rank", or for "stopped" and "died" what happened, in words.
        traceback: plain text, without colours; its end.
    """

    status: Literal["ran", "error", "stopped", "died", "not run"]
    stdout: str = ""
    stderr: str = ""
    error: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class Ending:
    """A process that did not come to its end.

    Attributes:
        why: see `Why`.
        cell_id: where it was then: a cell or a check. "" before the first and after the last.
        message: for the learner, one or two sentences in the second person.
    """

    why: Why
    cell_id: str
    message: str


@dataclass(frozen=True)
class Observed:
    """Everything that was seen of one submission.

    Attributes:
        tried: by the `cell_id` of each `Probe`.
        guesses: by the `cell_id` of each `Guess`: the value as plain data. Not there where it was lost.
        outputs: by the `cell_id` of each `Run`.
        endings: each process that ended too early, in order. Empty: the notebook ran to its end.
        isolation: what it ran in.
    """

    tried: Mapping[str, Tried]
    guesses: Mapping[str, Data]
    outputs: Mapping[str, Output]
    endings: tuple[Ending, ...]
    isolation: Isolation

    @property
    def ended(self) -> str:
        """ "finished", or what ended the first process that did not: "memory"."""
        return self.endings[0].why if self.endings else FINISHED
