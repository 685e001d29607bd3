"""Unit 14, the capstone: mistakes that people make, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import right, wrong

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


@wrong("over_budget", "You count what costs exactly the limit as too expensive. A limit may be used up.")
def limit_is_too_much(cost, budget):
    if any(name not in cost for name in budget):
        raise ValueError("unknown")
    return [name for name, limit in budget.items() if cost[name] >= limit]


@wrong("over_budget", "A limit of 0 is a limit: nothing may be spent there. You treat it as if there were none.")
def zero_is_no_limit(cost, budget):
    if any(name not in cost for name in budget):
        raise ValueError("unknown")
    return [name for name, limit in budget.items() if limit and cost[name] > limit]


@wrong("over_budget", "You take a cost that nobody knows for 0. Unknown is not free: it has to be refused.")
def unknown_is_free(cost, budget):
    return [name for name, limit in budget.items() if cost.get(name, 0) > limit]


@wrong("over_budget", "The names come in the order of the costs. The reader of a budget wants the budget's order.")
def order_of_the_costs(cost, budget):
    if any(name not in cost for name in budget):
        raise ValueError("unknown")
    return [name for name in cost if name in budget and cost[name] > budget[name]]


@wrong("over_budget", "You return what is within the budget. The question is what is not.")
def what_fits(cost, budget):
    if any(name not in cost for name in budget):
        raise ValueError("unknown")
    return [name for name, limit in budget.items() if cost[name] <= limit]


@wrong(
    "over_budget", "You stop at the first limit that is broken. Whoever has to change something wants to know them all."
)
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
    "A NaN came through your comparison: nothing is smaller than NaN, so a run that diverged can win if it comes "
    "first.",
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
    "You forget the runs that diverged when you look for neighbours. That a rate is too large is something that was "
    "tried and is known.",
)
def diverged_is_no_neighbour(losses):
    finished = {rate: loss for rate, loss in losses.items() if not math.isnan(loss)}
    if not finished:
        raise ValueError("diverged")
    best = min(finished, key=finished.get)
    return best, min(finished) < best < max(finished)


@wrong(
    "best_learning_rate",
    "Your edge is that of the order in which the rates were tried. Neighbours are the next smaller and the next larger "
    "rate.",
)
def edge_of_the_order(losses):
    finished = {rate: loss for rate, loss in losses.items() if not math.isnan(loss)}
    if not finished:
        raise ValueError("diverged")
    best = min(finished, key=finished.get)
    return best, best not in (next(iter(losses)), list(losses)[-1])


@wrong("best_learning_rate", "You take the rate with the highest loss. Of a loss, less is better.")
def highest_loss(losses):
    finished = {rate: loss for rate, loss in losses.items() if not math.isnan(loss)}
    if not finished:
        raise ValueError("diverged")
    best = max(finished, key=finished.get)
    return best, min(losses) < best < max(losses)


@wrong("best_learning_rate", "You say that every sweep can be believed. At the edge of what was tried it cannot.")
def always_believed(losses):
    finished = {rate: loss for rate, loss in losses.items() if not math.isnan(loss)}
    if not finished:
        raise ValueError("diverged")
    return min(finished, key=finished.get), True


@wrong("best_learning_rate", "You say the opposite: the best rate at the edge is the one that cannot be believed.")
def the_other_way_round(losses):
    finished = {rate: loss for rate, loss in losses.items() if not math.isnan(loss)}
    if not finished:
        raise ValueError("diverged")
    best = min(finished, key=finished.get)
    return best, not min(losses) < best < max(losses)


@wrong(
    "best_learning_rate",
    "You take one neighbour for enough. With nothing tried on the other side, the best may lie there.",
)
def one_neighbour(losses):
    finished = {rate: loss for rate, loss in losses.items() if not math.isnan(loss)}
    if not finished:
        raise ValueError("diverged")
    return min(finished, key=finished.get), len(losses) > 1


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


@wrong("choose_method", "You choose the best and forget the budget: somebody has to pay for it.")
def budget_forgotten(candidates, budget):
    if not any(_fits(values, budget) for values in candidates.values()):
        raise ValueError("nothing fits")
    return max(candidates, key=lambda n: (candidates[n]["quality"], -candidates[n]["trained_parameters"]))


@wrong("choose_method", "You choose the cheapest that is within the budget. A budget is there to be used for quality.")
def the_cheapest(candidates, budget):
    names = [name for name in candidates if _fits(candidates[name], budget)]
    if not names:
        raise ValueError("nothing fits")
    return min(names, key=lambda name: candidates[name]["trained_parameters"])


@wrong(
    "choose_method",
    "Of two that are equally good you take the one that trains more. The other one gives the same for less.",
)
def the_larger_of_equals(candidates, budget):
    names = [name for name in candidates if _fits(candidates[name], budget)]
    if not names:
        raise ValueError("nothing fits")
    return max(names, key=lambda name: (candidates[name]["quality"], candidates[name]["trained_parameters"]))


@wrong(
    "choose_method",
    "Your best begins at 0, so that no candidate with a negative quality, such as minus a loss, can win.",
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
    "When nothing is affordable you return something all the same. Nobody would notice that the budget is broken.",
)
def returns_none(candidates, budget):
    names = [name for name in candidates if _fits(candidates[name], budget)]
    return max(names, key=lambda n: (candidates[n]["quality"], -candidates[n]["trained_parameters"]), default=None)


@wrong("choose_method", "You take a candidate as affordable when one of the limits is kept. All of them have to be.")
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
    "One of two equal candidates beats the other in your answer, or both beat each other: to beat is to be better "
    "somewhere, and not only nowhere worse.",
)
def equal_beats(costs, quality):
    _refuse(costs, quality)
    values = torch.cat([costs, -quality[:, None]], dim=1)
    beats = (values[:, None] <= values[None]).all(-1)
    beats.fill_diagonal_(False)
    return [i for i in range(len(values)) if not beats[:, i].any()]


@wrong(
    "pareto_front",
    "You ask for better in every respect. Whoever is as cheap and better, or as good and cheaper, beats the other too.",
)
def better_everywhere(costs, quality):
    _refuse(costs, quality)
    values = torch.cat([costs, -quality[:, None]], dim=1)
    beats = (values[:, None] < values[None]).all(-1)
    return [i for i in range(len(values)) if not beats[:, i].any()]


@wrong("pareto_front", "Less quality counts as better in your answer. Costs and quality point in opposite directions.")
def quality_as_a_cost(costs, quality):
    _refuse(costs, quality)
    values = torch.cat([costs, quality[:, None]], dim=1)
    beats = (values[:, None] <= values[None]).all(-1) & (values[:, None] < values[None]).any(-1)
    return [i for i in range(len(values)) if not beats[:, i].any()]


@wrong(
    "pareto_front",
    "You have added the costs up. A megabyte and a microsecond have no sum: a candidate may be worth its place for one "
    "of them alone.",
)
def sum_of_the_costs(costs, quality):
    _refuse(costs, quality)
    values = torch.stack([costs.sum(1), -quality], dim=1)
    beats = (values[:, None] <= values[None]).all(-1) & (values[:, None] < values[None]).any(-1)
    return [i for i in range(len(values)) if not beats[:, i].any()]


@wrong("pareto_front", "You return the candidates that are beaten. The front is the others.")
def the_beaten(costs, quality):
    _refuse(costs, quality)
    values = torch.cat([costs, -quality[:, None]], dim=1)
    beats = (values[:, None] <= values[None]).all(-1) & (values[:, None] < values[None]).any(-1)
    return [i for i in range(len(values)) if beats[:, i].any()]


@wrong(
    "pareto_front",
    "You have turned the question round: a candidate that beats nobody can still be on the front, if nobody beats it.",
)
def who_beats_somebody(costs, quality):
    _refuse(costs, quality)
    values = torch.cat([costs, -quality[:, None]], dim=1)
    beats = (values[:, None] <= values[None]).all(-1) & (values[:, None] < values[None]).any(-1)
    return [i for i in range(len(values)) if beats[i].any()]


@wrong("pareto_front", "You look at the first cost alone. A candidate may be the cheapest in another one.")
def first_cost_only(costs, quality):
    _refuse(costs, quality)
    values = torch.stack([costs[:, 0], -quality], dim=1)
    beats = (values[:, None] <= values[None]).all(-1) & (values[:, None] < values[None]).any(-1)
    return [i for i in range(len(values)) if not beats[:, i].any()]


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
    "You score the second system on other cards than the first. Then the luck of the draw is counted twice; paired "
    "means the same cards for both.",
)
def not_paired(one, other, places):
    _same_cards(one, other)
    margin = one.double()[places].mean(1) - other.double()[places.roll(1, 0)].mean(1)
    return float((margin > 0).double().mean() + 0.5 * (margin == 0).double().mean())


@wrong("paired_bootstrap", "A draw on which both are equal counts nothing in your answer. It is half a win for each.")
def ties_lose(one, other, places):
    _same_cards(one, other)
    return float(((one - other).double()[places].mean(1) > 0).double().mean())


@wrong(
    "paired_bootstrap", "A draw on which both are equal is a whole win for the first in your answer. It is half of one."
)
def ties_win(one, other, places):
    _same_cards(one, other)
    return float(((one - other).double()[places].mean(1) >= 0).double().mean())


@wrong(
    "paired_bootstrap",
    "You count the cards that the first wins, not the draws. A test set is won by its mean: one card can outweigh "
    "many.",
)
def counts_cards(one, other, places):
    _same_cards(one, other)
    difference = (one - other)[places]
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


@wrong("paired_bootstrap", "You return how far the first is ahead on average. The question is how often it is ahead.")
def mean_difference(one, other, places):
    _same_cards(one, other)
    return float((one - other).double()[places].mean())


@wrong("paired_bootstrap", "You count the draws that the second system wins.")
def the_second(one, other, places):
    _same_cards(one, other)
    margin = (other - one).double()[places].mean(1)
    return float((margin > 0).double().mean() + 0.5 * (margin == 0).double().mean())


@wrong("paired_bootstrap", "You have not used the draws: on the cards that there are the answer is only yes or no.")
def without_draws(one, other, places):
    _same_cards(one, other)
    margin = (one - other).double().mean()
    return 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
