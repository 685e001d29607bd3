"""Unit 14, the capstone: what is checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
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
    def cost(**changed: float) -> dict[str, Data]:
        usual: dict[str, Data] = {
            "trained_parameters": draw.integer(1000, 9000),
            "training_memory": draw.integer(50, 90) * 2**20,
            "added_work": draw.integer(100, 900),
            "saved_bytes": draw.integer(4000, 9000),
        }
        return usual | changed

    limit = draw.integer(10_000, 20_000)
    yield Case("within every limit", {"cost": cost(), "budget": {"saved_bytes": limit, "added_work": 1000}})
    yield Case(
        "one of three limits is exceeded",
        {
            "cost": cost(saved_bytes=limit + 1),
            "budget": {"saved_bytes": limit, "added_work": 1000, "trained_parameters": 9000},
        },
    )
    yield Case(
        "two limits are exceeded; the budget and the costs have different orders",
        {
            "cost": cost(saved_bytes=2 * limit, trained_parameters=3 * limit),
            "budget": {"saved_bytes": limit, "added_work": 1000, "trained_parameters": limit},
        },
    )
    yield Case("exactly at the limit", {"cost": cost(saved_bytes=limit), "budget": {"saved_bytes": limit}})
    yield Case("a limit of 0, and a cost of 0", {"cost": cost(added_work=0), "budget": {"added_work": 0}})
    yield Case("a limit of 0, and a cost above it", {"cost": cost(added_work=1), "budget": {"added_work": 0}})
    yield Case("no limits", {"cost": cost(), "budget": {}})
    known = cost()
    del known["training_memory"]
    yield Case("a limit on an unknown cost", {"cost": known, "budget": {"training_memory": 2**40}})


# --- choose_method -----------------------------------------------------------------------------------


def method_cases(draw: Draw) -> Iterator[Case]:
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
    yield Case("everything is affordable", {"candidates": three, "budget": {"training_memory": 500}})
    yield Case("the best is over budget", {"candidates": three, "budget": {"training_memory": 100}})
    yield Case("only the worst is affordable", {"candidates": three, "budget": {"trained_parameters": 1000}})
    both: dict[str, Data] = {"training_memory": 100, "trained_parameters": 1000}
    yield Case("two limits", {"candidates": three, "budget": both})
    level = number(50, 60)
    equal: dict[str, Data] = {
        names[3]: candidate(level, many, 70),
        names[4]: candidate(level, few, 95),
        names[5]: candidate(level - 5, few // 2, 10),
    }
    yield Case("two of equal quality", {"candidates": equal, "budget": {"training_memory": 100}})
    losses: dict[str, Data] = {
        names[6]: candidate(-number(2, 3), many, 70),
        names[7]: candidate(-number(4, 5), few, 70),
    }
    yield Case("the quality is negative (minus the loss)", {"candidates": losses, "budget": {}})
    exact: dict[str, Data] = {"training_memory": 90}
    yield Case("one candidate costs exactly the limit", {"candidates": three, "budget": exact})
    yield Case("nothing is affordable", {"candidates": three, "budget": {"training_memory": 5}})


# --- best_learning_rate ------------------------------------------------------------------------------


def try_rates(answer: Callable[..., Any], rates: list[float], losses: list[float]) -> Any:
    """Keys of plain data are strings: the dictionary is built here."""
    rate, believable = answer(dict(zip(rates, losses, strict=True)))
    return {"the rate": float(rate), "can it be trusted": bool(believable)}


def rate_cases(draw: Draw) -> Iterator[Case]:
    def sweep(*losses: float) -> dict[str, Data]:
        start = draw.choice([1e-4, 2e-4, 5e-4])
        rates: list[Data] = [start * 3**place for place in range(len(losses))]
        return {"rates": rates, "losses": [loss if math.isnan(loss) else round(loss + shift, 3) for loss in losses]}

    def turned(case: dict[str, Data], order: list[int]) -> dict[str, Data]:
        return {name: [values[place] for place in order] for name, values in case.items() if isinstance(values, list)}

    shift = draw.number(0, 1)
    yield Case("the best is in the middle", sweep(2.0, 1.5, 1.9))
    yield Case("the best is the smallest rate", sweep(1.2, 1.5, 1.9))
    yield Case("the best is the largest rate", sweep(2.0, 1.5, 1.1))
    yield Case("five rates, unsorted", turned(sweep(2.0, 1.8, 1.5, 1.3, 1.6), [3, 0, 4, 2, 1]))
    yield Case("the best is at the edge, unsorted", turned(sweep(2.0, 1.8, 1.5, 1.1), [1, 3, 0, 2]))
    yield Case("the largest rate diverged", sweep(2.0, 1.5, math.nan))
    yield Case("the smallest is the best, the others diverged", sweep(1.5, math.nan, math.nan))
    yield Case("the first rate tried diverged", turned(sweep(2.0, 1.6, 1.7, math.nan), [3, 1, 2, 0]))
    yield Case("one rate", sweep(1.5))
    yield Case("everything diverged", sweep(math.nan, math.nan))


# --- pareto_front ------------------------------------------------------------------------------------


def try_front(answer: Callable[..., Any], costs: Any, quality: Any) -> Any:
    """Indices may come as a list, an array or a tensor."""
    front = answer(costs, quality)
    return [int(place) for place in front] if hasattr(front, "shape") and len(front.shape) == 1 else front


def front_cases(draw: Draw) -> Iterator[Case]:
    def points(*rows: tuple[float, ...]) -> dict[str, Data]:
        """Rows of costs, each followed by the quality; rescaled, which does not change any order."""
        values = torch.tensor(rows, dtype=torch.float64) * (1 + draw.integer(0, 3)) + 0.25 * draw.integer(0, 8)
        return {"costs": values[:, :-1].contiguous(), "quality": values[:, -1].contiguous()}

    yield Case("one beats the other", points((1, 5), (2, 4)))
    yield Case("better and more expensive: neither beats the other", points((1, 4), (2, 5)))
    yield Case("equally good, one more expensive", points((2, 5), (1, 5), (3, 4)))
    yield Case("equally expensive, one better", points((1, 4), (1, 5)))
    yield Case("two that are equal in every respect", points((1, 5), (1, 5), (2, 4)))
    yield Case("two that are equal, and one that beats both", points((2, 4), (2, 4), (1, 5)))
    yield Case("two costs: each candidate is the cheapest in one of them", points((1, 4, 4), (3, 1, 4), (3, 4, 4)))
    yield Case("the best one is the most expensive in every cost", points((1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 2.5)))
    n = draw.integer(7, 9)
    grid = torch.randint(0, 4, (n, 3), generator=draw.generator).double()
    yield Case("many candidates, two costs", {"costs": grid[:, :2].contiguous(), "quality": grid[:, 2].contiguous()})
    yield Case("one quality fewer than rows of costs", {"costs": grid[:, :2].contiguous(), "quality": grid[1:, 2]})


# --- paired_bootstrap --------------------------------------------------------------------------------


def bootstrap_cases(draw: Draw) -> Iterator[Case]:
    def scores(n: int, ahead: float = 0.0) -> dict[str, Data]:
        other = draw.normal(n, dtype=torch.float64)
        one = other + 0.5 * draw.normal(n, dtype=torch.float64) + ahead
        return {"one": one, "other": other}

    def draws(samples: int, n: int) -> dict[str, Data]:
        return {"places": draw.integers(0, n - 1, samples, n)}

    ahead = scores(6, ahead=5.0)
    yield Case("the first is better on every card", ahead | draws(8, 6))
    yield Case("the second is better on every card", {"one": ahead["other"], "other": ahead["one"]} | draws(8, 6))
    yield Case("both are equal", {"one": ahead["one"], "other": ahead["one"]} | draws(4, 6))
    yield Case("close, 40 draws", scores(12) | draws(40, 12))
    skewed = torch.zeros(10, dtype=torch.float64)
    skewed[draw.integer(0, 9)] = 10.0
    nearly = {"one": skewed, "other": torch.full((10,), 0.1, dtype=torch.float64)}
    yield Case("ahead by a single card", nearly | draws(60, 10))
    whole = {"one": draw.integers(0, 2, 8), "other": draw.integers(0, 2, 8)}
    yield Case("whole numbers, with ties", whole | draws(50, 8))
    yield Case("fewer cards for the second", {"one": skewed, "other": skewed[:9]} | draws(4, 9))


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
