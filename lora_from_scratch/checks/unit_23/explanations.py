"""Unit 23, the folklore, tested: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from typing import Any

from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation
from lora_from_scratch.checks.observation import Seen
from lora_from_scratch.checks.verdict import describe
from lora_from_scratch.compare.folklore import FAILS, HOLDS, UNDECIDED


def explain_steps(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """How many examples so many steps would cover."""
    given: Any = case.inputs
    steps: Any = seen.value
    if isinstance(steps, bool) or not isinstance(steps, int | float):
        return "no number", f"Return a whole number. Yours is {describe(steps)}."
    batch = given["micro_batch"] * given.get("accumulation", 1) * given.get("processes", 1)
    enough = "fewer than" if steps * batch < given["examples"] else "enough for"
    return ("too few" if enough == "fewer than" else "another number"), (
        f"Here one step uses {batch} examples, so your {steps} steps see {steps * batch} in all: {enough} the "
        f"{given['examples']} of the epoch. What is the smallest number of steps that is enough?"
    )


def explain_matched(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """How many parameters the two LoRAs have."""
    given: Any = case.inputs
    rank: Any = seen.value
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        return "no number", f"Return a whole number. Yours is {describe(rank)}."
    wanted = given["rank"] * sum(map(sum, given["layers"]))
    one = sum(map(sum, given["other_layers"]))
    return ("too high" if rank > expected.value else "too low"), (  # type: ignore[operator]
        f"The given LoRA trains {wanted} parameters. On the other layers rank 1 takes {one}, and your rank {rank} "
        f"takes {rank * one}. Is there a rank whose number is nearer, or as near and lower?"
    )


def explain_ratio(case: Case, seen: Seen, expected: Seen) -> Explanation:
    ratio: Any = seen.value
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        return "no number", f"Return one number. Yours is {describe(ratio)}."
    return "another ratio", (
        f"You return {ratio:.4g}. Which learning rate has the lowest loss among the first, and which among the others? "
        "A run whose loss is NaN is never the best."
    )


def explain_change(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which blocks are listed, and which of them is wrong."""
    one: Any = seen.value
    other: Any = expected.value
    if "result" in one:
        return "no dictionary", f"Return a dictionary from block to number. Yours is {describe(one['result'])}."
    if one["blocks"] != other["blocks"]:
        if all(isinstance(block, str) for block in one["blocks"]) and one["blocks"]:
            return "blocks as text", "The blocks of your dictionary are texts. They should be whole numbers."
        return (
            "other blocks",
            f"Your dictionary has the blocks {one['blocks']}, in this order; expected {other['blocks']}.",
        )
    for block, value, wanted in zip(one["blocks"], one["changes"], other["changes"], strict=True):
        if not isinstance(value, int | float):
            return "no number", f"The value of block {block} should be a number. Yours is {describe(value)}."
        if abs(value - wanted) > 1e-4 * abs(wanted):
            kind = "too large" if value > wanted else "too small"
            return kind, f"The relative change of block {block} is {kind}: {value:.4g} instead of {wanted:.4g}."
    return None


def explain_verdict(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What the mean, the spread and the margin are."""
    given: Any = case.inputs
    if seen.value not in (HOLDS, FAILS, UNDECIDED):
        return "no verdict", f"Return one of the three texts of the docstring. Yours is {describe(seen.value)}."
    differences = given["differences"]
    mean, spread = sum(differences) / len(differences), max(differences) - min(differences)
    margin = "without a margin" if given["margin"] is None else f"with the margin {given['margin']:g}"
    return f"{seen.value}", (
        f'Your verdict is "{seen.value}" on the differences {", ".join(f"{d:g}" for d in differences)} {margin}: their '
        f"mean is {mean:.3g}, their spread {spread:.3g}, and the largest in size is {max(map(abs, differences)):.3g}."
    )
