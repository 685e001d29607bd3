"""Unit 19: mistakes that people make, and other right ways. LQ-LoRA's split, and bits under a budget."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.greedy_allocation import allocate_greedily
from lora_from_scratch.methods.lq_lora import split, squared_error, weighted_factors

# --- split -------------------------------------------------------------------------------------------


@right("split")
def a_list_of_iterations(W, rank, quantize, iterations=5, weighting=None):
    W = W.detach().to(torch.float32)
    history = []
    for _ in range(iterations):
        target = W - history[-1][1].dequantize() if history else W
        A, B = weighted_factors(target, rank, weighting)
        Q = quantize(W - B @ A)
        history.append((squared_error(W - Q.dequantize() - B @ A, weighting), Q, A, B))
        if len(history) > 1 and history[-1][0] >= history[-2][0]:
            return history[-2][1:]
    return history[-1][1:]


@right("split")
def recursive(W, rank, quantize, iterations=5, weighting=None, start=None, before=None):
    W = W.detach().float()
    A, B = weighted_factors(W if start is None else W - start, rank, weighting)
    Q = quantize(W - B @ A)
    error = squared_error(W - Q.dequantize() - B @ A, weighting)
    if before is not None and error >= before[0]:
        return before[1]
    if iterations == 1:
        return Q, A, B
    return recursive(W, rank, quantize, iterations - 1, weighting, Q.dequantize(), (error, (Q, A, B)))


@right("split")
def with_its_own_svd(W, rank, quantize, iterations=5, weighting=None):
    W = W.detach().double()
    row, column = weighting or (torch.ones(W.shape[0]), torch.ones(W.shape[1]))
    row, column = row.double()[:, None], column.double()[None]
    kept, least, rest = None, None, W
    while iterations > 0:
        U, S, V = torch.linalg.svd(row * rest * column)
        A, B = (V[:rank] / column).float(), (U[:, :rank] * S[:rank] / row).float()
        Q = quantize((W - B.double() @ A.double()).float())
        rest = W - Q.dequantize().double()
        error = (row * (rest - B.double() @ A.double()) * column).norm().item()
        if least is not None and not error < least:
            return kept
        kept, least, iterations = (Q, A, B), error, iterations - 1
    return kept


@right("split")
def in_numpy(W, rank, quantize, iterations=5, weighting=None):
    W = W.detach().float().numpy()
    row, column = (one.numpy() for one in weighting) if weighting else (np.ones(len(W)), np.ones(W.shape[1]))
    scale, errors, results, Q = np.outer(row, column).astype(np.float32), [], [], np.zeros_like(W)
    for _ in range(iterations):
        U, S, V = np.linalg.svd(scale * (W - Q), full_matrices=False)
        A, B = V[:rank] / column, U[:, :rank] * S[:rank] / row[:, None]
        A, B = torch.from_numpy(A).float(), torch.from_numpy(B).float()
        results.append((quantize(torch.from_numpy(W) - B @ A), A, B))
        Q = results[-1][0].dequantize().numpy()
        errors.append(float(((scale * (W - Q - (B @ A).numpy())) ** 2).sum()))
        if errors[-1] != min(errors) or errors.index(errors[-1]) != len(errors) - 1:
            break
    return results[int(np.argmin(errors))]


@right("split")
def balanced_differently(W, rank, quantize, iterations=5, weighting=None):
    Q, A, B = split(W, rank, quantize, iterations, weighting)
    U, R = torch.linalg.qr(B)
    return Q, R @ A, U


@wrong("split", "You return the last iteration, which is the one in which the error rose. Return the one before.")
@changed(split, ("            break\n", "            return Q, A, B\n"))
def the_last_one(): ...


@wrong("split", "You do not stop when the error rises. You go on, and return the best of all iterations.")
@changed(split, ("            break\n", "            continue\n"))
def goes_on(): ...


@wrong("split", "You do all iterations and return the last, whatever its error is.")
def always_all(W, rank, quantize, iterations=5, weighting=None):
    W = W.detach().float()
    dequantized = torch.zeros_like(W)
    for _ in range(iterations):
        A, B = weighted_factors(W - dequantized, rank, weighting)
        Q = quantize(W - B @ A)
        dequantized = Q.dequantize()
    return Q, A, B


@wrong("split", "You begin with Q = quant(W), as LoftQ does. LQ-LoRA begins with Q = 0, and takes A and B first.")
@changed(split, ("torch.zeros_like(W)", "quantize(W).dequantize()"))
def begins_with_the_quantised_weight(): ...


@wrong(
    "split", "You take the two steps in LoftQ's order. A and B come first, and Q is what `quantize` makes of the rest."
)
def the_order_of_loftq(W, rank, quantize, iterations=5, weighting=None):
    W = W.detach().float()
    best, least, low_rank = None, math.inf, torch.zeros_like(W)
    for _ in range(iterations):
        Q = quantize(W - low_rank)
        A, B = weighted_factors(W - Q.dequantize(), rank, weighting)
        low_rank = B @ A
        error = squared_error(W - Q.dequantize() - low_rank, weighting)
        if error >= least:
            break
        best, least = (Q, A, B), error
    return best


@wrong("split", "You keep Q of the best iteration, but return the A and B of the last one.")
@changed(split, ("    return best\n", "    return best[0], A, B\n"))
def newer_factors(): ...


@wrong("split", "You keep A and B of the best iteration, but return the Q of the last one.")
@changed(split, ("    return best\n", "    return Q, *best[1:]\n"))
def newer_Q(): ...


@wrong("split", "The weighting is not used in your factors.")
@changed(split, ("weighted_factors(W - quantized, rank, weighting)", "weighted_factors(W - quantized, rank)"))
def unweighted_factors(): ...


@wrong("split", "The weighting is not used in your errors, so that other iterations count as better.")
@changed(split, ("squared_error(W - quantized - B @ A, weighting)", "squared_error(W - quantized - B @ A)"))
def unweighted_errors(): ...


@wrong("split", "You quantise W each time, not what A and B leave of it.")
@changed(split, ("quantize(W - B @ A)", "quantize(W)"))
def quantises_the_whole(): ...


@wrong("split", "Every iteration of yours starts from Q = 0 again, so that all have the same A and B.")
@changed(split, ("weighted_factors(W - quantized, rank", "weighted_factors(W, rank"))
def always_from_zero(): ...


@wrong("split", "Your error leaves out B A.")
@changed(split, ("squared_error(W - quantized - B @ A, weighting)", "squared_error(W - quantized, weighting)"))
def error_without_the_low_rank_part(): ...


@wrong("split", "You do one iteration more than you may.")
@changed(split, ("range(iterations)", "range(iterations + 1)"))
def one_too_many(): ...


@wrong("split", "You always do five iterations at most. Their largest number is an argument.")
@changed(split, ("range(iterations)", "range(5)"))
def always_five(): ...


@wrong("split", "Without a number of iterations, yours does another number than five.")
@changed(split, ("iterations: int = 5", "iterations: int = 10"))
def another_default(): ...


@wrong("split", "You return the dequantised Q. What `quantize` returned is wanted: it is what gets stored.")
@changed(split, ("best, least = (Q, A, B), error", "best, least = (quantized, A, B), error"))
def a_dequantised_Q(): ...


@wrong("split", "You return B before A.")
@changed(split, ("best, least = (Q, A, B), error", "best, least = (Q, B, A), error"))
def B_first(): ...


@wrong(
    "split",
    "You call `quantize` twice per iteration. It is slow, and may be random: call it once, and keep the result.",
)
@changed(split, ("quantized = Q.dequantize()", "quantized = quantize(W - B @ A).dequantize()"))
def quantises_twice(): ...


@wrong("split", "A and B are part of a graph that reaches back to W. Detach W first.")
@changed(split, ("W.detach().float()", "W.float()"))
def with_a_gradient(): ...


@wrong("split", "You compute in W's 16-bit type, for which there is no SVD. Convert W to float32.")
@changed(split, ("W.detach().float()", "W.detach()"))
def in_the_dtype_of_W(): ...


@wrong("split", "Your rank is always the full one. A and B have r rows and columns.")
@changed(
    split,
    ("weighted_factors(W - quantized, rank, weighting)", "weighted_factors(W - quantized, min(W.shape), weighting)"),
)
def full_rank(): ...


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
