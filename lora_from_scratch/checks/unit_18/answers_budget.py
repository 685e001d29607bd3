"""Unit 18: mistakes that people make, and other right ways. The budget, and the choice of triplets."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import heapq
import math
from fractions import Fraction

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.rank_allocation import allocate, cubic_budget

# --- cubic_budget ------------------------------------------------------------------------------------


@right("cubic_budget")
def with_limits(step, first, last, whole, target):
    left = min(1.0, max(0.0, (last - step) / (last - first)))
    return target + math.floor((whole - target) * left**3)


@right("cubic_budget")
def in_whole_numbers(step, first, last, whole, target):
    left, length = last - min(max(step, first), last), last - first
    return target + (whole - target) * left**3 // length**3


@right("cubic_budget")
def with_fractions(step, first, last, whole, target):
    done = Fraction(step - first, last - first)
    if done < 0 or done > 1:
        done = Fraction(int(done > 1))
    return int(target + (whole - target) * (1 - done) ** 3)


@right("cubic_budget")
def three_phases(step, first, last, whole, target):
    if first < step < last:
        done = (step - first) / (last - first)
        budget = target + (whole - target) * (1 - 3 * done + 3 * done * done - done * done * done)
        return int(budget + 1e-9)
    return whole if step <= first else target


LEFT = "left = 1 - (step - first) / (last - first)"
RESULT = "int((whole - target) * left**3) + target"


@wrong(
    "cubic_budget",
    "The budget falls along a straight line in yours. It falls along a cubic: fast at first, then slowly.",
)
@changed(cubic_budget, ("left**3", "left"))
def linear(): ...


@wrong("cubic_budget", "You take the square instead of the cube.")
@changed(cubic_budget, ("left**3", "left**2"))
def square(): ...


@wrong("cubic_budget", "You take the cube of the share that is done. It is of the share that is left, 1 minus that.")
@changed(cubic_budget, (RESULT, "int((whole - target) * (1 - (1 - left) ** 3)) + target"))
def slow_at_first(): ...


@wrong("cubic_budget", "You round up. The budget is rounded down.")
@changed(cubic_budget, (RESULT, "-int(-(whole - target) * left**3 // 1) + target"))
def rounded_up(): ...


@wrong("cubic_budget", "You round to the nearest whole number. The budget is rounded down.")
@changed(cubic_budget, ("int((whole", "round((whole"))
def rounded(): ...


@wrong("cubic_budget", "You return a number with a fraction. A budget is a number of triplets, rounded down.")
@changed(cubic_budget, (RESULT, "(whole - target) * left**3 + target"))
def with_a_fraction(): ...


@wrong("cubic_budget", "The target is missing: your budget falls to zero.")
@changed(cubic_budget, (RESULT, "int((whole - target) * left**3)"), ("return target", "return 0"))
def falls_to_zero(): ...


@wrong("cubic_budget", "You begin with whole + target. The part that falls is whole - target.")
@changed(cubic_budget, ("int((whole - target)", "int(whole"))
def too_high(): ...


@wrong("cubic_budget", "You divide by the last step instead of by the number of steps from `first` to `last`.")
@changed(cubic_budget, (LEFT, "left = 1 - (step - first) / last"))
def divided_by_the_last_step(): ...


@wrong("cubic_budget", "You count the way from step 0. It begins at the step `first`.")
@changed(cubic_budget, (LEFT, "left = 1 - step / last"))
def from_step_0(): ...


@wrong(
    "cubic_budget",
    "Before `first` your budget is not `whole`: the formula goes on there, and the share left exceeds 1.",
)
@changed(cubic_budget, ("if step <= first:\n        return whole", "if False:\n        return whole"))
def no_first_phase(): ...


@wrong("cubic_budget", "After `last` your budget falls on, below the target.")
@changed(cubic_budget, ("if step >= last:\n        return target", "if False:\n        return target"))
def no_last_phase(): ...


@wrong("cubic_budget", "You exchange the two ends: up to `first` the budget is `whole`, from `last` on `target`.")
@changed(cubic_budget, ("    if step <= first:\n        return whole", "    whole, target = target, whole"))
def upside_down(): ...


# --- allocate ----------------------------------------------------------------------------------------


@right("allocate")
def with_sorted(scores, budget):
    places = [(-float(s), m, i) for m, one in enumerate(scores) for i, s in enumerate(one)]
    kept = {(m, i) for _, m, i in sorted(places)[:budget]}
    return [torch.tensor([float((m, i) in kept) for i in range(len(one))]) for m, one in enumerate(scores)]


@right("allocate")
def by_ranks(scores, budget):
    ranks = torch.hstack(list(scores)).argsort(descending=True, stable=True).argsort()
    return list(torch.split(ranks < budget, [len(one) for one in scores]))


@right("allocate")
def in_numpy(scores, budget):
    everything = np.concatenate([one.numpy() for one in scores])
    mask = np.zeros(len(everything), dtype=bool)
    mask[np.argsort(-everything, kind="stable")[:budget]] = True
    ends = np.cumsum([len(one) for one in scores])[:-1]
    return np.split(mask.astype(int), ends)


@right("allocate")
def one_after_the_other(scores, budget):
    masks = [torch.zeros(len(one)) for one in scores]
    heap = [(-float(s), m, i) for m, one in enumerate(scores) for i, s in enumerate(one)]
    heapq.heapify(heap)
    for _ in range(budget):
        _, m, i = heapq.heappop(heap)
        masks[m][i] = 1
    return masks


ORDER = "order = torch.cat(scores).argsort(descending=True, stable=True)"


@wrong("allocate", "You keep the worst triplets. The best ones are kept.")
@changed(allocate, ("descending=True, stable", "descending=False, stable"))
def the_worst(): ...


@wrong("allocate", "Every matrix keeps an equal share in yours. All triplets compete with each other.")
def an_equal_share(scores, budget):
    share, rest = divmod(budget, len(scores))
    masks = []
    for place, one in enumerate(scores):
        mask = torch.zeros(len(one))
        mask[one.argsort(descending=True, stable=True)[: share + (place < rest)]] = 1
        masks.append(mask)
    return masks


@wrong("allocate", "Every matrix keeps `budget` triplets in yours. The budget is for all of them together.")
def the_budget_for_each(scores, budget):
    return [allocate([one], budget)[0] for one in scores]


@wrong("allocate", "You keep everything that is at least as good as a threshold: with equal scores that is too many.")
def from_a_threshold(scores, budget):
    if budget == 0:
        return [torch.zeros(len(one)) for one in scores]
    threshold = torch.cat(list(scores)).sort(descending=True).values[budget - 1]
    return [(one >= threshold).float() for one in scores]


@wrong(
    "allocate",
    "You keep everything that is better than a threshold: with equal scores that is too few, and none if all are zero. "
    "PEFT has this rule.",
)
def above_a_threshold(scores, budget):
    everything = torch.cat(list(scores)).sort(descending=True).values
    if budget >= len(everything):
        return [torch.ones(len(one)) for one in scores]
    return [(one > everything[budget]).float() for one in scores]


@wrong("allocate", "Among triplets with the same score you keep the last. The first are kept.")
@changed(
    allocate,
    (ORDER, "order = torch.cat(scores).flip(0).argsort(descending=True, stable=True)"),
    ("return list(kept.split(", "kept = kept.flip(0)\n    return list(kept.split("),
)
def the_last_of_equal_ones(): ...


@wrong("allocate", "You mark the places in the sorted order. They have to be brought back to the matrices' own order.")
@changed(allocate, ("kept[order[:budget]] = 1", "kept[:budget] = 1"))
def in_the_sorted_order(): ...


@wrong("allocate", "Your masks are 1 where a triplet is cut. It is the other way round.")
@changed(allocate, ("kept[order[:budget]] = 1", "kept[order[budget:]] = 1"))
def marks_what_is_cut(): ...


@wrong("allocate", "You return a single mask for all matrices. Cut it into one for each matrix.")
@changed(allocate, ("return list(kept.split([len(score) for score in scores]))", "return kept"))
def one_long_mask(): ...


@wrong("allocate", "You cut the mask into pieces of equal size. The matrices may have different numbers of triplets.")
@changed(allocate, ("list(kept.split([len(score) for score in scores]))", "list(kept.tensor_split(len(scores)))"))
def pieces_of_equal_size(): ...


@wrong("allocate", "You return how many triplets each matrix keeps. What is wanted is which ones.")
def counted(scores, budget):
    return [int(mask.sum()) for mask in allocate(scores, budget)]


@wrong("allocate", "You return the scores of the kept triplets. A mask has ones and zeros.")
@changed(allocate, ("kept[order[:budget]] = 1", "kept[order[:budget]] = torch.cat(list(scores))[order[:budget]]"))
def the_scores_themselves(): ...


@wrong("allocate", "Each matrix keeps at least one triplet in yours. A matrix may lose all of its triplets.")
def at_least_one_each(scores, budget):
    masks = allocate(scores, budget)
    for mask, one in zip(masks, scores):
        if not mask.any():
            mask[one.argmax()] = 1
    return masks
