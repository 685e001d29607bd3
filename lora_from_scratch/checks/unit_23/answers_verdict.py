"""Unit 23: mistakes that people make, and other right ways. The verdict, and the change of blocks."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.compare.folklore import verdict

# --- verdict -----------------------------------------------------------------------------------------

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


@wrong(
    "verdict",
    "Your spread is that of the sizes, without their signs. It is the largest difference minus the smallest, which may "
    "be negative.",
)
@changed(
    verdict,
    ("max(differences) - min(differences)", "max(map(abs, differences)) - min(map(abs, differences))"),
)
def spread_of_the_sizes(): ...


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


# --- relative_change_by_block ------------------------------------------------------------------------


def _block(name):
    parts = name.split(".")
    return int(parts[parts.index("h") + 1])


@right("relative_change_by_block")
def long_vectors(weights, changes):
    blocks = sorted({_block(name) for name in changes})

    def norm(tensors, block):
        return float(torch.cat([tensors[name].flatten() for name in changes if _block(name) == block]).norm())

    return {block: norm(changes, block) / norm(weights, block) for block in blocks}


@right("relative_change_by_block")
def norms_of_norms(weights, changes):
    result = {}
    for block in sorted(set(map(_block, changes))):
        names = [name for name in changes if _block(name) == block]
        above = torch.stack([changes[name].norm() for name in names]).norm()
        below = torch.stack([weights[name].norm() for name in names]).norm()
        result[block] = (above / below).item()
    return result


@right("relative_change_by_block")
def with_numpy_arrays(weights, changes):
    sums = {}
    for name in changes:
        both = sums.setdefault(_block(name), np.zeros(2))
        both += [np.sum(changes[name].numpy() ** 2), np.sum(weights[name].numpy() ** 2)]
    return {block: float(np.sqrt(sums[block][0] / sums[block][1])) for block in sorted(sums)}


@right("relative_change_by_block")
def with_a_regular_expression(weights, changes):
    import re

    above, below = {}, {}
    for name, change in changes.items():
        block = int(re.search(r"(?:^|\.)h\.(\d+)\.", name).group(1))
        above[block] = above.get(block, 0) + torch.sum(change * change).item()
        below[block] = below.get(block, 0) + torch.sum(weights[name] * weights[name]).item()
    return {block: (above[block] / below[block]) ** 0.5 for block in sorted(above)}


def _per_block(weights, changes, value, block=_block, order=sorted):
    """The function `value` of the changes and weights of each block."""
    return {
        number: value(
            [changes[name] for name in changes if block(name) == number],
            [weights[name] for name in changes if block(name) == number],
        )
        for number in order(dict.fromkeys(map(block, changes)))
    }


def _norm(tensors):
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


def _quotient(above, below):
    return _norm(above) / _norm(below)


@wrong(
    "relative_change_by_block",
    'You look for "h." anywhere in a name. The h has to be a whole component: "branch.6" has one at its end, too.',
)
def any_h_before_a_dot(weights, changes):
    import re

    return _per_block(
        weights,
        changes,
        lambda a, b: float(torch.stack([x.norm() for x in a]).norm() / torch.stack([y.norm() for y in b]).norm()),
        lambda name: int(re.findall(r"h\.(\d+)", name)[0]),
    )


@wrong("relative_change_by_block", "You average the quotients of the matrices. A large matrix should count for more.")
def mean_of_the_quotients(weights, changes):
    return _per_block(weights, changes, lambda a, b: sum(float(x.norm() / y.norm()) for x, y in zip(a, b)) / len(a))


@wrong("relative_change_by_block", "You add up the quotients of the matrices of a block. It is one long vector.")
def sum_of_the_quotients(weights, changes):
    return _per_block(weights, changes, lambda a, b: sum(float(x.norm() / y.norm()) for x, y in zip(a, b)))


@wrong("relative_change_by_block", "You add up norms. The norm of a long vector is the root of the sum of squares.")
def sums_of_norms(weights, changes):
    return _per_block(weights, changes, lambda a, b: sum(float(x.norm()) for x in a) / sum(float(y.norm()) for y in b))


@wrong(
    "relative_change_by_block",
    "You forget the root: the quotient of two sums of squares is the square of what is wanted.",
)
def without_the_root(weights, changes):
    return _per_block(weights, changes, lambda a, b: _quotient(a, b) ** 2)


@wrong("relative_change_by_block", "You do not divide by the size of the weights.")
def not_relative(weights, changes):
    return _per_block(weights, changes, lambda a, b: _norm(a))


@wrong(
    "relative_change_by_block",
    "You divide by the norm of the weights after the change. It is relative to those before.",
)
def relative_to_the_new_weights(weights, changes):
    return _per_block(weights, changes, lambda a, b: _norm(a) / (_norm([x + y for x, y in zip(a, b)]) or 1.0))


@wrong("relative_change_by_block", "You count weights that were not changed.")
def all_weights_of_the_block(weights, changes):
    blocks = sorted(set(map(_block, changes)))
    return {
        block: _norm([t for n, t in changes.items() if _block(n) == block])
        / _norm([t for n, t in weights.items() if _block(n) == block])
        for block in blocks
    }


@wrong("relative_change_by_block", "You list blocks that have no change at all.")
def blocks_without_a_change(weights, changes):
    found = _per_block(weights, changes, _quotient)
    return {block: found.get(block, 0.0) for block in sorted(set(map(_block, weights)))}


@wrong("relative_change_by_block", "Your blocks are in the order of the names, or sorted as text: 10 comes before 2.")
def sorted_as_text(weights, changes):
    return _per_block(weights, changes, _quotient, order=lambda blocks: sorted(blocks, key=str))


@wrong("relative_change_by_block", "Your blocks are in the order in which they are given. They should ascend.")
def in_the_given_order(weights, changes):
    return _per_block(weights, changes, _quotient, order=list)


@wrong("relative_change_by_block", 'You take the first number in the name. The block is what comes after "h".')
def the_first_number(weights, changes):
    return _per_block(
        weights, changes, _quotient, block=lambda name: int(next(part for part in name.split(".") if part.isdigit()))
    )


@wrong("relative_change_by_block", 'You take the last number in the name. The block is what comes after "h".')
def the_last_number(weights, changes):
    return _per_block(
        weights, changes, _quotient, block=lambda name: int([part for part in name.split(".") if part.isdigit()][-1])
    )


@wrong("relative_change_by_block", "Your blocks are texts. They should be whole numbers.")
def blocks_as_text(weights, changes):
    return {str(block): value for block, value in _per_block(weights, changes, _quotient).items()}


@wrong(
    "relative_change_by_block",
    "You use the largest entry, or the mean of the magnitudes, instead of the Frobenius norm.",
)
def mean_magnitudes(weights, changes):
    def size(tensors):
        return sum(float(t.abs().sum()) for t in tensors)

    return _per_block(weights, changes, lambda a, b: size(a) / size(b))


@wrong("relative_change_by_block", caught_by="changes its input")
def squared_in_place(weights, changes):
    result = _per_block(weights, changes, _quotient)
    for change in changes.values():
        change.square_()
    return result
