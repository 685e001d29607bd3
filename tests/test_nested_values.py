"""Values that are nested or large disturb nothing: an answer that returns them is wrong, and the rest is graded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_from_scratch.grading.building.solution import source_of
from lora_from_scratch.grading.sandbox import Guess, Job, Observations, Probe, Run, observe_notebook
from lora_from_scratch.grading.sandbox.stripped import find_unit
from tests.sandboxes import needs_bubblewrap, verdict_of

pytestmark = [pytest.mark.unit_01, needs_bubblewrap]

SEED = 7
NAME = "low_rank_parameter_count"
RIGHT = source_of(next(exercise.object for exercise in find_unit("01").exercises if exercise.name == NAME))
PARTS = "from __future__ import annotations\nimport torch\nfrom lora_from_scratch.linear_algebra.rank import *\n"
NESTING = """
def nested(depth, wrap, leaf=1):
    value = leaf
    for _ in range(depth):
        value = wrap(value)
    return value
"""
WRAPS = {
    "lists": "lambda value: [value]",
    "tuples": "lambda value: (value,)",
    "dicts": "lambda value: {'key': value}",
    "all of them": "lambda value: [(0, {'a': value, 1: None})]",
}
# Around the deepest that a frame may hold (60), around Python's own limit of recursion (1000), and beyond both.
DEPTHS = (10, 26, 27, 52, 53, 60, 61, 300, 1_000, 20_000)
VALUES = {f"{depth} {kind}": f"nested({depth}, {wrap})" for kind, wrap in WRAPS.items() for depth in DEPTHS}
VALUES |= {
    "a list in itself": "endless",
    "many lists in many lists": "[[[n] * 60 for n in range(60)] for _ in range(60)]",
    "one list in 10,000 places": "nested(4, lambda value: [value] * 10)",
    "one list in 300,000 places": "[[0] * 600] * 500",
    "one tensor in 10,000 places": "nested(4, lambda value: [value] * 10, torch.ones(3))",
    "tensors in dicts in tuples": "tuple({'A': torch.ones(9, 9), 'B': [torch.zeros(3)] * 3} for _ in range(500))",
    "a dict with long keys": "{'k' * 50_000 + str(n): {n: (n,)} for n in range(100)}",
    "sets and ranges": "{frozenset({frozenset({1}), 2}): [range(1000), {1, 2}]}",
}


@pytest.fixture(scope="module")
def observed(library_cache: Path) -> Observations:
    steps: list[Any] = [Run("imports", PARTS + NESTING + "endless = []\nendless.append(endless)\n")]
    for what, value in VALUES.items():
        answer = f"value = {value}\ndef {NAME}(out_features, in_features, rank): return value"
        steps += [Run(f"cell {what}", answer), Probe(NAME, SEED, f"probe {what}"), Guess("value", f"guess {what}")]
    steps += [Run("right", RIGHT), Probe(NAME, SEED, "at last")]
    return observe_notebook(Job("01", tuple(steps), library_cache))


@pytest.mark.parametrize("what", VALUES)
def test_a_nested_value_is_a_wrong_answer_and_a_prediction_and_no_more(observed: Observations, what: str) -> None:
    assert observed.outputs[f"cell {what}"].status == "ran", observed.outputs[f"cell {what}"].error
    assert observed.probes[f"probe {what}"].status == "seen", observed.probes[f"probe {what}"].message
    assert verdict_of(observed, f"probe {what}", SEED).status == "failed"
    assert f"guess {what}" in observed.guesses


def test_nothing_was_disturbed_and_the_answer_below_them_all_is_right(observed: Observations) -> None:
    assert observed.early_exits == ()
    assert verdict_of(observed, "at last", SEED).passed
