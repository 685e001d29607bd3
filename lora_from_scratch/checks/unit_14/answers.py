"""Unit 14, the capstone: mistakes that people make, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.compare.capstone.budget import over_budget
from lora_from_scratch.compare.capstone.choosing import (
    best_learning_rate,
    choose_method,
    paired_bootstrap,
    pareto_front,
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


@wrong("over_budget", "You treat a cost that equals the limit as too expensive. A limit may be reached.")
@changed(over_budget, ("cost[name] > limit", "cost[name] >= limit"))
def limit_is_too_much(): ...


@wrong("over_budget", "A limit of 0 is a limit: nothing may be spent there. You treat it as if there were none.")
@changed(over_budget, ("if cost[name] > limit", "if limit and cost[name] > limit"))
def zero_is_no_limit(): ...


@wrong("over_budget", "You treat an unknown cost as 0. Unknown does not mean free: raise a ValueError.")
def unknown_is_free(cost, budget):
    return [name for name, limit in budget.items() if cost.get(name, 0) > limit]


@wrong("over_budget", "The names are in the order of the costs. Return them in the order of the budget.")
def order_of_the_costs(cost, budget):
    if any(name not in cost for name in budget):
        raise ValueError("unknown")
    return [name for name in cost if name in budget and cost[name] > budget[name]]


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


# --- pareto_front ------------------------------------------------------------------------------------


def _refuse(costs, quality):
    if len(costs) != len(quality):
        raise ValueError("not as many")


@right("pareto_front")
def with_loops(costs, quality):
    _refuse(costs, quality)
    front = []
    for j in range(len(costs)):
        beaten = False
        for i in range(len(costs)):
            no_worse = bool((costs[i] <= costs[j]).all()) and quality[i] >= quality[j]
            better = bool((costs[i] < costs[j]).any()) or quality[i] > quality[j]
            beaten = beaten or bool(no_worse and better)
        if not beaten:
            front.append(j)
    return front


@right("pareto_front")
def with_numpy_arrays(costs, quality):
    _refuse(costs, quality)
    values = np.concatenate([-costs.numpy(), quality.numpy()[:, None]], axis=1)
    keep = [not ((values >= row).all(1) & (values > row).any(1)).any() for row in values]
    return np.flatnonzero(keep)


@right("pareto_front")
def as_a_tensor(costs, quality):
    _refuse(costs, quality)
    values = torch.column_stack([costs, -quality]).float()
    different = (values[:, None] != values[None]).any(-1)
    beats = (values[:, None] <= values[None]).all(-1) & different
    return (~beats.any(0)).nonzero().flatten()


@wrong(
    "pareto_front",
    "In your answer one of two equal candidates beats the other, or each beats the other: to beat means to be better "
    "somewhere, not only nowhere worse.",
)
@changed(pareto_front, ("(nowhere_worse & better_somewhere)", "nowhere_worse.fill_diagonal_(False)"))
def equal_beats(): ...


@wrong(
    "pareto_front",
    "You require a candidate to be better in every respect. One that is as cheap and better, or as good and cheaper, "
    "also beats the other.",
)
@changed(pareto_front, ("values[None]).any(dim=-1)", "values[None]).all(dim=-1)"))
def better_everywhere(): ...


@wrong("pareto_front", "In your answer lower quality counts as better. Costs and quality point in opposite directions.")
@changed(pareto_front, ("-quality[:, None]", "quality[:, None]"))
def quality_as_a_cost(): ...


@wrong(
    "pareto_front",
    "You add up the costs. Different units cannot be added: a candidate may be on the front because of one cost alone.",
)
@changed(pareto_front, ("[costs, -quality", "[costs.sum(dim=1, keepdim=True), -quality"))
def sum_of_the_costs(): ...


@wrong("pareto_front", "You return the candidates that are beaten. The front consists of the others.")
@changed(pareto_front, ("if not beaten", "if beaten"))
def the_beaten(): ...


@wrong(
    "pareto_front",
    "You have reversed the question: a candidate that beats no other can still be on the front, if no other beats it.",
)
@changed(pareto_front, ("any(dim=0)", "any(dim=1)"), ("if not beaten", "if beaten"))
def who_beats_somebody(): ...


@wrong("pareto_front", "You use only the first cost. A candidate may be the cheapest in another one.")
@changed(pareto_front, ("[costs, -quality", "[costs[:, :1], -quality"))
def first_cost_only(): ...


# --- paired_bootstrap --------------------------------------------------------------------------------


def _same_cards(one, other):
    if len(one) != len(other):
        raise ValueError("not the same cards")


@right("paired_bootstrap")
def draw_by_draw(one, other, places):
    _same_cards(one, other)
    wins = 0.0
    for row in places:
        margin = (one[row] - other[row]).double().sum()
        wins += 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
    return wins / len(places)


@right("paired_bootstrap")
def with_arrays(one, other, places):
    _same_cards(one, other)
    margin = (one.numpy().astype(np.float64) - other.numpy())[places.numpy()].sum(1)
    return (np.sign(margin).mean() + 1) / 2


@wrong(
    "paired_bootstrap",
    "You score the second system on other cards than the first. That adds the randomness of a second draw; paired "
    "means the same cards for both.",
)
def not_paired(one, other, places):
    _same_cards(one, other)
    margin = one.double()[places].mean(1) - other.double()[places.roll(1, 0)].mean(1)
    return float((margin > 0).double().mean() + 0.5 * (margin == 0).double().mean())


@wrong(
    "paired_bootstrap", "Your answer does not count a draw on which both are equal. It counts as half a win for each."
)
@changed(paired_bootstrap, (" + 0.5 * (difference == 0)", ""))
def ties_lose(): ...


@wrong(
    "paired_bootstrap",
    "Your answer counts a draw on which both are equal as a whole win for the first. It counts as half a win.",
)
@changed(paired_bootstrap, ("0.5 * (difference == 0)", "1.0 * (difference == 0)"))
def ties_win(): ...


@wrong(
    "paired_bootstrap",
    "You count the cards that the first system wins, not the draws. The mean decides a test set: one card can outweigh "
    "many.",
)
@changed(paired_bootstrap, ("[places].mean(dim=1)", "[places]"))
def counts_cards(): ...


@wrong("paired_bootstrap", "You return how far the first system is ahead on average. Return how often it is ahead.")
def mean_difference(one, other, places):
    _same_cards(one, other)
    return float((one - other).double()[places].mean())


@wrong("paired_bootstrap", "You count the draws that the second system wins.")
@changed(paired_bootstrap, ("(one - other)", "(other - one)"))
def the_second(): ...


@wrong("paired_bootstrap", "You do not use the draws: on the original cards alone the answer is only yes or no.")
def without_draws(one, other, places):
    _same_cards(one, other)
    margin = (one - other).double().mean()
    return 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
