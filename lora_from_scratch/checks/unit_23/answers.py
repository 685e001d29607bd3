"""Unit 23: mistakes that people make, and other right ways. Fair comparisons."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.compare.capstone.choosing import best_learning_rate
from lora_from_scratch.compare.folklore import best_rate_ratio, matched_rank

# --- steps_per_epoch ---------------------------------------------------------------------------------


@right("steps_per_epoch")
def rounded_up_with_ceil(examples, micro_batch, accumulation=1, processes=1):
    return math.ceil(examples / (micro_batch * accumulation * processes))


@right("steps_per_epoch")
def quotient_and_rest(examples, micro_batch, accumulation=1, processes=1):
    steps, rest = divmod(examples, micro_batch * accumulation * processes)
    return steps + 1 if rest else steps


@right("steps_per_epoch")
def counted_one_by_one(examples, micro_batch, accumulation=1, processes=1):
    steps = seen = 0
    while seen < examples:
        seen += micro_batch * accumulation * processes
        steps += 1
    return steps


@right("steps_per_epoch")
def length_of_a_range(examples, micro_batch, accumulation=1, processes=1):
    return len(range(0, examples, micro_batch * accumulation * processes))


@wrong("steps_per_epoch", "You leave out the examples that do not fill a batch. They take one more step.")
def rounded_down(examples, micro_batch, accumulation=1, processes=1):
    return examples // (micro_batch * accumulation * processes)


@wrong("steps_per_epoch", "You do not count the accumulation: several micro-batches make one step.")
def without_accumulation(examples, micro_batch, accumulation=1, processes=1):
    return -(-examples // (micro_batch * processes))


@wrong("steps_per_epoch", "You do not count the processes: in one step each of them has its own micro-batches.")
def without_processes(examples, micro_batch, accumulation=1, processes=1):
    return -(-examples // (micro_batch * accumulation))


@wrong("steps_per_epoch", "You use the micro-batch alone. How many examples does one step of the optimiser use?")
def the_micro_batch_alone(examples, micro_batch, accumulation=1, processes=1):
    return -(-examples // micro_batch)


@wrong("steps_per_epoch", "You always add a step. If the examples fill whole batches, there is no rest.")
def one_too_many(examples, micro_batch, accumulation=1, processes=1):
    return examples // (micro_batch * accumulation * processes) + 1


@wrong("steps_per_epoch", "You divide without rounding. A step is a whole step.")
def a_fraction(examples, micro_batch, accumulation=1, processes=1):
    return examples / (micro_batch * accumulation * processes)


@wrong("steps_per_epoch", "You round to the nearest whole number. A small rest takes a step too.")
def rounded(examples, micro_batch, accumulation=1, processes=1):
    return round(examples / (micro_batch * accumulation * processes))


@wrong("steps_per_epoch", "You return the effective batch: the number of examples in one step.")
def the_effective_batch(examples, micro_batch, accumulation=1, processes=1):
    return micro_batch * accumulation * processes


@wrong("steps_per_epoch", "You add up the micro-batch, the accumulation and the processes. They multiply.")
def a_sum(examples, micro_batch, accumulation=1, processes=1):
    return -(-examples // (micro_batch + (accumulation - 1) + (processes - 1)))


# --- matched_rank ------------------------------------------------------------------------------------


@right("matched_rank")
def the_nearest_of_all(rank, layers, other_layers):
    budget = rank * sum(a + b for a, b in layers)
    one = sum(a + b for a, b in other_layers)
    return min(range(1, budget // one + 3), key=lambda r: abs(r * one - budget))


@right("matched_rank")
def half_is_rounded_down(rank, layers, other_layers):
    ratio = rank * sum(map(sum, layers)) / sum(map(sum, other_layers))
    return max(1, math.ceil(ratio - 0.5))


@right("matched_rank")
def climbing(rank, layers, other_layers):
    budget, one, r = rank * sum(map(sum, layers)), sum(map(sum, other_layers)), 1
    while abs((r + 1) * one - budget) < abs(r * one - budget):
        r += 1
    return r


@right("matched_rank")
def with_arrays(rank, layers, other_layers):
    budget, one = rank * np.array(layers).sum(), np.array(other_layers).sum()
    ranks = np.arange(1, budget // one + 2)
    return int(ranks[np.abs(ranks * one - budget).argmin()])


@wrong("matched_rank", "You round down. The rank above may have a number of parameters that is nearer.")
@changed(matched_rank, ("max(1, below + (2 * rest > per_rank))", "max(1, below)"))
def always_below(): ...


@wrong("matched_rank", "You round up. The rank below may have a number of parameters that is nearer.")
@changed(matched_rank, ("2 * rest > per_rank", "rest > 0"))
def always_above(): ...


@wrong("matched_rank", "If two ranks are equally near, you take the higher one.")
@changed(matched_rank, ("2 * rest > per_rank", "2 * rest >= per_rank"))
def the_higher_of_two(): ...


@wrong(
    "matched_rank", "Python's `round` takes a half to the even number. Of two ranks that are equally near, the lower."
)
def rounded_to_even(rank, layers, other_layers):
    return max(1, round(rank * sum(map(sum, layers)) / sum(map(sum, other_layers))))


@wrong("matched_rank", "Your rank can be 0, which is no LoRA.")
@changed(matched_rank, ("max(1, below + (2 * rest > per_rank))", "below + (2 * rest > per_rank)"))
def rank_of_zero(): ...


@wrong(
    "matched_rank",
    "You count the weights themselves, out times in. LoRA trains A (r, in) and B (out, r), which add up.",
)
@changed(
    matched_rank,
    ("for out, into in layers", "for out, into in [(a * b, 0) for a, b in layers]"),
    ("for out, into in other_layers", "for out, into in [(a * b, 0) for a, b in other_layers]"),
)
def weights_are_counted(): ...


@wrong("matched_rank", "You count B alone, or A alone: both are trained.")
@changed(
    matched_rank,
    ("sum(out + into for out, into in layers)", "sum(out for out, into in layers)"),
    ("sum(out + into for out, into in other_layers)", "sum(out for out, into in other_layers)"),
)
def only_B(): ...


@wrong("matched_rank", "You compare the numbers of layers, not of parameters. The layers have different sizes.")
def layers_are_counted(rank, layers, other_layers):
    return max(1, round(rank * len(layers) / len(other_layers)))


@wrong("matched_rank", "You have swapped the two: the rank is that of the LoRA on the first layers.")
def swapped(rank, layers, other_layers):
    return matched_rank(rank, other_layers, layers)


@wrong("matched_rank", "Your result does not depend on the given rank. It is the rank that matches rank 1.")
def for_rank_one(rank, layers, other_layers):
    return matched_rank(1, layers, other_layers)


@wrong("matched_rank", "You return the number of parameters. What is wanted is a rank.")
def the_budget(rank, layers, other_layers):
    return rank * sum(map(sum, layers))


# --- best_rate_ratio ---------------------------------------------------------------------------------


@right("best_rate_ratio")
def one_after_the_other(losses, other_losses):
    first, trusted = best_learning_rate(losses)
    second, trusted_too = best_learning_rate(other_losses)
    if not (trusted and trusted_too):
        raise ValueError("a best rate is at the edge")
    return first / second


@right("best_rate_ratio")
def sorted_by_rate(losses, other_losses):
    def best(tried):
        rates = sorted(tried)
        values = [math.inf if math.isnan(tried[rate]) else tried[rate] for rate in rates]
        place = values.index(min(values))
        if place in (0, len(rates) - 1):
            raise ValueError("the best rate is the first or the last")
        return rates[place]

    return best(losses) / best(other_losses)


@right("best_rate_ratio")
def with_numpy(losses, other_losses):
    found = []
    for tried in (losses, other_losses):
        rates = np.array(sorted(tried))
        place = int(np.nanargmin([tried[rate] for rate in rates]))  # raises a ValueError if all are NaN
        if not 0 < place < len(rates) - 1:
            raise ValueError("at the edge")
        found.append(rates[place])
    return float(found[0] / found[1])


@right("best_rate_ratio")
def neighbours_are_looked_for(losses, other_losses):
    def best(tried):
        finished = [(loss, rate) for rate, loss in tried.items() if loss == loss]
        if not finished:
            raise ValueError("all diverged")
        rate = min(finished)[1]
        if not any(other < rate for other in tried) or not any(other > rate for other in tried):
            raise ValueError("a neighbour is missing")
        return rate

    return best(losses) / best(other_losses)


@wrong("best_rate_ratio", "You divide the other way round: the first method's rate comes first.")
@changed(best_rate_ratio, ("best[0] / best[1]", "best[1] / best[0]"))
def upside_down(): ...


@wrong("best_rate_ratio", "You return a ratio even if a best rate is at the edge of what was tried.")
def edges_are_accepted(losses, other_losses):
    return best_learning_rate(losses)[0] / best_learning_rate(other_losses)[0]


@wrong("best_rate_ratio", "You look at the edge for the first method only.")
@changed(best_rate_ratio, ("if not trusted", "if not trusted and not best"))
def only_the_first_is_trusted(): ...


@wrong("best_rate_ratio", "You look at the edge for the second method only.")
@changed(best_rate_ratio, ("if not trusted", "if not trusted and best"))
def only_the_second_is_trusted(): ...


@wrong("best_rate_ratio", "You divide the lowest losses. What is wanted are the rates that have them.")
def ratio_of_the_losses(losses, other_losses):
    first, second = best_rate_ratio(losses, other_losses), 1.0
    first = min(value for value in losses.values() if value == value)
    second = min(value for value in other_losses.values() if value == value)
    return first / second


def _at(tried, places):
    rates = sorted(tried)
    values = [tried[rate] for rate in rates]
    if all(math.isnan(value) for value in values):
        raise ValueError("all diverged")
    place = places(values)
    if place in (0, len(rates) - 1):
        raise ValueError("at the edge")
    return rates[place]


@wrong(
    "best_rate_ratio", "You do not sort the rates: which is at the edge depends on the order in which they were tried."
)
def order_of_the_dictionary(losses, other_losses):
    best = []
    for tried in (losses, other_losses):
        rate, _ = best_learning_rate(tried)
        if list(tried).index(rate) in (0, len(tried) - 1):
            raise ValueError("at the edge")
        best.append(rate)
    return best[0] / best[1]


@wrong(
    "best_rate_ratio", "A loss of NaN is the lowest for you, or ends the search. A run that diverged is worse than any."
)
def nan_is_the_lowest(losses, other_losses):
    def lowest(values):
        return min(range(len(values)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])

    return _at(losses, lowest) / _at(other_losses, lowest)


@wrong("best_rate_ratio", "You leave out the runs that diverged before you look for the edge. They are neighbours too.")
def diverged_runs_are_no_neighbours(losses, other_losses):
    kept = [{rate: loss for rate, loss in tried.items() if loss == loss} for tried in (losses, other_losses)]
    return best_rate_ratio(*kept)


@wrong("best_rate_ratio", "You take the rate with the highest loss.")
def the_highest_loss(losses, other_losses):
    def highest(values):
        return max(range(len(values)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])

    return _at(losses, highest) / _at(other_losses, highest)


@wrong("best_rate_ratio", "You give the ratio in powers of ten. What is wanted is the ratio itself.")
def as_a_logarithm(losses, other_losses):
    return math.log10(best_rate_ratio(losses, other_losses))
