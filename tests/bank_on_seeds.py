"""The verdicts on all answers of the bank to one exercise, with many seeds, for little time.

The inputs are drawn once for each seed, and each answer is tried on them once: what was seen of it is both what is
judged and what other answers are compared with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from lora_from_scratch.checks.bank import Answer, right_answers, wrong_answers
from lora_from_scratch.checks.diagnosis import observations_of
from lora_from_scratch.checks.exercise import Case, Draw, Exercise
from lora_from_scratch.checks.judge import judge
from lora_from_scratch.checks.verdict import Verdict


def drawn_once(exercise: Exercise) -> Exercise:
    """The same exercise, which draws the inputs of a seed only once as long as no other seed is asked for."""
    last: dict[int, list[Case]] = {}

    def cases(draw: Draw) -> list[Case]:
        seed = draw.generator.initial_seed()
        if seed not in last:
            drawn = list(exercise.cases(draw))
            last.clear()
            last[seed] = drawn
        return last[seed]

    return dataclasses.replace(exercise, cases=cases)


def surprises(exercise: Exercise, seeds: Iterable[int]) -> dict[str, list[str]]:
    """For each answer whose verdict is not what the bank says with every seed: what it is, "seed 3: passes"."""
    found: dict[str, list[str]] = {}
    once = drawn_once(exercise)
    answers = [one for one in right_answers(exercise.name) + wrong_answers(exercise.name) if not one.hangs]
    for seed in seeds:
        for answer in answers:
            verdict = judge(once, seed, list(observations_of(answer, once, seed)))
            if (said := surprise(answer, verdict)) is not None:
                found.setdefault(answer.name, []).append(f"seed {seed}: {said}")
    return found


def surprise(answer: Answer, verdict: Verdict) -> str | None:
    """What the verdict is, if it is not what the bank says."""
    if verdict.passed:
        return None if answer.right else "passes"
    if not answer.right and verdict.misconception == answer.misconception:
        return None if verdict.message == (answer.message or verdict.message) else f"is told {verdict.message!r}"
    return (
        f"is told {verdict.misconception or verdict.status!r} in the case {verdict.failure and verdict.failure.case!r}"
    )
