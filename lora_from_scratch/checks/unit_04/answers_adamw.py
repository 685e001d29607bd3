"""Unit 04, full fine-tuning, AdamW: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import right, wrong

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


@right("adamw_step")
def pytorchs_own_optimiser(
    parameter, gradient, m, v, step, *, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
):
    refuse_early(step)
    theta = torch.nn.Parameter(parameter.clone())
    theta.grad = gradient.to(theta.dtype)
    optimizer = torch.optim.AdamW([theta], lr=learning_rate, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
    state = {"step": torch.tensor(step - 1.0), "exp_avg": m.to(theta.dtype), "exp_avg_sq": v.to(theta.dtype)}
    optimizer.state[theta] = {name: tensor.clone() for name, tensor in state.items()}
    optimizer.step()
    return theta.detach(), optimizer.state[theta]["exp_avg"], optimizer.state[theta]["exp_avg_sq"]


@right("adamw_step")
def number_by_number(
    parameter, gradient, m, v, step, *, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
):
    refuse_early(step)
    new = []
    for p, g, a, b in zip(*(one.flatten().tolist() for one in (parameter, gradient, m, v)), strict=True):
        a, b = betas[0] * a + (1 - betas[0]) * g, betas[1] * b + (1 - betas[1]) * g * g
        size = a / (1 - betas[0] ** step) / (math.sqrt(b / (1 - betas[1] ** step)) + eps)
        new.append((p - learning_rate * (size + weight_decay * p), a, b))
    return tuple(torch.tensor(one, dtype=torch.float64).view(parameter.shape) for one in zip(*new, strict=True))


def wrong_step(name, message):
    """Register the function below, `f(p, g, m, v, t, rate, betas, eps, decay)`, as a wrong answer under this name."""

    def enter(arithmetic):
        def answer(parameter, gradient, m, v, step, *, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
            refuse_early(step)
            return arithmetic(parameter, gradient, m, v, step, learning_rate, betas, eps, weight_decay)

        answer.__name__ = name
        return wrong("adamw_step", message)(answer)

    return enter


@wrong_step(
    "l2_in_the_gradient",
    "You add the decay to the gradient: that is Adam with an L2 penalty. It then passes through the division, and "
    "weights with large gradients hardly decay at all.",
)
def _l2(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g + decay * p, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * m_hat / (v_hat.sqrt() + eps), m, v


@wrong_step(
    "decay_inside_the_division",
    "You divide the decay by the root, like the gradient. Decoupled means that it is applied to the parameter "
    "directly.",
)
def _decay_divided(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat + decay * p) / (v_hat.sqrt() + eps), m, v


@wrong_step(
    "decay_without_the_learning_rate",
    "Your decay is not multiplied by the learning rate: at the end of a schedule, when steps are tiny, it would "
    "continue at full strength.",
)
def _decay_alone(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * m_hat / (v_hat.sqrt() + eps) - decay * p, m, v


@wrong_step(
    "decay_after_the_update",
    "You decay the parameter after it has moved; the decay applies to its value before the step.",
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
    "The running means started at zero, and in the first steps they are still too small. Nothing in your update "
    "corrects for that.",
)
def _no_correction(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    return p - rate * (m / (v.sqrt() + eps) + decay * p), m, v


@wrong_step("only_m_corrected", "You correct the bias of m but not that of v, which also started at zero.")
def _m_corrected(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    return p - rate * (m / (1 - betas[0] ** t) / (v.sqrt() + eps) + decay * p), m, v


@wrong_step("only_v_corrected", "You correct the bias of v but not that of m, which also started at zero.")
def _v_corrected(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    return p - rate * (m / ((v / (1 - betas[1] ** t)).sqrt() + eps) + decay * p), m, v


@wrong_step("one_beta_for_both", "Both corrections use the same beta. Each mean has its own beta, and so its own bias.")
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
    "Your correction is that of the next step: the first step already has number 1, so do not add 1.",
)
def _next_step(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t + 1, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@wrong_step(
    "eps_under_the_root",
    "eps is under the root, where it is much larger than it looks: the root of 1e-8 is 1e-4.",
)
def _eps_inside(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat + eps).sqrt() + decay * p), m, v


@wrong_step(
    "eps_before_the_correction",
    "You add eps before the bias of v is corrected, so that it is scaled too and changes from step to step.",
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


@wrong_step("no_root", "You divide by v, not by its root: v has the unit of a squared gradient.")
def _no_root(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat + eps) + decay * p), m, v


@wrong_step(
    "v_of_the_gradient_itself",
    "v is the mean of the squared gradient; you use its absolute value instead of the square.",
)
def _no_square(p, g, m, v, t, rate, betas, eps, decay):
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g.abs()
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@wrong_step("no_means", "You add the new gradient with full weight, as momentum does: the results are sums, not means.")
def _sums(p, g, m, v, t, rate, betas, eps, decay):
    m, v = betas[0] * m + g, betas[1] * v + g * g
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@wrong_step(
    "weights_of_the_means_swapped",
    "You give the new gradient the weight beta, and the old mean the rest: then almost nothing is remembered.",
)
def _forgetful(p, g, m, v, t, rate, betas, eps, decay):
    m, v = (1 - betas[0]) * m + betas[0] * g, (1 - betas[1]) * v + betas[1] * g * g
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@wrong_step("betas_swapped", "You have swapped beta1 and beta2: the first belongs to m.")
def _swapped(p, g, m, v, t, rate, betas, eps, decay):
    betas = (betas[1], betas[0])
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m, v


@wrong_step(
    "update_with_the_old_means",
    "You update with the means from the previous step; they have to include this step's gradient.",
)
def _old_means(p, g, m, v, t, rate, betas, eps, decay):
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), *means(g, m, v, betas)


@wrong_step("uphill", "Your step goes along the gradient, in the direction in which the loss rises.")
def _uphill(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p + rate * (m_hat / (v_hat.sqrt() + eps) - decay * p), m, v


@wrong_step(
    "returns_the_corrected_means",
    "The parameter is right. But you return the corrected means; the next step would correct them again.",
)
def _hats(p, g, m, v, t, rate, betas, eps, decay):
    m, v = means(g, m, v, betas)
    m_hat, v_hat = corrected(m, v, t, betas)
    return p - rate * (m_hat / (v_hat.sqrt() + eps) + decay * p), m_hat, v_hat


@wrong("adamw_step", "Steps are counted from 1. With step 0 the correction divides by zero: raise a ValueError.")
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


@wrong(
    "adamw_step",
    "Your bias correction of m uses 0.9, whatever beta1 is. Both corrections use the betas that are given.",
)
def the_usual_beta_in_the_correction(
    parameter, gradient, m, v, step, *, learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
):
    refuse_early(step)
    m, v = means(gradient, m, v, betas)
    m_hat, v_hat = corrected(m, v, step, (0.9, betas[1]))
    return parameter - learning_rate * (m_hat / (v_hat.sqrt() + eps) + weight_decay * parameter), m, v
