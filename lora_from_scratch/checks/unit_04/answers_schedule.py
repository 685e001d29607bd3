"""Unit 04, full fine-tuning, the schedule: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import cmath
import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import right, wrong

# --- warmup_cosine -----------------------------------------------------------------------------------


def refuse_outside(step, steps, warmup_steps):
    if step < 0 or step >= steps or warmup_steps < 0 or warmup_steps > steps:
        raise ValueError("outside of the run")


@right("warmup_cosine")
def with_a_squared_cosine(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return math.cos(0.5 * math.pi * (step - warmup_steps) / (steps - warmup_steps)) ** 2


@right("warmup_cosine")
def from_what_is_left(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if warmup_steps > step:
        return 1 - (warmup_steps - step - 1) / warmup_steps
    left = (steps - step) / max(1, steps - warmup_steps)
    return torch.tensor(0.5 * (1 - math.cos(math.pi * left)))


@right("warmup_cosine")
def the_whole_curve_with_numpy(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    rise = np.arange(1, warmup_steps + 1) / max(warmup_steps, 1)
    fall = (1 + np.cos(np.pi * np.arange(steps - warmup_steps) / max(steps - warmup_steps, 1))) / 2
    return np.concatenate([rise, fall])[step]


@right("warmup_cosine")
def on_the_unit_circle(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step - warmup_steps in range(-warmup_steps, 0):
        return sum(1 / warmup_steps for _ in range(step + 1))
    turned = cmath.exp(1j * math.pi * (step - warmup_steps) / (steps - warmup_steps))
    return (1 + turned.real) / 2


@wrong(
    "warmup_cosine",
    "You accept a negative step, or a negative number of warm-up steps. Both are out of range: raise a ValueError.",
)
def negative_numbers_are_accepted(step, steps, warmup_steps):
    if step >= steps or warmup_steps > steps:
        raise ValueError("too large")
    return refuses_nothing(step, steps, warmup_steps)


@wrong(
    "warmup_cosine",
    "The first step after the warm-up should still have the full rate; yours has already begun to fall.",
)
def falls_one_step_early(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup_steps) / (steps - warmup_steps)))


@wrong(
    "warmup_cosine",
    "Your first step has a learning rate of 0: a whole batch is computed for nothing. Steps are counted from 0.",
)
def begins_at_zero(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


@wrong("warmup_cosine", "Your warm-up does not reach the peak: its last step should have the full learning rate.")
def never_at_the_top(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


@wrong("warmup_cosine", "There is no warm-up in your schedule: its first steps have the largest rates.")
def no_warmup(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * step / steps))


@wrong("warmup_cosine", "Your cosine starts counting at step 0: it has already fallen by the time the warm-up ends.")
def cosine_from_the_start(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * step / steps))


@wrong("warmup_cosine", "Your fall is as long as the whole run; it should take only the steps after the warm-up.")
def too_slow_a_fall(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / steps))


@wrong(
    "warmup_cosine",
    "Your last step has a rate of 0 and so is wasted: the rate should only reach 0 one step after the last.",
)
def last_step_lost(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - 1 - warmup_steps)))


@wrong("warmup_cosine", "After the warm-up your schedule falls linearly, not along a cosine.")
def linear(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (steps - step) / (steps - warmup_steps)


@wrong("warmup_cosine", "Your rates go down to -1: a cosine runs from 1 to -1, and has to be shifted and halved.")
def bare_cosine(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))


@wrong("warmup_cosine", "Your rates are twice as high after the warm-up as they should be.")
def not_halved(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))


@wrong("warmup_cosine", "After the warm-up your rates start at 0 and rise.")
def rises_again(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 - math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


@wrong("warmup_cosine", "Yours is a quarter of a cosine: it ends where it is steepest. Half a cosine ends flat.")
def a_quarter(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return math.cos(0.5 * math.pi * (step - warmup_steps) / (steps - warmup_steps))


@wrong("warmup_cosine", "Yours is a whole cosine: it rises back to 1 at the end.")
def a_whole_cosine(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(2 * math.pi * (step - warmup_steps) / (steps - warmup_steps)))


@wrong("warmup_cosine", "You multiply the rise and the fall, so that the peak is never reached.")
def both_at_once(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    rise = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


@wrong("warmup_cosine", "A step outside the run, or more warm-up than steps, is invalid: raise a ValueError.")
def refuses_nothing(step, steps, warmup_steps):
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


@wrong("warmup_cosine", caught_by="raises")
def always_divides_by_the_warmup(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    rise = min(1.0, (step + 1) / warmup_steps)
    if step < warmup_steps:
        return rise
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
