"""Unit 04, full fine-tuning: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import right, wrong

# --- completion_labels -------------------------------------------------------------------------------


@right("completion_labels")
def token_by_token(prompt_ids, completion_ids):
    ids, labels = [], []
    for token in prompt_ids:
        ids.append(token)
        labels.append(-100)
    for token in completion_ids:
        ids.append(token)
        labels.append(token)
    return ids, labels


@right("completion_labels")
def as_tensors(prompt_ids, completion_ids):
    ids = torch.tensor(list(prompt_ids) + list(completion_ids), dtype=torch.int64)
    labels = ids.clone()
    labels[: len(prompt_ids)] = -100
    return ids, labels


@right("completion_labels")
def with_arrays(prompt_ids, completion_ids):
    ids = np.array([*prompt_ids, *completion_ids], dtype=np.int64)
    return ids, np.where(np.arange(len(ids)) < len(prompt_ids), -100, ids)


@wrong(
    "completion_labels",
    "Your labels count the prompt as well: the model would be trained to write cards, which it is always given.",
)
def prompt_counts(prompt_ids, completion_ids):
    ids = [*prompt_ids, *completion_ids]
    return ids, list(ids)


@wrong(
    "completion_labels",
    "Your labels are shifted. The loss shifts too, so that each position would be asked for the token after the next.",
)
def shifted_already(prompt_ids, completion_ids):
    labels = [-100] * len(prompt_ids) + list(completion_ids)
    return [*prompt_ids, *completion_ids], [*labels[1:], -100]


@wrong(
    "completion_labels",
    "Your labels are shifted to the right: a position would be compared with the token that it has been given.",
)
def shifted_to_the_right(prompt_ids, completion_ids):
    labels = [-100] * len(prompt_ids) + list(completion_ids)
    return [*prompt_ids, *completion_ids], [-100, *labels[:-1]]


@wrong("completion_labels", "You mark with 0 what does not count. 0 is a token like any other, so it does count.")
def zeros_instead(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], [0] * len(prompt_ids) + list(completion_ids)


@wrong("completion_labels", "You mark with -1 what does not count; the loss leaves out another number.")
def minus_one_instead(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], [-1] * len(prompt_ids) + list(completion_ids)


@wrong(
    "completion_labels",
    "The end-of-text token does not count in your labels, so the model never learns to stop.",
)
def never_stops(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], [-100] * len(prompt_ids) + list(completion_ids[:-1]) + [-100]


@wrong(
    "completion_labels",
    "One label too many is -100: the completion's own first token has to be predicted too, from the prompt's last.",
)
def first_token_missing(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], [-100] * (len(prompt_ids) + 1) + list(completion_ids[1:])


@wrong(
    "completion_labels",
    "The last token of the prompt counts in your labels. Its position does predict, but what stands in the labels is "
    "the token that is predicted.",
)
def last_of_the_prompt_counts(prompt_ids, completion_ids):
    labels = [-100] * len(prompt_ids) + list(completion_ids)
    if prompt_ids:
        labels[len(prompt_ids) - 1] = prompt_ids[-1]
    return [*prompt_ids, *completion_ids], labels


@wrong(
    "completion_labels",
    "You decide by the token whether it counts. A completion may use the prompt's words, and there they do count: "
    "decide by the position.",
)
def by_value(prompt_ids, completion_ids):
    ids = [*prompt_ids, *completion_ids]
    return ids, [-100 if token in prompt_ids else token for token in ids]


@wrong("completion_labels", "It is the completion that does not count in your labels, and the prompt that does.")
def the_wrong_half(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], list(prompt_ids) + [-100] * len(completion_ids)


@wrong(
    "completion_labels",
    "Inputs and labels have to be equally long, with one label for each position, those of the prompt included.",
)
def labels_of_the_completion(prompt_ids, completion_ids):
    return [*prompt_ids, *completion_ids], list(completion_ids)


@wrong("completion_labels", "The prompt's tokens are missing among the inputs: the model would never see the card.")
def without_the_prompt(prompt_ids, completion_ids):
    return list(completion_ids), list(completion_ids)


@wrong("completion_labels", "The completion stands before the prompt. What is given comes first.")
def the_other_order(prompt_ids, completion_ids):
    return [*completion_ids, *prompt_ids], list(completion_ids) + [-100] * len(prompt_ids)


@wrong("completion_labels", "You also hide the prompt from the inputs. It is in the labels that it does not count.")
def prompt_hidden(prompt_ids, completion_ids):
    labels = [-100] * len(prompt_ids) + list(completion_ids)
    return labels, list(labels)


@wrong("completion_labels", caught_by="changes its input")
def extends_the_prompt(prompt_ids, completion_ids):
    labels = [-100] * len(prompt_ids) + list(completion_ids)
    prompt_ids += completion_ids
    return prompt_ids, labels


# --- adamw_step --------------------------------------------------------------------------------------


def refuse_early(step):
    if step < 1:
        raise ValueError(f"the first step has number 1, got {step}")


def means(gradient, m, v, betas):
    return betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * gradient * gradient


def corrected(m, v, step, betas):
    return m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)


@right("adamw_step")
def with_numpy(parameter, gradient, m, v, step, *, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    refuse_early(step)
    p, g, m, v = (tensor.numpy().astype(np.float64) for tensor in (parameter, gradient, m, v))
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * np.square(g)
    shrunk = p * (1 - learning_rate * weight_decay)
    return shrunk - learning_rate * (m / (1 - betas[0] ** step)) / (np.sqrt(v / (1 - betas[1] ** step)) + eps), m, v


@right("adamw_step")
def with_one_step_size(
    parameter, gradient, m, v, step, *, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
):
    refuse_early(step)
    m = torch.lerp(m, gradient.to(m.dtype), 1 - betas[0])
    v = torch.lerp(v, gradient.to(v.dtype) ** 2, 1 - betas[1])
    root = math.sqrt(1 - betas[1] ** step)
    size = learning_rate * root / (1 - betas[0] ** step)
    return parameter - size * m / (v.sqrt() + eps * root) - learning_rate * weight_decay * parameter, m, v


@right("adamw_step")
def in_float32_on_copies(
    parameter, gradient, m, v, step, *, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
):
    refuse_early(step)
    p, g, m, v = (tensor.clone().float() for tensor in (parameter, gradient, m, v))
    m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    m_hat, v_hat = corrected(m, v, step, betas)
    p.mul_(1 - learning_rate * weight_decay).addcdiv_(m_hat, v_hat.sqrt().add_(eps), value=-learning_rate)
    return p, m, v


def wrong_step(name, message):
    """Enter the arithmetic below, `f(p, g, m, v, t, rate, betas, eps, decay)`, as a wrong answer of that name."""

    def enter(arithmetic):
        def answer(parameter, gradient, m, v, step, *, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
            refuse_early(step)
            return arithmetic(parameter, gradient, m, v, step, learning_rate, betas, eps, weight_decay)

        answer.__name__ = name
        return wrong("adamw_step", message)(answer)

    return enter


@wrong_step(
    "l2_in_the_gradient",
    "The decay is in the gradient: that is Adam with an L2 penalty. It then passes through the division, and weights "
    "with large gradients hardly decay at all.",
)
def _l2(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g + decay * p, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * m_hat / (v_hat.sqrt() + eps), m, v


@wrong_step(
    "decay_inside_the_division",
    "The decay is divided by the root like the gradient. Decoupled means that it goes to the parameter directly.",
)
def _decay_divided(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat + decay * p) / (v_hat.sqrt() + eps), m, v


@wrong_step(
    "decay_without_the_learning_rate",
    "The decay does not follow the learning rate: at the end of a schedule, when steps are tiny, it would go on.",
)
def _decay_alone(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * m_hat / (v_hat.sqrt() + eps) - decay * p, m, v


@wrong_step(
    "decay_after_the_update", "You decay the parameter after it has moved; the decay belongs to where it was before."
)
def _decay_last(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return (p - rate * m_hat / (v_hat.sqrt() + eps)) * (1 - rate * decay), m, v


@wrong_step("no_decay", "The weight decay has no effect in your step: this is Adam without the W.")
def _no_decay(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * m_hat / (v_hat.sqrt() + eps), m, v


@wrong_step("decay_grows", "Your decay makes the weights larger: look at its sign.")
def _decay_grows(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) - decay * p), m, v


@wrong_step(
    "no_bias_correction",
    "The running means began at zero, and in the first steps they still are mostly zero. Nothing in your update "
    "makes up for that.",
)
def _no_correction(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    return p - rate * (m / (v.sqrt() + eps) + decay * p), m, v


@wrong_step("only_m_corrected", "You take the bias out of m but not out of v, which began at zero as well.")
def _m_corrected(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    return p - rate * (m / (1 - betas[0] ** t) / (v.sqrt() + eps) + decay * p), m, v


@wrong_step("only_v_corrected", "You take the bias out of v but not out of m, which began at zero as well.")
def _v_corrected(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    return p - rate * (m / ((v / (1 - betas[1] ** t)).sqrt() + eps) + decay * p), m, v


@wrong_step("one_beta_for_both", "Both corrections use the same beta. Each mean has its own, and its own bias.")
def _one_beta(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    correction = 1 - betas[0] ** t
    return p - rate * (m / correction / ((v / correction).sqrt() + eps) + decay * p), m, v


@wrong_step("correction_of_the_first_step_always", "Your correction is the same in every step; it depends on t.")
def _no_power(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, 1, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@wrong_step(
    "one_step_too_many",
    "Your correction is that of the next step: the first step has number 1 already, nothing is added.",
)
def _next_step(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t + 1, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@wrong_step(
    "eps_under_the_root",
    "eps stands under the root, where it is much larger than it looks: the root of 1e-8 is 1e-4.",
)
def _eps_inside(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat + eps).sqrt() + decay * p), m, v


@wrong_step(
    "eps_before_the_correction",
    "eps is added before the bias of v is taken out, so that it is corrected too and changes from step to step.",
)
def _eps_early(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    root = (v.sqrt() + eps) / math.sqrt(1 - betas[1] ** t)
    return p - rate * (m / (1 - betas[0] ** t) / root + decay * p), m, v


@wrong_step("without_eps", "Where v is zero you divide zero by zero. What is eps for, and where is it in your step?")
def _no_eps(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / v_hat.sqrt() + decay * p), m, v


@wrong_step("no_root", "You divide by v and not by its root: v has the unit of a squared gradient.")
def _no_root(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat + eps) + decay * p), m, v


@wrong_step("v_of_the_gradient_itself", "v is the mean of the squared gradient; you take its size without the square.")
def _no_square(p, g, m, v, t, rate, betas, eps, decay):
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g.abs()
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@wrong_step("no_means", "Your means add the new gradient with full weight, as momentum does: they are sums, not means.")
def _sums(p, g, m, v, t, rate, betas, eps, decay):
    m, v = betas[0] * m + g, betas[1] * v + g * g
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@wrong_step(
    "weights_of_the_means_swapped",
    "The new gradient gets the weight beta, and the old mean the rest: then almost nothing is remembered.",
)
def _forgetful(p, g, m, v, t, rate, betas, eps, decay):
    m, v = (1 - betas[0]) * m + betas[0] * g, (1 - betas[1]) * v + betas[1] * g * g
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@wrong_step("betas_swapped", "beta1 and beta2 are in each other's place: the first belongs to m.")
def _swapped(p, g, m, v, t, rate, betas, eps, decay):
    betas = (betas[1], betas[0])
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@wrong_step(
    "update_with_the_old_means", "You update with the means of the step before; this step's gradient has to be in them."
)
def _old_means(p, g, m, v, t, rate, betas, eps, decay):
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), *means(g, m, v, betas)


@wrong_step("uphill", "The step goes along the gradient, where the loss rises.")
def _uphill(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p + rate * (m_hat / (v_hat.sqrt() + eps) - decay * p), m, v


@wrong_step(
    "returns_the_corrected_means",
    "The parameter is right. But the means that you return have no bias left; the next step would correct them again.",
)
def _hats(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m_hat, v_hat


@wrong("adamw_step", "Steps are counted from 1. With step 0 the correction divides by zero: refuse it.")
def step_zero_accepted(
    parameter, gradient, m, v, step, *, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
):
    m, v = means(gradient, m, v, betas)
    m_hat, v_hat = corrected(m, v, step, betas)
    return parameter - learning_rate * (m_hat / (v_hat.sqrt() + eps) + weight_decay * parameter), m, v


@wrong("adamw_step", caught_by="changes its input")
def in_place(parameter, gradient, m, v, step, *, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    refuse_early(step)
    m.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    v.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    m_hat, v_hat = corrected(m, v, step, betas)
    return parameter - learning_rate * (m_hat / (v_hat.sqrt() + eps) + weight_decay * parameter), m, v


@wrong("adamw_step", caught_by="another type")
def only_the_parameter(
    parameter, gradient, m, v, step, *, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
):
    refuse_early(step)
    m, v = means(gradient, m, v, betas)
    m_hat, v_hat = corrected(m, v, step, betas)
    return parameter - learning_rate * (m_hat / (v_hat.sqrt() + eps) + weight_decay * parameter)


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


@wrong(
    "warmup_cosine",
    "Your first step has the learning rate 0: a whole batch is computed, and nothing moves. Steps are counted from 0.",
)
def begins_at_zero(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


@wrong("warmup_cosine", "Your warm-up does not reach the top: its last step has the full learning rate.")
def never_at_the_top(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


@wrong("warmup_cosine", "There is no warm-up in your schedule: its first steps have the largest rates.")
def no_warmup(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * step / steps))


@wrong("warmup_cosine", "Your cosine counts from step 0: it has fallen a part of its way before it begins.")
def cosine_from_the_start(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * step / steps))


@wrong("warmup_cosine", "Your fall is as long as the whole run; it has only the steps that the warm-up leaves.")
def too_slow_a_fall(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / steps))


@wrong("warmup_cosine", "Your last step has the rate 0, and so it is lost: 0 belongs to the step after the last.")
def last_step_lost(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - 1 - warmup_steps)))


@wrong("warmup_cosine", "After the warm-up your schedule falls in a line, not along a cosine.")
def linear(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (steps - step) / (steps - warmup_steps)


@wrong("warmup_cosine", "Your rates go down to -1: a cosine runs from 1 to -1, and has to be moved and halved.")
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


@wrong("warmup_cosine", "After the warm-up your rates begin at 0 and rise.")
def rises_again(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 - math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


@wrong("warmup_cosine", "Yours is a quarter of a cosine: it ends in its steepest place. Half of one ends flat.")
def a_quarter(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return math.cos(0.5 * math.pi * (step - warmup_steps) / (steps - warmup_steps))


@wrong("warmup_cosine", "Yours is a whole cosine: it comes back up to 1 at the end.")
def a_whole_cosine(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(2 * math.pi * (step - warmup_steps) / (steps - warmup_steps)))


@wrong("warmup_cosine", "The rise and the fall act together in yours, so that the top is never reached.")
def both_at_once(step, steps, warmup_steps):
    refuse_outside(step, steps, warmup_steps)
    rise = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


@wrong("warmup_cosine", "A step outside of the run, or more warm-up than steps, cannot be right: refuse them.")
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


# --- freeze_all_but_last -----------------------------------------------------------------------------


def refuse_layers(model, layers):
    if not 0 <= layers <= len(model.transformer.h):
        raise ValueError(f"{layers} layers of {len(model.transformer.h)}")


def open_only(model, modules):
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)


@right("freeze_all_but_last")
def by_name(model, layers):
    refuse_layers(model, layers)
    first = len(model.transformer.h) - layers
    for name, p in model.named_parameters():
        parts = name.split(".")
        p.requires_grad = parts[1] == "ln_f" or (parts[1] == "h" and int(parts[2]) >= first)


@right("freeze_all_but_last")
def closing_one_by_one(model, layers):
    refuse_layers(model, layers)
    body = model.transformer
    for p in model.parameters():
        p.requires_grad_(True)
    for part in (body.wte, body.wpe, *body.h[: len(body.h) - layers]):
        for p in part.parameters():
            p.requires_grad_(False)


@right("freeze_all_but_last")
def by_set(model, layers):
    refuse_layers(model, layers)
    blocks = list(model.transformer.h)
    chosen = [*blocks[len(blocks) - layers :], model.transformer.ln_f]
    kept = {id(p) for module in chosen for p in module.parameters()}
    for p in model.parameters():
        p.requires_grad = id(p) in kept
    return model


@wrong("freeze_all_but_last", "You train the first blocks and freeze the last: it is those near the output that learn.")
def the_first_blocks(model, layers):
    refuse_layers(model, layers)
    open_only(model, [*model.transformer.h[:layers], model.transformer.ln_f])


@wrong("freeze_all_but_last", "One block too many is trained.")
def one_too_many(model, layers):
    refuse_layers(model, layers)
    first = max(0, len(model.transformer.h) - layers - 1)
    open_only(model, [*model.transformer.h[first:], model.transformer.ln_f])


@wrong("freeze_all_but_last", "Exactly one block is trained, whatever the number of layers is.")
def only_one_block(model, layers):
    refuse_layers(model, layers)
    open_only(model, [model.transformer.h[len(model.transformer.h) - max(layers, 1)], model.transformer.ln_f])


@wrong("freeze_all_but_last", "With 0 layers yours trains every block: a slice that begins at -0 begins at the front.")
def minus_zero(model, layers):
    refuse_layers(model, layers)
    open_only(model, [*model.transformer.h[-layers:], model.transformer.ln_f])


@wrong("freeze_all_but_last", "The last LayerNorm stands behind the last block, and is trained with it.")
def forgets_the_last_norm(model, layers):
    refuse_layers(model, layers)
    open_only(model, model.transformer.h[len(model.transformer.h) - layers :])


@wrong("freeze_all_but_last", "Both embeddings are still trained: they stand in front of all blocks.")
def embeddings_open(model, layers):
    refuse_layers(model, layers)
    body = model.transformer
    open_only(model, [body.wte, body.wpe, *body.h[len(body.h) - layers :], body.ln_f])


@wrong(
    "freeze_all_but_last",
    "The token embedding is trained, as the output layer that it also is. But it is the input too, below every block "
    "that you freeze: here it stays frozen.",
)
def output_layer_open(model, layers):
    refuse_layers(model, layers)
    body = model.transformer
    open_only(model, [body.wte, *body.h[len(body.h) - layers :], body.ln_f])


@wrong("freeze_all_but_last", "The position embedding is still trained. It is an input like the token embedding.")
def positions_open(model, layers):
    refuse_layers(model, layers)
    body = model.transformer
    open_only(model, [body.wpe, *body.h[len(body.h) - layers :], body.ln_f])


@wrong(
    "freeze_all_but_last",
    "You only freeze. A model that was frozen before, by a run with fewer layers perhaps, has to be opened again.",
)
def only_freezes(model, layers):
    refuse_layers(model, layers)
    body = model.transformer
    for part in (body.wte, body.wpe, *body.h[: len(body.h) - layers]):
        part.requires_grad_(False)


@wrong(
    "freeze_all_but_last",
    "Nothing has changed. `requires_grad` belongs to parameters; setting it on a module makes a new attribute that "
    "nobody reads.",
)
def attribute_of_the_module(model, layers):
    refuse_layers(model, layers)
    model.requires_grad = False
    for block in model.transformer.h[len(model.transformer.h) - layers :]:
        block.requires_grad = True


@wrong(
    "freeze_all_but_last",
    "Your function goes by the beginnings of names. That of block 1 is also how those of blocks 10 and 11 begin.",
)
def names_that_begin_alike(model, layers):
    refuse_layers(model, layers)
    frozen = [f"transformer.h.{i}" for i in range(len(model.transformer.h) - layers)]
    for name, p in model.named_parameters():
        p.requires_grad = not name.startswith(("transformer.wte", "transformer.wpe", *frozen))


@wrong(
    "freeze_all_but_last", "You go by shape, and treat biases and norms unlike matrices. A block is trained as a whole."
)
def only_matrices(model, layers):
    refuse_layers(model, layers)
    open_only(model, [*model.transformer.h[len(model.transformer.h) - layers :], model.transformer.ln_f])
    for p in model.parameters():
        p.requires_grad = p.requires_grad and p.ndim >= 2


@wrong("freeze_all_but_last", "Everything is frozen: the blocks that shall learn have to be opened again.")
def freezes_everything(model, layers):
    refuse_layers(model, layers)
    model.requires_grad_(False)


@wrong(
    "freeze_all_but_last", "A model does not have more blocks than it has, nor fewer than none: refuse such a number."
)
def any_number_will_do(model, layers):
    first = max(0, len(model.transformer.h) - max(layers, 0))
    open_only(model, [*model.transformer.h[first:], model.transformer.ln_f])


@wrong("freeze_all_but_last", "A negative number of blocks has to be refused as well.")
def negative_will_do(model, layers):
    if layers > len(model.transformer.h):
        raise ValueError("too many")
    open_only(model, [*model.transformer.h[len(model.transformer.h) - max(layers, 0) :], model.transformer.ln_f])


# --- trainable_memory --------------------------------------------------------------------------------


def learning(model):
    return [p for p in model.parameters() if p.requires_grad]


def both(gradients, optimizer):
    return {"gradients": gradients, "optimizer": optimizer}


@right("trainable_memory")
def makes_the_tensors(model):
    gradients = [torch.empty_like(p) for p in learning(model)]
    states = [(torch.empty_like(g), torch.empty_like(g), torch.tensor(0.0)) for g in gradients]
    return both(sum(g.nbytes for g in gradients), sum(t.nbytes for state in states for t in state))


@right("trainable_memory")
def with_a_loop(model):
    gradients, optimizer = 0, np.int64(0)
    for _, p in model.named_parameters():
        size = torch.finfo(p.dtype).bits // 8
        gradients += p.requires_grad * math.prod(p.shape) * size
        optimizer += p.requires_grad * (2 * math.prod(p.shape) * size + 4)
    return both(gradients, optimizer)


@wrong("trainable_memory", "You count frozen parameters as well: they have no gradient, and the optimiser skips them.")
def counts_the_frozen(model):
    size = sum(p.nbytes for p in model.parameters())
    return both(size, 2 * size + 4 * len(list(model.parameters())))


@wrong("trainable_memory", "The optimiser's share is right, but a frozen parameter has no gradient either.")
def gradients_of_the_frozen(model):
    state = 2 * sum(p.nbytes for p in learning(model)) + 4 * len(learning(model))
    return both(sum(p.nbytes for p in model.parameters()), state)


@wrong("trainable_memory", "The gradients are right, but the optimiser keeps nothing for a frozen parameter.")
def state_of_the_frozen(model):
    parameters = list(model.parameters())
    return both(sum(p.nbytes for p in learning(model)), 2 * sum(p.nbytes for p in parameters) + 4 * len(parameters))


@wrong("trainable_memory", "The optimiser keeps two tensors for each parameter, m and v. You count one.")
def one_moment(model):
    size = sum(p.nbytes for p in learning(model))
    return both(size, size + 4 * len(learning(model)))


@wrong("trainable_memory", "The number of the step, which the optimiser keeps beside m and v, is missing.")
def without_the_counter(model):
    size = sum(p.nbytes for p in learning(model))
    return both(size, 2 * size)


@wrong(
    "trainable_memory", "The optimiser counts the steps of every tensor by itself; you count one for the whole model."
)
def one_counter_for_all(model):
    size = sum(p.nbytes for p in learning(model))
    return both(size, 2 * size + (4 if size else 0))


@wrong("trainable_memory", "You count a step number for every number of a tensor. There is one for each tensor.")
def a_counter_for_each_number(model):
    size = sum(p.nbytes for p in learning(model))
    return both(size, 2 * size + 4 * sum(p.numel() for p in learning(model)))


@wrong("trainable_memory", "You always count 4 bytes a number. Not every model is in float32: the parameters say it.")
def always_float32(model):
    size = 4 * sum(p.numel() for p in learning(model))
    return both(size, 2 * size + 4 * len(learning(model)))


@wrong(
    "trainable_memory",
    "You keep m and v in float32. PyTorch's AdamW makes them in the dtype of the parameter, whatever that is.",
)
def state_in_float32(model):
    trained = learning(model)
    return both(sum(p.nbytes for p in trained), 8 * sum(p.numel() for p in trained) + 4 * len(trained))


@wrong(
    "trainable_memory", "The counter of the steps is a float32 number of its own, whatever the parameter's dtype is."
)
def counter_in_the_dtype(model):
    trained = learning(model)
    size = sum(p.nbytes for p in trained)
    return both(size, 2 * size + sum(p.element_size() for p in trained))


@wrong("trainable_memory", "These are numbers, not bytes.")
def counts_numbers(model):
    size = sum(p.numel() for p in learning(model))
    return both(size, 2 * size + len(learning(model)))


@wrong(
    "trainable_memory", "A parameter that two modules share is one parameter, with one gradient: you count it twice."
)
def shared_ones_twice(model):
    trained = [p for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    size = sum(p.nbytes for p in trained)
    return both(size, 2 * size + 4 * len(trained))


@wrong("trainable_memory", "You count the weights among the gradients. They are there whether they are trained or not.")
def weights_as_well(model):
    size = sum(p.nbytes for p in learning(model))
    return both(2 * size, 2 * size + 4 * len(learning(model)))


@wrong("trainable_memory", "You leave the biases out: small as they are, they have gradients like the matrices.")
def only_matrices_count(model):
    trained = [p for p in learning(model) if p.ndim >= 2]
    size = sum(p.nbytes for p in trained)
    return both(size, 2 * size + 4 * len(trained))


@wrong("trainable_memory", caught_by="another type")
def the_sum(model):
    return 3 * sum(p.nbytes for p in learning(model)) + 4 * len(learning(model))
