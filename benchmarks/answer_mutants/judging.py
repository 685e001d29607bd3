"""What the checks say of mutants. They run in a child process: a mutant may hang, take all memory, or crash."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import resource
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.answer_mutants.mutants import Mutant
from lora_from_scratch.checks.judge import expected_of, judge
from lora_from_scratch.checks.observation import Seen, observe

SEEDS = (0, 1, 2)
SECONDS = 2.0  # for all cases of one seed
PATIENCE = 120.0  # seconds without a verdict until the child is killed
MEMORY = 2 * 2**30  # bytes that a mutant may take on top of what the process has

# The general rules of `diagnosis` whose message would fit a hundred mistakes.
VAGUE = frozenset(
    {"values", "shape", "another type", "number of results", "not finite", "length", "close", "some entries"}
    | {"factor", "sign"}
)
# The others: they say what happened to this answer.
GENERAL = frozenset(
    {"too slow", "arguments", "another error", "raises", "no error", "prints", "returns nothing", "changes its input"}
    | {"transposed", "order", "inverted", "zero", "offset", "function", "items", "keys", "text", "yes or no", "dtype"}
    | {"crashed"}
)


@dataclass(frozen=True)
class Outcome:
    """What the check says of a mutant, one item for each seed.

    Attributes:
        verdicts: the misconception's name and the message; ("", "") where it passes.
    """

    mutant: Mutant
    verdicts: tuple[tuple[str, str], ...]

    @property
    def caught(self) -> bool:
        return all(name for name, _ in self.verdicts)

    @property
    def survives(self) -> bool:
        return not any(name for name, _ in self.verdicts)

    @property
    def steady(self) -> bool:
        """Whether every seed says the same."""
        return self.caught or self.survives

    @property
    def rule(self) -> str:
        """The misconception's name, of the first seed."""
        return next((name for name, _ in self.verdicts if name), "")

    @property
    def stopped(self) -> bool:
        return self.rule in ("too slow", "crashed")


def outcomes(mutants: Sequence[Mutant], seeds: Sequence[int] = SEEDS) -> list[Outcome]:
    """Of mutants of one exercise."""
    found: list[Outcome] = []
    while len(found) < len(mutants):
        receiving, sending = multiprocessing.get_context("fork").Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_judge, args=(mutants[len(found) :], seeds, sending))
        child.start()
        sending.close()
        with receiving:
            for mutant in mutants[len(found) :]:
                found.append(Outcome(mutant, _received(receiving)))
                if found[-1].rule == "crashed":
                    break
        child.kill()
        child.join()
    return found


def _received(receiving: multiprocessing.connection.Connection) -> tuple[tuple[str, str], ...]:
    try:
        if receiving.poll(PATIENCE):
            return receiving.recv()
    except EOFError:
        pass
    return (("crashed", "The process ended, or did not answer."),)


def _judge(mutants: Sequence[Mutant], seeds: Sequence[int], sending: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    exercise = mutants[0].exercise
    for seed in seeds:
        expected_of(exercise, seed)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for mutant in mutants:
        verdicts = []
        for seed in seeds:
            verdicts.append(_verdict(mutant, seed))
            if verdicts[-1][0] == "too slow":
                break
        sending.send(tuple(verdicts))
    sending.close()
    os._exit(0)  # what a mutant left behind is not cleaned up


def _verdict(mutant: Mutant, seed: int) -> tuple[str, str]:
    exercise = mutant.exercise
    inputs = [case.inputs for case in exercise.inputs(seed)]
    try:
        answer = mutant.compiled()
    except Exception as error:  # a class whose body cannot be run
        seen = [Seen(errors=(type(error).__name__,), message=str(error)) for _ in inputs]
    else:
        seen = observe(exercise.probe, answer, inputs, SECONDS, seed)
    try:
        verdict = judge(exercise, seed, seen)
    except Exception as error:
        return "broken", f"The check itself fails: {type(error).__name__}: {error}"
    return ("", "") if verdict.passed else (verdict.misconception or verdict.status, verdict.message)
