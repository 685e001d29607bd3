"""Unit 14, the capstone: what is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_14.explanations import explain_bootstrap, explain_front, explain_over_budget
from lora_from_scratch.compare.capstone.budget import over_budget
from lora_from_scratch.compare.capstone.choosing import (
    best_learning_rate,
    choose_method,
    paired_bootstrap,
    pareto_front,
)

TITLE = "Capstone"


# --- over_budget -------------------------------------------------------------------------------------


def budget_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, cost: dict[str, Data], budget: dict[str, Data], *sentences: str) -> Case:
        return Case(name, {"cost": cost, "budget": budget}, sentences=sentences)

    def cost(**changed: float) -> dict[str, Data]:
        usual: dict[str, Data] = {
            "trained_parameters": draw.integer(1000, 9000),
            "training_memory": draw.integer(50, 90) * 2**20,
            "added_work": draw.integer(100, 900),
            "saved_bytes": draw.integer(4000, 9000),
        }
        return usual | changed

    limit = draw.integer(10_000, 20_000)
    exceeds, equal, others = "whose cost exceeds the limit", "A cost equal to the limit", "are not limited"
    some, costs = "budget: the limit of some", "cost: the cost of each resource"
    two: dict[str, Data] = {"saved_bytes": limit, "added_work": 1000}
    three = two | {"trained_parameters": 9000}
    yield case("within every limit", cost(), two, others, exceeds)
    yield case("one of three limits is exceeded", cost(saved_bytes=limit + 1), three, exceeds, some, costs)
    name = "two limits are exceeded; the budget and the costs have different orders"
    yield case(name, cost(saved_bytes=2 * limit, trained_parameters=3 * limit), three, exceeds, some)
    dear = cost(saved_bytes=2 * limit, trained_parameters=3 * limit, added_work=2000)
    yield case("three limits are exceeded", dear, three, exceeds, some)
    yield case("exactly at the limit", cost(saved_bytes=limit), {"saved_bytes": limit}, equal)
    yield case("a limit of 0, and a cost of 0", cost(added_work=0), {"added_work": 0}, equal)
    yield case("a limit of 0, and a cost above it", cost(added_work=1), {"added_work": 0}, exceeds, costs)
    yield case("no limits", cost(), {}, others, some)
    known = cost(saved_bytes=2 * limit)
    del known["training_memory"]
    unknown, free = "the budget names a resource", "Unknown is not free"
    yield case("a limit on an unknown cost", known, {"training_memory": 2**40}, unknown, free)
    yield case("another limit is exceeded as well", known, two | {"training_memory": 2**40}, unknown, free)


# --- choose_method -----------------------------------------------------------------------------------


def method_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, candidates: dict[str, Data], budget: dict[str, Data], *sentences: str) -> Case:
        return Case(name, {"candidates": candidates, "budget": budget}, sentences=sentences)

    def candidate(quality: float, parameters: int, memory: int) -> dict[str, Data]:
        return {"quality": quality, "trained_parameters": parameters, "training_memory": memory}

    def number(smallest: float, largest: float) -> float:
        return round(draw.number(smallest, largest), 2)

    few, many = draw.integer(100, 400), draw.integer(5000, 9000)
    names = [f"method {chr(ord('a') + int(place))}" for place in draw.permutation(26)]  # no answer is known before
    three: dict[str, Data] = {
        names[0]: candidate(number(20, 30), few, 80),
        names[1]: candidate(number(70, 75), 100 * many, 200),
        names[2]: candidate(number(60, 65), many, 90),
    }
    best, equals, limits = "of the highest quality within", "among equals", "budget: the limits of the costs"
    given, higher = 'costs and "quality" of each', "a higher quality is better"
    yield case("everything is affordable", three, {"training_memory": 500}, best, higher, given)
    yield case("the best is over budget", three, {"training_memory": 100}, best, limits)
    yield case("only the worst is affordable", three, {"trained_parameters": 1000}, limits, given)
    yield case("two limits", three, {"training_memory": 100, "trained_parameters": 1000}, limits)
    level = number(50, 60)
    equal: dict[str, Data] = {
        names[3]: candidate(level, many, 70),
        names[4]: candidate(level, few, 95),
        names[5]: candidate(level - 5, few // 2, 10),
    }
    yield case("two of equal quality", equal, {"training_memory": 100}, equals)
    losses: dict[str, Data] = {
        names[6]: candidate(-number(2, 3), many, 70),
        names[7]: candidate(-number(4, 5), few, 70),
    }
    yield case("the quality is negative (minus the loss)", losses, {}, higher, best)
    yield case("one candidate costs exactly the limit", three, {"training_memory": 90}, limits)
    none = "ValueError: no candidate"
    yield case("nothing is affordable", three, {"training_memory": 5}, none)
    yield case("a limit on a cost that is not known", three, {"saved_bytes": 2**40}, none, limits)
    unknown: dict[str, Data] = {**three, names[8]: {"quality": 10.0, "trained_parameters": few}}
    yield case("one of four candidates has no such cost", unknown, {"training_memory": 500}, none, limits)


# --- best_learning_rate ------------------------------------------------------------------------------


def try_rates(answer: Callable[..., Any], rates: list[float], losses: list[float]) -> Any:
    """Keys of plain data are strings: the dictionary is built here."""
    rate, believable = answer(dict(zip(rates, losses, strict=True)))
    return {"the rate": float(rate), "can it be trusted": bool(believable)}


def rate_cases(draw: Draw) -> Iterator[Case]:
    shift = draw.number(0, 1)

    def case(name: str, losses: tuple[float, ...], *sentences: str, order: tuple[int, ...] = ()) -> Case:
        """Each rate is three times the one before; they are tried in the given order."""
        start = draw.choice([1e-4, 2e-4, 5e-4])
        sweep = [(start * 3**place, round(loss + shift, 3)) for place, loss in enumerate(losses)]
        tried = [sweep[place] for place in order or range(len(losses))]
        return Case(
            name, {"rates": [rate for rate, _ in tried], "losses": [loss for _, loss in tried]}, sentences=sentences
        )

    lowest, both, any_order = "The learning rate with the lowest loss", "both a smaller and a larger", "in any order"
    sides, worse, neighbour = "on both sides of the best", "worse than any loss", "counts as a neighbour"
    nan = math.nan
    yield case("the best is in the middle", (2.0, 1.5, 1.9), lowest, sides, both)
    yield case("the best is the smallest rate", (1.2, 1.5, 1.9), sides, both, lowest)
    yield case("the best is the largest rate", (2.0, 1.5, 1.1), sides, both, lowest)
    yield case("five rates, unsorted", (2.0, 1.8, 1.5, 1.3, 1.6), any_order, lowest, order=(3, 0, 4, 2, 1))
    yield case("the best is at the edge, unsorted", (2.0, 1.8, 1.5, 1.1), any_order, sides, order=(1, 3, 0, 2))
    yield case("the largest rate diverged", (2.0, 1.5, nan), neighbour, worse)
    yield case("the smallest is the best, the others diverged", (1.5, nan, nan), worse, both)
    yield case("the first rate tried diverged", (2.0, 1.6, 1.7, nan), worse, any_order, order=(3, 1, 2, 0))
    yield case("the smallest rate diverged", (nan, 1.5, 1.8), neighbour, worse)
    yield case("one rate", (1.5,), both)
    none = "ValueError: nothing was tried"
    yield case("every run diverged", (nan, nan), none)
    yield case("nothing was tried", (), none)


# --- pareto_front ------------------------------------------------------------------------------------


def try_front(answer: Callable[..., Any], costs: Any, quality: Any) -> Any:
    """Indices may come as a list, an array or a tensor."""
    front = answer(costs, quality)
    return [int(place) for place in front] if hasattr(front, "shape") and len(front.shape) == 1 else front


def front_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, costs: Tensor, quality: Tensor, *sentences: str) -> Case:
        return Case(name, {"costs": costs, "quality": quality}, sentences=sentences)

    def points(name: str, rows: Sequence[tuple[float, ...]], *sentences: str) -> Case:
        """Rows of costs, each followed by the quality; rescaled, which does not change any order."""
        values = torch.tensor(rows, dtype=torch.float64) * (1 + draw.integer(0, 3)) + 0.25 * draw.integer(0, 8)
        return case(name, values[:, :-1].contiguous(), values[:, -1].contiguous(), *sentences)

    front, beats, equals = "The Pareto front", "One candidate beats", "Two that are equal in every"
    less, more, costs = "less is better", "quality: (n,), more", "costs: (n, k)"
    yield points("one beats the other", [(1, 5), (2, 4)], front, beats, less, more)
    yield points("better and more expensive: neither beats the other", [(1, 4), (2, 5)], beats, more)
    yield points("equally good, one more expensive", [(2, 5), (1, 5), (3, 4)], beats, less, front)
    yield points("equally expensive, one better", [(1, 4), (1, 5)], beats, more)
    yield points("two that are equal in every respect", [(1, 5), (1, 5), (2, 4)], equals)
    yield points("two that are equal, and one that beats both", [(2, 4), (2, 4), (1, 5)], equals, front)
    each = [(1, 4, 4), (3, 1, 4), (3, 4, 4)]
    yield points("two costs: each of two candidates is the cheapest in one of them", each, beats, costs)
    expensive = [(1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 2.5)]
    yield points("the best one is the most expensive in every cost", expensive, beats, front)
    yield points("a single candidate", [(3, 1, 2)], front)
    n = draw.integer(7, 9)
    grid = torch.randint(0, 4, (n, 3), generator=draw.generator).double()
    many = grid[:, :2].contiguous(), grid[:, 2].contiguous()
    yield case("many candidates, two costs", *many, front, beats, costs)
    size = 2**25 + 4 * draw.integer(0, 99)
    of_bytes = torch.tensor([[size + 1], [size], [size + 3]])
    yield case("costs in bytes, as whole numbers that differ by little", of_bytes, torch.ones(3), costs, less)
    digits = torch.tensor([0.3, 0.3 + 1e-9, 0.3 - 1e-9], dtype=torch.float64)
    yield case("qualities that differ in the ninth digit", torch.ones(3, 1), digits, more, beats)
    different = "ValueError: the number of qualities"
    yield case("one quality fewer than rows of costs", many[0], many[1][1:], different, more)
    yield case("one quality more than rows of costs", many[0][1:], many[1], different, costs)


# --- paired_bootstrap --------------------------------------------------------------------------------


def bootstrap_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, one: Tensor, other: Tensor, samples: int, *sentences: str) -> Case:
        places = draw.integers(0, len(one) - 1, samples, len(one))
        return Case(name, {"one": one, "other": other, "places": places}, sentences=sentences)

    def scores(n: int, ahead: float = 0.0) -> tuple[Tensor, Tensor]:
        other = draw.normal(n, dtype=torch.float64)
        return other + 0.5 * draw.normal(n, dtype=torch.float64) + ahead, other

    share, same, half = "The share of resampled test sets", "the *same* cards for both", "counts half"
    more, places = "more is better", "places: (samples, n)"
    first, second = scores(6, ahead=5.0)
    yield case("the first is better on every card", first, second, 8, "Near 1, the first", share, more)
    yield case("the second is better on every card", second, first, 8, more, share)
    yield case("both are equal", first, first, 4, half, "near 1/2, the cards decide")
    yield case("close, 40 samples", *scores(12), 40, share, same, places)
    skewed = torch.zeros(10, dtype=torch.float64)
    skewed[draw.integer(0, 9)] = 10.0
    yield case("ahead by a single card", skewed, torch.full((10,), 0.1, dtype=torch.float64), 60, same, places, share)
    whole = draw.integers(0, 2, 8), draw.integers(0, 2, 8)
    yield case("whole numbers, with ties", *whole, 50, half, "one, other: (n,)")
    yield case("fewer cards for the second", skewed, skewed[:9], 4, "ValueError: the systems have")
    yield case("fewer cards for the first", skewed[:9], skewed, 4, "ValueError: the systems have", "one, other: (n,)")


EXERCISES = [
    Exercise(
        over_budget,
        idea="choosing a method",
        difficulty=1,
        minutes=5,
        points=2,
        hints=(
            "There are two questions: is the cost of every limited resource known? Which limits are exceeded?",
            "The second question takes one list comprehension over the budget's items, in the budget's order.",
            "First raise a ValueError that names the missing costs. Then keep the names whose cost exceeds the limit; "
            "equal is allowed.",
        ),
        cases=budget_cases,
        explain=explain_over_budget,
    ),
    Exercise(
        best_learning_rate,
        idea="fair comparisons",
        difficulty=2,
        minutes=10,
        points=3,
        hints=(
            "NaN is neither larger nor smaller than anything: what does min do with it? Handle it before you compare.",
            "Leave out the runs that diverged when you look for the best loss, but count them when you ask whether the "
            "best rate has neighbours.",
            "min(finished, key=...) gives the best rate. It is inside the sweep if it is neither the smallest nor the "
            "largest of all the rates tried.",
        ),
        cases=rate_cases,
        probe=try_rates,
    ),
    Exercise(
        pareto_front,
        idea="choosing a method",
        difficulty=3,
        minutes=20,
        points=4,
        hints=(
            "First make everything point the same way: less is better for the costs and for minus the quality.",
            "For a pair i, j ask two questions over all columns: is i nowhere worse than j (all), and is i somewhere "
            "better (any)? i beats j if both hold.",
            "Broadcasting compares all pairs at once: values[:, None] against values[None] has the shape (n, n, k + "
            "1). A candidate is on the front if no other beats it.",
        ),
        cases=front_cases,
        explain=explain_front,
        probe=try_front,
    ),
    Exercise(
        choose_method,
        idea="choosing a method",
        difficulty=2,
        minutes=10,
        points=3,
        hints=(
            "First discard what is over budget, with your over_budget. Then compare.",
            "max with a tuple as key compares the first entries, and the second entries if the first are equal.",
            "The key of a candidate is its quality, followed by minus the number of parameters it trains, since fewer "
            "is better. If no candidate is left, raise a ValueError.",
        ),
        cases=method_cases,
    ),
    Exercise(
        paired_bootstrap,
        idea="fair comparisons",
        difficulty=3,
        minutes=15,
        points=4,
        hints=(
            "A row of places is a test set. Both systems have to be scored on the same one, so use differences.",
            "Indexing a vector with a matrix of places gives a matrix: one row of differences per draw.",
            "The mean of each row decides that draw. Count the rows above 0, and half of those that are exactly 0, and "
            "divide by the number of rows.",
        ),
        cases=bootstrap_cases,
        explain=explain_bootstrap,
        background=("A test set is one sample", "another sample would give"),
    ),
]

PREDICTIONS = [
    Prediction(
        name="thousand_customers",
        question=(
            "You serve a thousand customers, each with a task of their own. You store either a fully fine-tuned "
            "checkpoint of the bundled model for each, or the base once and, for each customer, a LoRA of rank 8 on "
            "every matrix (196,608 parameters; the model has 5,853,184), everything in 32 bits. By what factor do the "
            "checkpoints need more bytes?"
        ),
        answer=1000 * 5_853_184 / (5_853_184 + 1000 * 196_608),
        within=1.35,
        explanation=(
            "1,000 checkpoints have 1,000 · 5.85 M parameters. With LoRA there are 5.85 M once and 1,000 · 0.197 M: "
            "smaller by a factor of about 29. For a large number of customers the factor approaches the inverse of the "
            "share that is trained."
        ),
        replies={
            "below": (
                "The base is stored once and hardly counts among a thousand; for each customer 196,608 "
                "parameters replace 5,853,184."
            ),
            "above": (
                "A LoRA has a thirtieth of the model's parameters, so even without the base the factor is no "
                "larger than 30."
            ),
        },
        idea="choosing a method",
        points=1,
    ),
    Prediction(
        name="two_points_ahead",
        question=(
            "Two systems generated texts for the same 100 cards; the mean slot error rate of the first is two points "
            "lower. Can you tell from that number alone whether another 100 cards would give the same order?"
        ),
        choices={
            "a": "yes: 100 cards are enough for two points",
            "b": "no: it depends on how much the difference varies from card to card",
            "c": "no: a difference of two points is always chance",
        },
        answer="b",
        explanation=(
            "Two points can come from two cards or from all hundred. The bootstrap draws the cards again, with "
            "replacement, and counts how often the order stays the same."
        ),
        replies={
            "a": (
                "A hundred cards are enough if the difference is about the same on each, and not if it varies by "
                "fifty points from card to card."
            ),
            "c": (
                "Not always: if the first is two points better on every single card, another hundred cards will "
                "hardly turn the order round."
            ),
        },
        idea="fair comparisons",
        points=1,
    ),
]
