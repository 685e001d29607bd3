"""Unit 19: mistakes that people make, and other right ways. Bits under a budget."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.greedy_allocation import allocate_greedily

# --- allocate_greedily -------------------------------------------------------------------------------


@right("allocate_greedily")
def with_loops(errors, sizes, budget):
    e, s = errors.tolist(), sizes.tolist()
    chosen = [row.index(min(row)) for row in s]
    used = sum(s[i][c] for i, c in enumerate(chosen))
    if used > budget:
        raise ValueError("too little")
    while True:
        best, value = None, 0.0
        for i, now in enumerate(chosen):
            for c in range(len(e[i])):
                saved, cost = e[i][now] - e[i][c], s[i][c] - s[i][now]
                if saved > 0 and cost > 0 and used + cost <= budget and saved / cost > value:
                    best, value = (i, c), saved / cost
        if best is None:
            return chosen
        i, c = best
        used += s[i][c] - s[i][chosen[i]]
        chosen[i] = c


@right("allocate_greedily")
def from_a_sorted_list(errors, sizes, budget):
    rows = range(len(errors))
    chosen = {i: int(sizes[i].argmin()) for i in rows}
    left = budget - sum(float(sizes[i, chosen[i]]) for i in rows)
    if left < 0:
        raise ValueError
    while True:
        changes = []
        for i in rows:
            for c in range(errors.shape[1]):
                cost = float(sizes[i, c] - sizes[i, chosen[i]])
                saved = float(errors[i, chosen[i]] - errors[i, c])
                if 0 < cost <= left and saved > 0:
                    changes.append((saved / cost, i, c, cost))
        if not changes:
            return [chosen[i] for i in rows]
        _, i, c, cost = max(changes)
        chosen[i], left = c, left - cost


@right("allocate_greedily")
def recursive_changes(errors, sizes, budget, chosen=None):
    rows = torch.arange(len(errors))
    if chosen is None:
        chosen = sizes.min(dim=1).indices
    now = sizes[rows, chosen]
    if now.sum() > budget:
        raise ValueError("it does not fit")
    cost, saved = sizes - now[:, None], errors[rows, chosen][:, None] - errors
    allowed = (cost > 0) & (saved > 0) & (now.sum() + cost <= budget)
    if not allowed.any():
        return chosen
    value = torch.full_like(errors, -1.0)
    value[allowed] = saved[allowed] / cost[allowed]
    place = torch.argmax(value).item()
    after = chosen.clone()
    after[place // errors.shape[1]] = place % errors.shape[1]
    return recursive_changes(errors, sizes, budget, after)


@right("allocate_greedily")
def numpy_with_infinities(errors, sizes, budget):
    E, S = errors.numpy(), sizes.numpy()
    chosen, rows = S.argmin(axis=1), np.arange(len(E))
    if S[rows, chosen].sum() > budget:
        raise ValueError("not enough")
    while True:
        cost = S - S[rows, chosen][:, None]
        gain = E[rows, chosen][:, None] - E
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.where((cost > 0) & (gain > 0) & (S[rows, chosen].sum() + cost <= budget), gain / cost, -np.inf)
        i, c = np.unravel_index(value.argmax(), value.shape)
        if value[i, c] == -np.inf:
            return [int(one) for one in chosen]
        chosen[i] = c


@wrong(
    "allocate_greedily",
    "You make the change with the largest decrease of the error, whatever it costs. Divide by the cost.",
)
@changed(allocate_greedily, ("(gain / cost).where", "gain.where"))
def the_largest_decrease(): ...


@wrong("allocate_greedily", "You make the cheapest change. What counts is how much the error falls for the size.")
@changed(allocate_greedily, ("(gain / cost).where", "(1 / cost).where"))
def the_cheapest(): ...


@wrong(
    "allocate_greedily", "You divide the decrease of the error by the new size. Divide by the *increase* of the size."
)
@changed(allocate_greedily, ("(gain / cost).where", "(gain / sizes).where"))
def divided_by_the_new_size(): ...


@wrong("allocate_greedily", "The sum of your sizes exceeds the budget: the last change does not fit.")
def one_change_too_many(errors, sizes, budget):
    slack = float((sizes.amax(dim=1) - sizes.amin(dim=1)).max())
    allocate_greedily(errors, sizes, budget)
    return allocate_greedily(errors, sizes, budget + slack)


@wrong("allocate_greedily", "A change that uses up the budget exactly is allowed.")
@changed(allocate_greedily, ("(cost <= left)", "(cost < left)"))
def nothing_to_the_last_bit(): ...


@wrong(
    "allocate_greedily",
    "You stop as soon as the change with the largest value does not fit. Another one may still fit.",
)
def stops_at_the_first_that_does_not_fit(errors, sizes, budget):
    chosen, rows = sizes.argmin(dim=1), torch.arange(len(errors))
    if sizes.amin(dim=1).sum() > budget:
        raise ValueError("nothing fits")
    while True:
        now = sizes[rows, chosen]
        gain, cost = errors[rows, chosen][:, None] - errors, sizes - now[:, None]
        value = torch.where((gain > 0) & (cost > 0), gain / cost, 0)
        i, c = divmod(int(value.argmax()), errors.shape[1])
        if value.max() <= 0 or now.sum() + cost[i, c] > budget:
            return chosen.tolist()
        chosen[i] = c


@wrong("allocate_greedily", "You go up to the next larger choice only. A change may skip choices in between.")
def only_the_next_choice(errors, sizes, budget):
    order = sizes.argsort(dim=1)
    place = [0] * len(errors)
    used = float(sizes.amin(dim=1).sum())
    if used > budget:
        raise ValueError("nothing fits")
    while True:
        best, value = None, 0.0
        for i, at in enumerate(place):
            if at + 1 < errors.shape[1]:
                now, then = int(order[i, at]), int(order[i, at + 1])
                saved, cost = float(errors[i, now] - errors[i, then]), float(sizes[i, then] - sizes[i, now])
                if cost > 0 and used + cost <= budget and saved / cost > value:
                    best, value, price = i, saved / cost, cost
        if best is None:
            return [int(order[i, at]) for i, at in enumerate(place)]
        place[best] += 1
        used += price


@wrong("allocate_greedily", "You take choice 0 as the smallest. The choices are in no order.")
@changed(
    allocate_greedily,
    ("chosen = sizes.argmin(dim=1)", "chosen = sizes.argmin(dim=1) * 0"),
    ("sizes.amin(dim=1).sum()", "sizes.amin(dim=1).sum()"),
)
def from_the_first_choice(): ...


@wrong("allocate_greedily", "You make a single change. Go on until no change is left.")
@changed(
    allocate_greedily,
    ("        chosen[matrix] = choice", "        chosen[matrix] = choice\n        return chosen.tolist()"),
)
def a_single_change(): ...


@wrong(
    "allocate_greedily",
    "You make a change for every matrix once. One matrix may be changed several times, another never.",
)
def one_change_per_matrix(errors, sizes, budget):
    chosen = sizes.argmin(dim=1)
    left = budget - float(sizes.amin(dim=1).sum())
    if left < 0:
        raise ValueError("nothing fits")
    for i in range(len(errors)):
        gain, cost = errors[i, chosen[i]] - errors[i], sizes[i] - sizes[i, chosen[i]]
        value = torch.where((gain > 0) & (cost > 0) & (cost <= left), gain / cost, 0)
        if value.max() > 0:
            c = int(value.argmax())
            left -= float(cost[c])
            chosen[i] = c
    return chosen.tolist()


@wrong("allocate_greedily", "You take more size even if the error does not fall.")
@changed(
    allocate_greedily,
    ("(gain / cost).where((gain > 0) & (cost > 0)", "(9 + (gain / cost).clamp(-4)).where((cost > 0)"),
)
def larger_is_better(): ...


@wrong("allocate_greedily", "You do not check that the smallest choices fit.")
def without_the_check(errors, sizes, budget):
    return allocate_greedily(errors, sizes, max(float(budget), float(sizes.amin(dim=1).sum())))


@wrong(
    "allocate_greedily",
    "You find the best allocation of all. That is what it is compared with; here follow the greedy rule.",
)
def the_best_of_all(errors, sizes, budget):
    rows = [({0.0: (0.0, [])})]
    for e, s in zip(errors.tolist(), sizes.tolist()):
        after = {}
        for used, (total, way) in rows[-1].items():
            for c in range(len(e)):
                key = used + s[c]
                if key <= budget and (key not in after or total + e[c] < after[key][0]):
                    after[key] = (total + e[c], [*way, c])
        rows.append(after)
    if not rows[-1]:
        raise ValueError("nothing fits")
    return min(rows[-1].values())[1]


@wrong("allocate_greedily", "You spend the budget on the first matrices until it is used up.")
def the_first_matrices_first(errors, sizes, budget):
    chosen = sizes.argmin(dim=1)
    left = budget - float(sizes.amin(dim=1).sum())
    if left < 0:
        raise ValueError("nothing fits")
    for i in range(len(errors)):
        fits = sizes[i] - sizes[i, chosen[i]] <= left
        c = int(torch.where(fits, errors[i], math.inf).argmin())
        left -= float(sizes[i, c] - sizes[i, chosen[i]])
        chosen[i] = c
    return chosen.tolist()


@wrong("allocate_greedily", "You return the sizes. The index of each choice is wanted.")
def the_sizes(errors, sizes, budget):
    return [sizes[i, c].item() for i, c in enumerate(allocate_greedily(errors, sizes, budget))]
