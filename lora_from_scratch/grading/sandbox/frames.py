"""Read the frames that a process in the sandbox sends, and collect the observations in them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.observation import PATIENCE, Data, Seen
from lora_from_scratch.grading.sandbox import wire
from lora_from_scratch.grading.sandbox.job import EarlyExit, Guess, Job, Output, Probe, ProbeResult, Run, Step
from lora_from_scratch.grading.sandbox.messages import stopped_message

GRACE = 5.0  # seconds, beyond its own limit, for the process to report that a cell is out of time


@dataclass
class PartialObservations:
    """The observations of one run of a notebook so far."""

    probes: dict[str, ProbeResult] = field(default_factory=dict)
    guesses: dict[str, Data] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    early_exits: list[EarlyExit] = field(default_factory=list)
    called: dict[str, set[str]] = field(default_factory=dict)  # by step: the exercises whose removed bodies it called


class FrameReader:
    """Reads the frames that one process sends, which must be those of its steps, in order.

    Inputs are written where the process reads them when their exercise is tried, and not before: a cell could otherwise
    compute in advance what takes too long.

    Args:
        found: what is observed is added to it.
        steps: the steps of this process.
        left_out: steps that an earlier process ended in, and how.
        seconds: wall time for all steps.
    """

    def __init__(
        self,
        job: Job,
        exercises: Mapping[str, Exercise],
        found: PartialObservations,
        steps: list[Step],
        left_out: list[tuple[Step, EarlyExit]],
        seconds: float,
    ) -> None:
        self.job, self.exercises, self.found = job, exercises, found
        self.steps, self.left_out, self.seconds = steps, left_out, seconds
        self.folder = Path()  # what the process sees as its job
        self.current: Step | None = None
        self.place = 0
        self.state = "starting"
        self.step_until = 0.0
        self.all_until = 0.0

    def ready(self) -> bool:
        return self.state != "starting"

    def done(self) -> bool:
        return self.state == "done"

    def until(self) -> float:
        return min(self.step_until, self.all_until)

    def take(self, frame: Data) -> bool:
        if not isinstance(frame, dict) or type(frame.get("kind")) is not str or type(frame.get("step", 0)) is not int:
            raise ValueError("a frame is malformed")
        kind = str(frame["kind"])
        if self.state == "starting" and kind == "ready":
            self.state, self.all_until = "between", time.monotonic() + self.seconds
            self.step_until = self.all_until
        elif self.state == "between" and kind == "done" and self.place == len(self.steps):
            self.state = "done"
        elif self.state == "between" and kind == "started" and frame.get("step") == self.place < len(self.steps):
            self.current, self.state = self.steps[self.place], "in a step"
            self.step_until = time.monotonic() + self._seconds(self.current) + GRACE
            if isinstance(self.current, Probe):
                given: Data = {"cases": self._inputs(self.current), "seed": self.current.seed}  # type: ignore[dict-item]
                (self.folder / "inputs").write_bytes(wire.pack(given))
                return True
        elif self.state == "in a step" and frame.get("step") == self.place:
            assert self.current is not None
            self._keep(self.current, frame)
            self.state, self.place = "between", self.place + 1
            self.step_until = time.monotonic() + GRACE
        else:
            raise ValueError(f"a frame of kind {kind[:30]!r} arrived while the process was {self.state}")
        return False

    def _inputs(self, step: Probe) -> list[dict[str, Data]]:
        return [dict(case.inputs) for case in self.exercises[step.name].inputs(step.seed)]

    def _seconds(self, step: Step) -> float:
        limits = self.job.limits
        if isinstance(step, Probe):
            return self.exercises[step.name].seconds * limits.patience * PATIENCE  # on the clock
        return limits.cell_seconds if isinstance(step, Run) else 0.0

    def _keep(self, step: Step, frame: dict[str, Data]) -> None:
        found = self.found
        if frame["kind"] == "broken":
            raise ValueError(f"the runner failed: {_text(frame, 'message', 400)}")
        if isinstance(step, Run) and frame["kind"] == "output":
            found.called[step.cell_id] = self._called(frame)
            found.outputs.setdefault(step.cell_id, self._output(frame))
        elif isinstance(step, Probe) and frame["kind"] == "tried":
            found.called[step.cell_id] = self._called(frame)
            found.probes[step.cell_id] = self._tried(step, frame)
        elif isinstance(step, Guess) and frame["kind"] == "guess":
            found.guesses[step.cell_id] = frame.get("value")
        else:
            raise ValueError("a frame is of the wrong kind for its step")

    def _called(self, frame: dict[str, Data]) -> set[str]:
        return {name for name in _texts(frame, "called") if name in self.exercises}

    def _output(self, frame: dict[str, Data]) -> Output:
        limits, status = self.job.limits, _text(frame, "status", 20)
        if status not in ("ran", "error", "stopped"):
            raise ValueError("an output has an unknown status")
        error = stopped_message(limits) if status == "stopped" else _text(frame, "error", 1_000)
        printed = limits.printed + 100
        return Output(
            status,  # type: ignore[arg-type]
            _text(frame, "stdout", printed),
            _text(frame, "stderr", printed),
            error,
            _text(frame, "traceback", 10_000),
        )

    def _tried(self, step: Probe, frame: dict[str, Data]) -> ProbeResult:
        status, message, changed = _text(frame, "status", 20), _text(frame, "message", 1_000), _texts(frame, "changed")
        if status == "seen":
            seen = frame.get("seen")
            given = self._inputs(step)
            if not isinstance(seen, list) or len(seen) != len(given):
                raise ValueError(f"{len(given)} observations were expected")
            read: list[Seen] = [
                wire.observation_from_data(one, inputs) for one, inputs in zip(seen, given, strict=True)
            ]
            return ProbeResult(step.name, "seen", "", tuple(read), changed)
        if status not in ("missing", "library"):
            raise ValueError("an answer has an unknown status")
        for other, early_exit in self.left_out if status == "missing" else ():
            if isinstance(other, Run) and step.name in other.source:
                return ProbeResult(step.name, "lost", early_exit.message, (), changed)
        return ProbeResult(step.name, status, message, (), changed)  # type: ignore[arg-type]


def _text(frame: dict[str, Data], name: str, most: int) -> str:
    text = frame.get(name)
    if type(text) is not str or len(text) > most:
        raise ValueError(f"the field {name} of a frame is not a text of at most {most:,} characters")
    return text


def _texts(frame: dict[str, Data], name: str) -> tuple[str, ...]:
    texts: Any = frame.get(name)
    if not isinstance(texts, list) or len(texts) > 100 or any(type(t) is not str or len(t) > 300 for t in texts):
        raise ValueError(f"the field {name} of a frame is not a short list of short texts")
    return tuple(texts)
