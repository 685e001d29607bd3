"""Unit 14, budgets, learning rates and the choice of a method: mistakes that people make, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.compare.capstone.budget import over_budget
from lora_from_scratch.compare.capstone.choosing import (
    best_learning_rate,
    choose_method,
)

# --- over_budget -------------------------------------------------------------------------------------


@right("over_budget")
def with_a_loop(cost, budget):
    too_much = []
    for name in budget:
        if name not in cost:
            raise ValueError(f"no cost for {name}")
        if cost[name] > budget[name]:
            too_much.append(name)
    return too_much


@right("over_budget")
def with_sets_and_sorting(cost, budget):
    if not set(budget) <= set(cost):
        raise ValueError("unknown costs")
    exceeded = {name for name in budget if not cost[name] <= budget[name]}
    return sorted(exceeded, key=list(budget).index)


@right("over_budget")
def what_is_left(cost, budget):
    try:
        left = {name: budget[name] - cost[name] for name in budget}
    except KeyError as error:
        raise ValueError(f"unknown: {error}") from None
    return [name for name, rest in left.items() if rest < 0]


@right("over_budget")
def with_filter(cost, budget):
    missing = budget.keys() - cost.keys()
    if missing:
        raise ValueError(f"no cost of {', '.join(missing)}")
    return list(filter(lambda name: max(cost[name], budget[name]) != budget[name], budget))


@wrong("over_budget", "You also return costs that the budget does not name. They are not limited.")
def everything_else_is_forbidden(cost, budget):
    return over_budget(cost, budget) + [name for name in cost if name not in budget]


@wrong(
    "over_budget",
    "You notice an unknown cost only if no limit is exceeded. Raise the error in any case.",
)
def asks_too_late(cost, budget):
    known = [name for name, limit in budget.items() if name in cost and cost[name] > limit]
    return known or over_budget(cost, budget)


@wrong("over_budget", "You treat a cost that equals the limit as too expensive. A limit may be reached.")
@changed(over_budget, ("cost[name] > limit", "cost[name] >= limit"))
def limit_is_too_much(): ...


@wrong("over_budget", "A limit of 0 is a limit: nothing may be spent there. You treat it as if there were none.")
@changed(over_budget, ("if cost[name] > limit", "if limit and cost[name] > limit"))
def zero_is_no_limit(): ...


@wrong(
    "over_budget",
    "You treat an unknown cost as if it were within the limit. Unknown does not mean free: raise a ValueError.",
)
def unknown_is_free(cost, budget):
    return [name for name, limit in budget.items() if cost.get(name, 0) > limit]


@wrong("over_budget", "The names are in the order of the costs. Return them in the order of the budget.")
def order_of_the_costs(cost, budget):
    if any(name not in cost for name in budget):
        raise ValueError("unknown")
    return [name for name in cost if name in budget and cost[name] > budget[name]]


@wrong("over_budget", "The names are in alphabetical order. Return them in the order of the budget.")
@changed(over_budget, ("in budget.items()", "in sorted(budget.items())"))
def sorted_by_name(): ...


@wrong("over_budget", "You return what is within the budget. Return what exceeds it.")
@changed(over_budget, ("cost[name] > limit", "cost[name] <= limit"))
def what_fits(): ...


@wrong("over_budget", "You stop at the first limit that is exceeded. Return all of them.")
def only_the_first(cost, budget):
    if any(name not in cost for name in budget):
        raise ValueError("unknown")
    for name, limit in budget.items():
        if cost[name] > limit:
            return [name]
    return []


# --- best_learning_rate ------------------------------------------------------------------------------


@right("best_learning_rate")
def with_sorted_rates(losses):
    rates = sorted(losses)
    values = [math.inf if losses[rate] != losses[rate] else losses[rate] for rate in rates]
    if not values or min(values) == math.inf:
        raise ValueError("every run diverged")
    place = values.index(min(values))
    return rates[place], 0 < place < len(rates) - 1


@right("best_learning_rate")
def with_numpy(losses):
    rates = np.array(sorted(losses))
    values = np.array([losses[rate] for rate in rates.tolist()])
    if np.isnan(values).all():
        raise ValueError("every run diverged")
    place = int(np.nanargmin(values))
    return float(rates[place]), bool(0 < place < len(rates) - 1)


@right("best_learning_rate")
def by_comparing_with_all_others(losses):
    finished = [(loss, rate) for rate, loss in losses.items() if loss == loss]
    if not finished:
        raise ValueError("no loss")
    best = sorted(finished)[0][1]
    return best, any(rate < best for rate in losses) and any(rate > best for rate in losses)


@right("best_learning_rate")
def with_a_tensor(losses):
    values = torch.tensor(list(losses.values()), dtype=torch.float64)
    if not len(values) or bool(values.isnan().all()):
        raise ValueError("no loss")
    best = list(losses)[int(values.nan_to_num(nan=math.inf).argmin())]
    sides = {math.copysign(1, rate - best) for rate in losses if rate != best}
    return best, len(sides) == 2


@wrong("best_learning_rate", "If nothing was tried or every run diverged there is no best rate: raise a ValueError.")
def no_rate_is_none(losses):
    finished = {rate: loss for rate, loss in losses.items() if not math.isnan(loss)}
    if not finished:
        return math.nan, False
    best = min(finished, key=finished.get)
    return best, min(losses) < best < max(losses)


@wrong("best_learning_rate", "You return the lowest loss. Return the learning rate that gave it.")
@changed(best_learning_rate, ("return best, min", "return finished[best], min"))
def the_loss_itself(): ...


@wrong(
    "best_learning_rate", "You take the loss of a run that diverged for 0, the best there could be. It is the worst."
)
@changed(
    best_learning_rate,
    (
        "best = min(finished, key=lambda rate: finished[rate])",
        "best = min(losses, key=lambda rate: finished.get(rate, 0.0))",
    ),
)
def diverged_is_zero(): ...


@wrong("best_learning_rate", "You ask only for a larger rate. A smaller one has to be tried as well.")
@changed(best_learning_rate, ("min(losses) < best < max(losses)", "best < max(losses)"))
def only_a_larger_one(): ...


@wrong("best_learning_rate", "You ask only for a smaller rate. A larger one has to be tried as well.")
@changed(best_learning_rate, ("min(losses) < best < max(losses)", "min(losses) < best"))
def only_a_smaller_one(): ...


@wrong(
    "best_learning_rate",
    "A NaN affects your comparison: nothing is smaller than NaN, so a run that diverged can win if it comes first.",
)
def nan_wins(losses):
    if not losses or all(math.isnan(loss) for loss in losses.values()):
        raise ValueError("diverged")
    best = None
    for rate in losses:
        if best is None or losses[rate] < losses[best]:
            best = rate
    return best, min(losses) < best < max(losses)


@wrong(
    "best_learning_rate",
    "You ignore the runs that diverged when you look for neighbours. A rate that was too large was tried as well.",
)
@changed(best_learning_rate, ("min(losses) < best < max(losses)", "min(finished) < best < max(finished)"))
def diverged_is_no_neighbour(): ...


@wrong(
    "best_learning_rate",
    "You look at the order in which the rates were tried. Neighbours are the next smaller and the next larger rate.",
)
@changed(best_learning_rate, ("min(losses) < best < max(losses)", "best not in (next(iter(losses)), list(losses)[-1])"))
def edge_of_the_order(): ...


@wrong("best_learning_rate", "You take the rate with the highest loss. Lower losses are better.")
@changed(best_learning_rate, ("best = min(", "best = max("))
def highest_loss(): ...


@wrong("best_learning_rate", "You return that every sweep can be trusted. If the best rate is at the edge, it cannot.")
@changed(best_learning_rate, ("min(losses) < best < max(losses)", "True"))
def always_believed(): ...


@wrong("best_learning_rate", "Your answer is inverted: if the best rate is at the edge, the sweep cannot be trusted.")
@changed(best_learning_rate, ("min(losses) < best < max(losses)", "not min(losses) < best < max(losses)"))
def the_other_way_round(): ...


@wrong(
    "best_learning_rate",
    "You require only one neighbour. If nothing was tried on the other side, the best rate may be there.",
)
@changed(best_learning_rate, ("min(losses) < best < max(losses)", "len(losses) > 1"))
def one_neighbour(): ...


# --- choose_method -----------------------------------------------------------------------------------


def _fits(values, budget):
    if not set(budget) <= set(values):
        raise ValueError("a cost is not known")
    return all(values[name] <= limit for name, limit in budget.items())


@right("choose_method")
def by_sorting(candidates, budget):
    names = [name for name in candidates if _fits(candidates[name], budget)]
    if not names:
        raise ValueError("nothing fits")
    names.sort(key=lambda name: candidates[name]["trained_parameters"])
    names.sort(key=lambda name: candidates[name]["quality"], reverse=True)
    return names[0]


@right("choose_method")
def by_walking(candidates, budget):
    best = None
    for name, values in candidates.items():
        if not _fits(values, budget):
            continue
        if best is None or values["quality"] > candidates[best]["quality"]:
            best = name
        elif values["quality"] == candidates[best]["quality"]:
            best = min(best, name, key=lambda one: candidates[one]["trained_parameters"])
    if best is None:
        raise ValueError("nothing fits")
    return best


@right("choose_method")
def as_a_tournament(candidates, budget):
    def better(one, other):
        (q, p), (r, s) = ((candidates[n]["quality"], candidates[n]["trained_parameters"]) for n in (one, other))
        return one if q > r or (q == r and p <= s) else other

    within = [name for name, values in candidates.items() if not over_budget(values, budget)]
    if not within:
        raise ValueError("nothing fits")
    return functools.reduce(better, within)


@right("choose_method")
def in_two_steps(candidates, budget):
    within = {name: values for name, values in candidates.items() if _fits(values, budget)}
    if not within:
        raise ValueError("nothing fits")
    best = max(values["quality"] for values in within.values())
    equals = [name for name, values in within.items() if values["quality"] == best]
    return min(equals, key=lambda name: within[name]["trained_parameters"])


@wrong("choose_method", "You treat a cost that equals the limit as too expensive. A limit may be reached.")
def strictly_within(candidates, budget):
    names = [n for n, values in candidates.items() if all(values[k] < limit for k, limit in budget.items())]
    if not names:
        raise ValueError("nothing fits")
    return max(names, key=lambda n: (candidates[n]["quality"], -candidates[n]["trained_parameters"]))


@wrong(
    "choose_method",
    "You leave out a candidate whose cost is not known. Nobody would notice that it is missing: raise a ValueError.",
)
def unknown_costs_are_passed_over(candidates, budget):
    known = {name: values for name, values in candidates.items() if all(cost in values for cost in budget)}
    return choose_method(known, budget)


@wrong("choose_method", "You treat a cost that is not known as 0. Raise a ValueError, as `over_budget` does.")
def unknown_costs_nothing(candidates, budget):
    names = [n for n, values in candidates.items() if all(values.get(k, 0) <= limit for k, limit in budget.items())]
    if not names:
        raise ValueError("nothing fits")
    return max(names, key=lambda n: (candidates[n]["quality"], -candidates[n]["trained_parameters"]))


@wrong("choose_method", "You choose the lowest quality within the budget. A higher quality is better.")
@changed(choose_method, ("return max(", "return min("))
def the_worst(): ...


@wrong("choose_method", "You choose the best candidate and ignore the budget.")
def budget_forgotten(candidates, budget):
    if not any(_fits(values, budget) for values in candidates.values()):
        raise ValueError("nothing fits")
    return max(candidates, key=lambda n: (candidates[n]["quality"], -candidates[n]["trained_parameters"]))


@wrong(
    "choose_method", "You choose the cheapest candidate within the budget. Within the budget, choose the best quality."
)
def the_cheapest(candidates, budget):
    names = [name for name in candidates if _fits(candidates[name], budget)]
    if not names:
        raise ValueError("nothing fits")
    return min(names, key=lambda name: candidates[name]["trained_parameters"])


@wrong(
    "choose_method",
    "Of two equally good candidates you choose the one that trains more. The other one gives the same quality with "
    "fewer parameters.",
)
@changed(choose_method, ("-affordable[name]", "affordable[name]"))
def the_larger_of_equals(): ...


@wrong(
    "choose_method",
    "Your search for the best starts at 0, so no candidate with a negative quality, such as minus a loss, can win.",
)
def begins_at_zero(candidates, budget):
    best, quality = None, 0.0
    for name in sorted(candidates, key=lambda n: candidates[n]["trained_parameters"]):
        if _fits(candidates[name], budget) and candidates[name]["quality"] > quality:
            best, quality = name, candidates[name]["quality"]
    if best is None and not any(_fits(values, budget) for values in candidates.values()):
        raise ValueError("nothing fits")
    return best


@wrong(
    "choose_method",
    "You return a candidate even if none is affordable. Raise a ValueError, or nobody would notice that the budget is "
    "exceeded.",
)
def returns_none(candidates, budget):
    names = [name for name in candidates if _fits(candidates[name], budget)]
    return max(names, key=lambda n: (candidates[n]["quality"], -candidates[n]["trained_parameters"]), default=None)


@wrong(
    "choose_method", "You treat a candidate as affordable if it keeps one of the limits. It has to keep all of them."
)
def any_limit(candidates, budget):
    def fits(values):
        return not budget or any(values[name] <= limit for name, limit in budget.items())

    names = [name for name in candidates if fits(candidates[name])]
    if not names:
        raise ValueError("nothing fits")
    return max(names, key=lambda n: (candidates[n]["quality"], -candidates[n]["trained_parameters"]))
