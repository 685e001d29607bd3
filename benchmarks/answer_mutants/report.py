"""What was found, of one exercise and in all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.answer_mutants.explained import entries, explained
from benchmarks.answer_mutants.judging import GENERAL, SEEDS, VAGUE, Outcome, outcomes
from benchmarks.answer_mutants.mutants import mutants_of
from lora_from_scratch.checks.exercise import Exercise

HEAD = """# Mutants of the answers

What `python -m benchmarks.answer_mutants --write` found. Each mutant is the library's own answer to an exercise with
one change in what a learner writes; where that gives fewer than twenty, some have two. The check judges it with three
seeds.

- **caught**: refused with each of the seeds; **explained**: passes, and `answer_mutants/explained` says why it may.
- **missed**: passes without being explained; **by luck**: the verdict depends on the seed.
- **specific**: the share of the caught whose message says more than that the values, the shape or the type is wrong;
  **named**: those among them whose message is one of the exercise's own.

The first whole table (2026-11-29, commit 8e7487a, after a third of the units had been gone through with this tool) had
5,052 mutants of 93 exercises: 4,581 caught, 92 explained, 379 missed; 78 % of the caught got a specific message, 28 %
one of the exercise's own.

| unit | exercise | mutants | caught | explained | missed | by luck | specific | named |
|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """An exercise.

    Attributes:
        explained: the names of the survivors that are.
        stale: explanations of none that survives.
    """

    unit: str
    exercise: str
    outcomes: tuple[Outcome, ...]
    explained: frozenset[str]
    stale: tuple[str, ...]
    seconds: float

    @property
    def caught(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.caught]

    @property
    def missed(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.survives and one.mutant.name not in self.explained]

    @property
    def by_luck(self) -> list[Outcome]:
        return [one for one in self.outcomes if not one.steady]

    @property
    def vague(self) -> list[Outcome]:
        return [one for one in self.caught if one.rule in VAGUE]

    @property
    def general(self) -> list[Outcome]:
        return [one for one in self.caught if one.rule in GENERAL]

    @property
    def broken(self) -> list[Outcome]:
        return [one for one in self.outcomes if one.rule in ("broken", "crashed")]

    @property
    def faults(self) -> list[str]:
        """What is not as it should be."""
        return [
            *(f"missed: {one.mutant.name}" for one in self.missed),
            *(f"by luck: {one.mutant.name}" for one in self.by_luck),
            *(f"{one.rule}: {one.mutant.name}: {one.verdicts}" for one in self.broken if one.rule == "broken"),
            *(f"explains nothing: {text}" for text in self.stale),
        ]

    def line(self) -> str:
        return (
            f"{self.unit} {self.exercise}: {len(self.outcomes)} mutants, {len(self.caught)} caught, "
            f"{len(self.by_luck)} by luck, {len(self.missed)} missed, {len(self.explained)} explained, "
            f"{share(self.caught, self.vague)} specific ({share(self.caught, self.vague + self.general)} named), "
            f"{self.seconds:.1f} s"
        )

    def show_faults(self, survivors: bool, vague: bool, everything: bool) -> None:
        for one in self.missed * survivors:
            print(f"    missed, line {one.mutant.line}: {one.mutant.name}")
        for one in self.by_luck:
            rules = [name or "passes" for name, _ in one.verdicts]
            print(f"    by luck, line {one.mutant.line}: {one.mutant.name}: {rules}")
        for one in self.broken:
            print(f"    {one.rule}, line {one.mutant.line}: {one.mutant.name}: {one.verdicts[0][1]}")
        for text in self.stale:
            print(f"    explains nothing: {text}")
        for one in self.vague * vague:
            print(f"    {one.rule}, line {one.mutant.line}: {one.mutant.name}")
        for one in self.outcomes * everything:
            print(
                f"    {one.rule or 'passes'}, line {one.mutant.line}: {one.mutant.name}\n        {one.verdicts[0][1]}"
            )


def judged(unit: str, exercise: Exercise, seeds: Sequence[int] = SEEDS) -> Row:
    """All mutants of an exercise of this unit."""
    begun = time.perf_counter()
    found = outcomes(mutants_of(exercise), seeds)
    seconds = time.perf_counter() - begun
    names, stale = explained(found, entries(unit).get(exercise.name, []))
    return Row(unit, exercise.name, tuple(found), frozenset(names), tuple(stale), seconds)


def share(caught: Sequence[Outcome], without: Sequence[Outcome]) -> str:
    return f"{100 * (1 - len(without) / max(1, len(caught))):.0f} %"


def totals(rows: Sequence[Row]) -> list[str]:
    """The last five columns of the table, and the first, for all of them together."""
    caught = [one for row in rows for one in row.caught]
    vague = [one for row in rows for one in row.vague]
    general = [one for row in rows for one in row.general]
    counts = [sum(len(part) for part in parts) for parts in zip(*map(_parts, rows), strict=True)]
    return [*map(str, counts), share(caught, vague), share(caught, vague + general)]


def _parts(row: Row) -> tuple[Sequence[object] | frozenset[str], ...]:
    return row.outcomes, row.caught, row.explained, row.missed, row.by_luck


def total(rows: Sequence[Row]) -> str:
    mutants, caught, explained, missed, by_luck, specific, named = totals(rows)
    wrong = int(mutants) - int(explained)
    return (
        f"{mutants} mutants; of {wrong} not explained {caught} caught ({100 * int(caught) / max(1, wrong):.1f} %), "
        f"{missed} missed, {by_luck} by luck; {specific} specific, {named} named; "
        f"{sum(row.seconds for row in rows):.0f} s"
    )


def table(rows: Sequence[Row]) -> str:
    lines = [f"| {row.unit} | `{row.exercise}` | {' | '.join(totals([row]))} |" for row in rows]
    return HEAD + "\n".join([*lines, f"| all | {len(rows)} exercises | {' | '.join(totals(rows))} |"]) + "\n"
