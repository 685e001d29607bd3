"""Unit 14, the capstone: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

from torch import Tensor

from lora_from_scratch.checks.comparing import as_tensor, is_number
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation
from lora_from_scratch.checks.observation import Seen


def explain_over_budget(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first name that is missing or too much, with its cost and its limit."""
    names, wanted, cost, budget = seen.value, expected.value, case.inputs["cost"], case.inputs["budget"]
    if not isinstance(names, list) or not isinstance(wanted, list):
        return None
    assert isinstance(cost, dict)
    assert isinstance(budget, dict)
    for name, limit in budget.items():
        if (name in names) != (name in wanted):
            given = "is not in your result" if name in wanted else "is in your result"
            verdict = "exceeds" if name in wanted else "does not exceed"
            return "another name", f"'{name}' {given}, but its cost of {cost[name]} {verdict} the limit of {limit}."
    return None


def explain_front(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first candidate that is missing or too much, and which one beats it."""
    front, wanted = seen.value, expected.value
    costs, quality = case.inputs["costs"], case.inputs["quality"]
    if not isinstance(front, list) or not isinstance(wanted, list) or any(type(place) is not int for place in front):
        return None
    assert isinstance(costs, Tensor)
    assert isinstance(quality, Tensor)

    def shown(place: int) -> str:
        numbers = ", ".join(f"{number:.10g}" for number in costs[place].tolist())
        return f"candidate {place} (costs {numbers}; quality {float(quality[place]):.10g})"

    for place in range(len(costs)):
        if place in wanted and place not in front:
            return "missing on the front", f"{shown(place).capitalize()} is on the front: no other candidate beats it."
        if place in front and place not in wanted:
            winner = next(
                other
                for other in wanted
                if isinstance(other, int)
                and bool((costs[other] <= costs[place]).all())
                and bool(quality[other] >= quality[place])
            )
            return "too much on the front", (
                f"{shown(place).capitalize()} is not on the front: {shown(winner)} is nowhere worse, and better "
                "somewhere."
            )
    return None


def explain_bootstrap(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The range, or how many samples each system wins."""
    if expected.raised or not is_number(seen.value) or as_tensor(seen.value).ndim:
        return None
    one, other, places = (case.inputs[name] for name in ("one", "other", "places"))
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    assert isinstance(places, Tensor)
    share = float(as_tensor(seen.value))
    if not 0 <= share <= 1:
        return "no share", f"A share lies between 0 and 1, but yours is {share:.6g}."
    margin = (one - other).double()[places].mean(dim=1)
    first, equal = int((margin > 0).sum()), int((margin == 0).sum())
    return "another share", (
        f"Of the {len(places)} samples here the first system wins {first}, the second {len(places) - first - equal}, "
        f"and on {equal} both are equal. Your result is {share:.6g}."
    )
