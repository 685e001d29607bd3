"""Unit 14, the Pareto front and the paired bootstrap: mistakes that people make, and other right ways."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.compare.capstone.choosing import paired_bootstrap, pareto_front

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
    values = np.column_stack([-costs.double().numpy(), quality.double().numpy()])
    keep = [not ((values >= row).all(1) & (values > row).any(1)).any() for row in values]
    return np.flatnonzero(keep)


@right("pareto_front")
def as_a_tensor(costs, quality):
    _refuse(costs, quality)
    values = torch.column_stack([costs.double(), -quality.double()])
    different = (values[:, None] != values[None]).any(-1)
    beats = (values[:, None] <= values[None]).all(-1) & different
    return (~beats.any(0)).nonzero().flatten()


@right("pareto_front")
def one_cost_after_another(costs, quality):
    _refuse(costs, quality)
    n = len(quality)
    worse = torch.zeros(n, n, dtype=torch.bool)  # is i somewhere worse than j?
    for column in [*costs.double().unbind(1), -quality.double()]:
        worse |= column[:, None] > column[None]
    beats = ~worse & worse.T
    return [j for j in range(n) if not beats[:, j].any()]


@wrong("pareto_front", "You compare in float32, where costs of millions of bytes that differ by one are equal.")
@changed(pareto_front, ("costs.double(), -quality.double()", "costs.float(), -quality.float()"))
def in_float32(): ...


@wrong("pareto_front", "The indices are not in increasing order.")
@changed(pareto_front, ("in range(len(values)) if", "in reversed(range(len(values))) if"))
def in_reverse_order(): ...


@wrong("pareto_front", "You return True or False for each candidate. Return the indices of those on the front.")
@changed(
    pareto_front,
    (
        "return [place for place in range(len(values)) if not beaten[place]]",
        "return [not one for one in beaten.tolist()]",
    ),
)
def a_mask(): ...


@wrong(
    "pareto_front",
    "You accept different numbers of costs and of qualities, and leave out what is too much. Raise a ValueError.",
)
@changed(
    pareto_front,
    (
        "    if costs.dim() != 2",
        "    costs, quality = costs[: len(quality)], quality[: len(costs)]\n    if costs.dim() != 2",
    ),
)
def cuts_to_the_shorter(): ...


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
@changed(pareto_front, ("-quality.double()", "quality.double()"))
def quality_as_a_cost(): ...


@wrong(
    "pareto_front",
    "You add up the costs. Different units cannot be added: a candidate may be on the front because of one cost alone.",
)
@changed(pareto_front, ("[costs.double()", "[costs.double().sum(dim=1, keepdim=True)"))
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
@changed(pareto_front, ("[costs.double()", "[costs[:, :1].double()"))
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


@right("paired_bootstrap")
def by_counting_cards(one, other, places):
    """How often each card is in a sample, times its difference."""
    _same_cards(one, other)
    counts = torch.nn.functional.one_hot(places, len(one)).sum(dim=1)  # (samples, n)
    margin = (counts * (one.double() - other.double())).sum(dim=1)
    return torch.where(margin.abs() < 1e-12, 0.5, (margin > 0).double()).mean().item()


@right("paired_bootstrap")
def with_plain_lists(one, other, places):
    _same_cards(one, other)
    differences = [a - b for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    sums = [math.fsum(differences[card] for card in row) for row in places.tolist()]
    return sum(0.5 if total == 0 else float(total > 0) for total in sums) / len(sums)


@wrong(
    "paired_bootstrap",
    "You accept scores for different numbers of cards, and leave out what is too much. Raise a ValueError.",
)
def cut_to_the_shorter(one, other, places):
    n = min(len(one), len(other))
    return paired_bootstrap(one[:n], other[:n], places.clamp(max=n - 1))


@wrong(
    "paired_bootstrap",
    "You average over the samples for each card. A row of `places` is a sample: average over its cards.",
)
@changed(paired_bootstrap, ("[places].mean(dim=1)", "[places].mean(dim=0)"))
def over_the_wrong_axis(): ...


@wrong("paired_bootstrap", "You return the number of samples that the first wins. Return their share.")
@changed(paired_bootstrap, ("wins.mean()", "wins.sum()"))
def a_number_of_samples(): ...


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
