"""Every check notices when the library's own answer is changed in one place: see `benchmarks.answer_mutants`."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest

from benchmarks.answer_mutants.explained import FOLDER, entries, explained
from benchmarks.answer_mutants.judging import Outcome, outcomes
from benchmarks.answer_mutants.mutants import Mutant, mutants_of
from benchmarks.answer_mutants.report import judged
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.units import find, units
from tests.turns import TEN, marks


@functools.cache
def mutants_by_exercise() -> dict[str, list[Mutant]]:
    return {exercise.name: mutants_of(exercise) for unit in units() for exercise in unit.exercises}


def exercise_of(name: str) -> Exercise:
    item = find(name)[1]
    assert isinstance(item, Exercise)
    return item


def mutant(name: str, body: str) -> Mutant:
    """An answer to `rank` with this body."""
    source = f"def rank(matrix, tolerance=None):\n    {body}"
    return Mutant(exercise_of("rank"), name, 1, source)


@pytest.mark.parametrize(
    ("unit", "exercise"),
    [
        pytest.param(
            unit.number,
            exercise,
            id=exercise.name,
            marks=marks(unit.number, exercise.name in TEN),
        )
        for unit in units()
        for exercise in unit.exercises
    ],
)
def test_every_mutant_is_caught_with_every_seed_or_explained(unit: str, exercise: Exercise) -> None:
    assert judged(unit, exercise).faults == []


def test_there_are_at_least_three_thousand_mutants() -> None:
    assert sum(map(len, mutants_by_exercise().values())) >= 3000


def test_every_exercise_has_at_least_twelve_mutants_with_different_names_and_sources() -> None:
    for name, mutants in mutants_by_exercise().items():
        assert len(mutants) >= 12, name
        assert len({one.name for one in mutants}) == len({one.source for one in mutants}) == len(mutants), name


@pytest.mark.unit_01
def test_the_mutants_are_the_same_ones_each_time() -> None:
    assert mutants_of(exercise_of("rank")) == mutants_by_exercise()["rank"]


@pytest.mark.unit_10
def test_mistakes_that_learners_make_are_among_the_mutants() -> None:
    wanted = {
        "rank_for_energy": ["(kept <= enough)", "`S = torch.linalg.svdvals(matrix)`"],
        "row_echelon": ["`tolerance is None` -> `not tolerance`"],
        "lora_state_from_peft": ["endswith(('lora_A', '.lora_B'))"],
        "begin_with_loftq": ["layer.lora_B.copy_(B / (layer.alpha / layer.rank))"],
        "switch_task": ["without `@torch.no_grad()`", "((1, old), (1, new))"],
        "outer_product_sum": ["`total += torch.outer(column, row)`"],
        "pca": ["data.sum(dim=0)", "data.mean(dim=1)", "data.mean()"],
        "initial_prompt": ["return table.detach()[ids.to(table.device)]`"],
    }
    for exercise, parts in wanted.items():
        for part in parts:
            assert any(part in one.name for one in mutants_by_exercise()[exercise]), part


@pytest.mark.unit_01
def test_a_mutant_that_hangs_or_takes_all_memory_or_ends_the_process_counts_as_caught_and_the_others_go_on() -> None:
    right = "from lora_from_scratch.linear_algebra.rank import rank as right; return right(matrix, tolerance)"
    bodies = {
        "hangs": "while True: pass",
        "takes all memory": "return len(bytearray(4 * 2**30))",
        "ends the process": "import os; os._exit(3)",
        "is right": right,
    }
    found = outcomes([mutant(name, body) for name, body in bodies.items()], seeds=[0, 1])
    assert [one.mutant.name for one in found] == list(bodies)
    assert [one.rule for one in found] == ["too slow", "raises", "crashed", ""]
    assert [one.survives for one in found] == [False, False, False, True]


@pytest.mark.unit_01
def test_a_mutant_that_passes_with_some_seeds_is_a_fault() -> None:
    [found] = outcomes([mutant("lucky", "return matrix.shape[0]")], seeds=[0])
    passes, fails = ("", ""), found.verdicts[0]
    assert Outcome(found.mutant, (passes, fails)).steady is False
    assert Outcome(found.mutant, (fails, fails)).steady is True


def survivor(name: str, *verdicts: tuple[str, str]) -> Outcome:
    return Outcome(mutant(name, "pass"), verdicts or (("", ""),))


EXPLAINED: list[tuple[dict[str, Any], set[str], list[str]]] = [
    ({"mutants": ["`a` -> `b`"]}, {"`a` -> `b`"}, []),
    ({"mutants": ["`a` -> "]}, set(), ["`a` -> "]),  # a name in full
    ({"matching": ["-> `[bc]`"]}, {"`a` -> `b`", "`a` -> `c`"}, []),
    ({"matching": ["`d`"]}, set(), ["`d`"]),  # caught in the meantime
    ({"matching": ["`e`"]}, set(), []),  # stopped by the clock: on another day it passes
]


@pytest.mark.parametrize(("entry", "names", "stale"), EXPLAINED)
def test_an_explanation_is_for_survivors_and_refused_without_one(entry: dict, names: set, stale: list) -> None:
    found = [survivor("`a` -> `b`"), survivor("`a` -> `c`"), survivor("`a` -> `d`", ("values", "no"))]
    found.append(survivor("`a` -> `e`", ("too slow", "no")))
    assert explained(found, [{"reason": "It does the same.", **entry}]) == (names, stale)


def test_an_explanation_without_a_reason_is_refused() -> None:
    with pytest.raises(ValueError, match="no reason"):
        explained([survivor("`a` -> `b`")], [{"mutants": ["`a` -> `b`"]}])


@pytest.mark.parametrize("unit", [unit.number for unit in units()])
def test_every_explanation_is_of_a_mutant_that_exists(unit: str) -> None:
    for exercise, found in entries(unit).items():
        names = [one.name for one in mutants_by_exercise()[exercise]]
        for entry in found:
            assert [name for name in entry.get("mutants", ()) if name not in names] == [], exercise
            patterns = entry.get("matching", ())
            assert [one for one in patterns if not any(re.search(one, name) for name in names)] == [], exercise


def test_explanations_are_of_exercises_that_exist_in_their_unit() -> None:
    files = sorted(FOLDER.glob("*.toml"))
    assert [file.stem for file in files if file.stem not in [f"unit_{unit.number}" for unit in units()]] == []
    for unit in units():
        assert set(entries(unit.number)) <= {exercise.name for exercise in unit.exercises}
