"""Unit 23: mistakes that people make, and other right ways. The verdict."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.compare.folklore import verdict

YES, NO, OPEN = "holds here", "does not hold here", "cannot be decided at this size"


def _checked(differences, margin):
    if len(differences) < 2 or any(not math.isfinite(d) for d in differences) or (margin is not None and margin < 0):
        raise ValueError("bad input")
    return sum(differences) / len(differences), max(differences) - min(differences)


@right("verdict")
def with_early_returns(differences, margin=None):
    mean, spread = _checked(differences, margin)
    if margin is None:
        if mean > spread:
            return YES
        if mean < -spread:
            return NO
        return OPEN
    if all(abs(d) <= margin for d in differences):
        return YES
    if abs(mean) > margin and abs(mean) > spread:
        return NO
    return OPEN


@right("verdict")
def with_numpy(differences, margin=None):
    values = np.array(differences, dtype=np.float64)
    if values.size < 2 or not np.isfinite(values).all() or (margin is not None and margin < 0):
        raise ValueError("bad input")
    mean, spread = values.mean(), np.ptp(values)
    if margin is None:
        return YES if mean > spread else NO if -mean > spread else OPEN
    return YES if np.abs(values).max() <= margin else NO if abs(mean) > max(margin, spread) else OPEN


@right("verdict")
def with_tensors(differences, margin=None):
    values = torch.tensor(differences, dtype=torch.float64)
    if len(values) < 2 or not values.isfinite().all() or (margin or 0) < 0:
        raise ValueError("bad input")
    mean, spread = values.mean(), values.max() - values.min()
    if margin is None:
        return {1: YES, -1: NO, 0: OPEN}[int(mean > spread) - int(mean < -spread)]
    if values.abs().max() <= margin:
        return YES
    return NO if mean.abs() > spread and mean.abs() > margin else OPEN


@right("verdict")
def sorted_first(differences, margin=None):
    _checked(differences, margin)
    ordered = sorted(differences)
    low, high, n = ordered[0], ordered[-1], len(ordered)
    sure = abs(sum(ordered)) > n * (high - low)
    if margin is None:
        return OPEN if not sure else YES if low > 0 else NO
    if -margin <= low and high <= margin:
        return YES
    return NO if sure and abs(sum(ordered)) > n * margin else OPEN


@wrong(
    "verdict", "You look only at the sign of the mean. A mean may come from a single seed: compare it with the spread."
)
def the_mean_alone(differences, margin=None):
    mean, _ = _checked(differences, margin)
    if margin is None:
        return YES if mean > 0 else NO
    return YES if abs(mean) <= margin else NO


@wrong("verdict", "You look only at whether all seeds agree in sign. They can agree and yet be far apart.")
def all_signs_agree(differences, margin=None):
    _checked(differences, margin)
    if margin is None:
        return YES if min(differences) > 0 else NO if max(differences) < 0 else OPEN
    return verdict(differences, margin)


@wrong("verdict", "You use the standard deviation as the spread. Here it is the largest minus the smallest.")
@changed(
    verdict,
    ("max(differences) - min(differences)", "math.sqrt(fmean((d - fmean(differences)) ** 2 for d in differences))"),
)
def standard_deviation(): ...


@wrong("verdict", "You use half of the spread: it is the largest minus the smallest.")
@changed(verdict, ("max(differences) - min(differences)", "(max(differences) - min(differences)) / 2"))
def half_the_spread(): ...


@wrong("verdict", "You use the median instead of the mean.")
@changed(verdict, ("fmean(differences)", "sorted(differences)[len(differences) // 2]"))
def the_median(): ...


@wrong("verdict", "You call a claim false as soon as it does not hold. If the seeds are far apart, nothing is decided.")
@changed(verdict, ("FAILS if fails else UNDECIDED", "FAILS"))
def nothing_is_undecided(): ...


@wrong("verdict", "You leave a claim undecided where the differences clearly speak against it.")
@changed(verdict, ("FAILS if fails else UNDECIDED", "UNDECIDED"))
def nothing_fails(): ...


@wrong("verdict", "You ignore the margin.")
@changed(verdict, ("if margin is None:\n        holds, fails", "if True:\n        holds, fails"))
def without_the_margin(): ...


@wrong("verdict", "With a margin you compare the mean with it. One seed beyond the margin is enough for a doubt.")
@changed(verdict, ("max(map(abs, differences)) <= margin", "abs(mean) <= margin"))
def the_mean_within_the_margin(): ...


@wrong("verdict", "With a margin you forget the sign: a large negative difference is a difference too.")
@changed(verdict, ("max(map(abs, differences)) <= margin", "max(differences) <= margin"))
def only_positive_differences(): ...


@wrong("verdict", "With a margin you forget the sign of the mean: a negative one can be large too.")
@changed(verdict, ("abs(mean) > max(margin, spread)", "mean > max(margin, spread)"))
def only_a_positive_mean(): ...


@wrong("verdict", "With a margin you do not compare the mean with the spread. The seeds may be far apart.")
@changed(verdict, ("abs(mean) > max(margin, spread)", "abs(mean) > margin"))
def the_spread_is_forgotten(): ...


@wrong("verdict", "With a margin, a claim is false for you although the mean is within the margin.")
@changed(verdict, ("abs(mean) > max(margin, spread)", "abs(mean) > spread"))
def the_margin_is_forgotten(): ...


@wrong("verdict", "A margin of 0 is a margin. Compare with `is None`.")
@changed(verdict, ("if margin is None:\n        holds", "if not margin:\n        holds"))
def zero_is_no_margin(): ...


@wrong("verdict", "A mean that is as large as the spread is not above it.")
@changed(verdict, ("mean > spread, mean < -spread", "mean >= spread, mean <= -spread"))
def equal_counts_as_above(): ...


@wrong("verdict", "You swap the verdicts: positive differences are in favour of the claim.")
@changed(verdict, ("mean > spread, mean < -spread", "mean < -spread, mean > spread"))
def the_wrong_way_round(): ...


@wrong("verdict", "You accept a single seed, which has no spread.")
@changed(verdict, ("len(differences) < 2 or", "len(differences) < 1 or"))
def one_seed_is_enough(): ...


@wrong("verdict", "You accept NaN or infinity: the run of a seed diverged, and there is no mean.")
@changed(verdict, ("len(differences) < 2 or not all(math.isfinite(d) for d in differences)", "len(differences) < 2"))
def diverged_runs_are_accepted(): ...


@wrong("verdict", "You accept infinity. The run of a seed diverged.")
@changed(verdict, ("math.isfinite(d)", "not math.isnan(d)"))
def infinity_is_accepted(): ...


@wrong("verdict", "You accept a negative margin.")
@changed(verdict, ("margin < 0", "margin < -1"))
def a_negative_margin(): ...
