"""Unit 08, surgical fine-tuning: mistakes that people make, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.gpt2.model import next_token_loss

# --- relative_gradient_norms -------------------------------------------------------------------------


def measured(model) -> dict:
    """The parameters to measure; raises for everything invalid except missing batches."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found or any(not p.any() for p in found.values()):
        raise ValueError("there is nothing to measure, or a tensor of zeros")
    return found


def gradients(model, batch, found):
    ids, labels, mask = batch
    loss = next_token_loss(model(ids, attention_mask=mask), labels)
    got = torch.autograd.grad(loss, list(found.values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(got, found.values(), strict=True)]


def averaged(model, batches, quotient) -> dict:
    """The mean over batches of `quotient(gradient, parameter)`."""
    found, rows = measured(model), []
    for batch in batches:
        pairs = zip(gradients(model, batch, found), found.values(), strict=True)
        rows.append([float(quotient(g, p.detach())) for g, p in pairs])
    if not rows:
        raise ValueError("no batch")
    return {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(found)}


@right("relative_gradient_norms")
def with_lists_of_quotients(model, batches) -> dict:
    return averaged(model, batches, lambda g, p: (g.square().sum() / p.square().sum()).sqrt())


@wrong(
    "relative_gradient_norms",
    "Your code overwrites the gradients (`.grad`) that the parameters had before. It only measures: whoever is in the "
    "middle of a training step still needs them.",
)
def by_backward_and_zero_grad(model, batches) -> dict:
    found, total, count = measured(model), None, 0
    for ids, labels, mask in batches:
        next_token_loss(model(ids, attention_mask=mask), labels).backward()
        squares = [0.0 if p.grad is None else float((p.grad.double() ** 2).sum()) for p in found.values()]
        quotients = [
            math.sqrt(s / float((p.detach().double() ** 2).sum())) for s, p in zip(squares, found.values(), strict=True)
        ]
        total = quotients if total is None else [a + b for a, b in zip(total, quotients, strict=True)]
        count += 1
        model.zero_grad(set_to_none=True)
    if not count:
        raise ValueError("no batch")
    return {name: value / count for name, value in zip(found, total, strict=True)}


@right("relative_gradient_norms")
def with_its_own_cross_entropy(model, batches) -> dict:
    found, rows = measured(model), list(batches)
    if not rows:
        raise ValueError("no batch")
    sums = dict.fromkeys(found, 0.0)
    for ids, labels, mask in rows:
        logits = model(ids, attention_mask=mask)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        for name, g in zip(found, torch.autograd.grad(loss, [*found.values()], allow_unused=True), strict=True):
            sums[name] += 0.0 if g is None else (g.norm() / found[name].norm()).item() / len(rows)
    return sums


@wrong(
    "relative_gradient_norms",
    "You compute the quotient for every single entry and average those. One entry near zero then dominates its whole "
    "tensor. Both norms are norms of the whole tensor.",
)
def entry_by_entry(model, batches) -> dict:
    return averaged(model, batches, lambda g, p: (g.abs() / p.abs()).mean())


@wrong(
    "relative_gradient_norms",
    "You do not divide by the norm of the tensor: that is a gradient norm, not a relative one.",
)
def not_relative(model, batches) -> dict:
    return averaged(model, batches, lambda g, p: g.norm())


@wrong("relative_gradient_norms", "Your quotient is upside down: the larger the gradient, the smaller your number.")
def upside_down(model, batches) -> dict:
    return averaged(model, batches, lambda g, p: p.norm() / g.norm() if g.any() else torch.tensor(0.0))


@wrong("relative_gradient_norms", "You use squared norms: the square root is missing.")
def squared(model, batches) -> dict:
    return averaged(model, batches, lambda g, p: g.square().sum() / p.square().sum())


@wrong(
    "relative_gradient_norms",
    "You add up the batches without dividing by their number: twice as many batches would give twice the norm.",
)
def the_sum_over_batches(model, batches) -> dict:
    found, sums, count = measured(model), None, 0
    for batch in batches:
        row = [float(g.norm() / p.norm()) for g, p in zip(gradients(model, batch, found), found.values(), strict=True)]
        sums, count = row if sums is None else [a + b for a, b in zip(sums, row, strict=True)], count + 1
    if not count:
        raise ValueError("no batch")
    return dict(zip(found, sums, strict=True))


@wrong(
    "relative_gradient_norms",
    "You average the gradients over the batches and take the norm afterwards. Gradients of opposite sign then cancel; "
    "compute a quotient for each batch.",
)
def the_norm_of_the_mean(model, batches) -> dict:
    found, rows = measured(model), []
    for batch in batches:
        rows.append(gradients(model, batch, found))
    if not rows:
        raise ValueError("no batch")
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return {n: float(g.norm() / p.norm()) for (n, p), g in zip(found.items(), means, strict=True)}


@wrong(
    "relative_gradient_norms",
    "The gradients accumulate: from the second batch on, you measure the sum of all gradients so far. They also remain "
    "in `.grad` for the next training step.",
)
def gradients_pile_up(model, batches) -> dict:
    found, sums, count = measured(model), None, 0
    sums = dict.fromkeys(found, 0.0)
    for ids, labels, mask in batches:
        next_token_loss(model(ids, attention_mask=mask), labels).backward()
        for name, p in found.items():
            sums[name] += 0.0 if p.grad is None else float(p.grad.norm() / p.norm())
        count += 1
    if not count:
        raise ValueError("no batch")
    return {name: value / count for name, value in sums.items()}


@wrong("relative_gradient_norms", "Only the last batch counts in your result: it overwrites the others.")
def the_last_batch_only(model, batches) -> dict:
    found, last = measured(model), None
    for batch in batches:
        last = [float(g.norm() / p.norm()) for g, p in zip(gradients(model, batch, found), found.values(), strict=True)]
    if last is None:
        raise ValueError("no batch")
    return dict(zip(found, last, strict=True))


@wrong(
    "relative_gradient_norms",
    "You do not pass the mask on: the model then treats padding as text.",
)
def without_the_mask(model, batches) -> dict:
    return averaged(model, ((ids, labels, None) for ids, labels, _ in batches), lambda g, p: g.norm() / p.norm())


@wrong(
    "relative_gradient_norms",
    "Your result contains a frozen tensor, with value 0. It is not measured: 0 would mean that the task does not pull "
    "at it.",
)
def frozen_ones_with_zero(model, batches) -> dict:
    norms = averaged(model, batches, lambda g, p: g.norm() / p.norm())
    return {name: norms.get(name, 0.0) for name, _ in model.named_parameters()}


@wrong(
    "relative_gradient_norms",
    "A tensor that the loss does not depend on is missing from your result. Its gradient is 0.",
)
def unused_ones_left_out(model, batches) -> dict:
    norms = averaged(model, batches, lambda g, p: g.norm() / p.norm())
    return {name: norm for name, norm in norms.items() if norm > 0}


@wrong(
    "relative_gradient_norms",
    "You return a number for a tensor of zeros. A relative size is undefined there: raise a ValueError.",
)
def a_little_is_added_below(model, batches) -> dict:
    found, rows = {n: p for n, p in model.named_parameters() if p.requires_grad}, []
    if not found:
        raise ValueError("nothing")
    for batch in batches:
        pairs = zip(gradients(model, batch, found), found.values(), strict=True)
        rows.append([float(g.norm() / (p.norm() + 1e-12)) for g, p in pairs])
    if not rows:
        raise ValueError("no batch")
    return {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(found)}


@wrong(
    "relative_gradient_norms",
    "You refuse a model in which a frozen tensor is all zeros. Only what is trained is measured.",
)
def frozen_zeros_refused(model, batches) -> dict:
    if any(not p.any() for p in model.parameters()):
        raise ValueError("a tensor of zeros")
    return averaged(model, batches, lambda g, p: g.norm() / p.norm())


# --- auto_rgn_weights --------------------------------------------------------------------------------


def in_order(norms) -> None:
    if not norms or not all(0 <= norm < math.inf for norm in norms.values()) or not any(norms.values()):
        raise ValueError("norms must be finite and not all zero")


@right("auto_rgn_weights")
def by_a_tensor(norms) -> dict:
    values = torch.tensor([*norms.values()], dtype=torch.float64)
    if not len(values) or not bool(((values >= 0) & values.isfinite()).all()) or float(values.max()) == 0:
        raise ValueError("these norms cannot be shares of anything")
    return dict(zip(norms, (values / values.max()).tolist(), strict=True))


@right("auto_rgn_weights")
def by_sorting(norms) -> dict:
    in_order(norms)
    *_, largest = sorted(norms.values())
    return {name: float(norms[name]) / largest for name in reversed(list(norms))}


@wrong("auto_rgn_weights", "You divide by the sum: then no tensor gets the full learning rate.")
def shares_of_the_sum(norms) -> dict:
    in_order(norms)
    return {name: norm / sum(norms.values()) for name, norm in norms.items()}


@wrong("auto_rgn_weights", "You divide by the mean: some tensors get more than the requested learning rate.")
def beside_the_mean(norms) -> dict:
    in_order(norms)
    return {name: norm * len(norms) / sum(norms.values()) for name, norm in norms.items()}


@wrong(
    "auto_rgn_weights",
    "You rescale the norms so that the smallest becomes 0: that tensor would not be trained at all, although the task "
    "pulls at it.",
)
def stretched_from_the_smallest(norms) -> dict:
    in_order(norms)
    low, high = min(norms.values()), max(norms.values())
    return {name: (norm - low) / (high - low) if high > low else 1.0 for name, norm in norms.items()}


@wrong(
    "auto_rgn_weights",
    "You divide the smallest norm by each norm: the tensors with large norms then learn most slowly.",
)
def the_other_way_round(norms) -> dict:
    in_order(norms)
    low = min((norm for norm in norms.values() if norm), default=1.0)
    return {name: low / norm if norm else 1.0 for name, norm in norms.items()}


@wrong(
    "auto_rgn_weights",
    "A softmax turns any numbers into shares. But here a norm of 0 must give 0, and the largest norm must give 1.",
)
def by_softmax(norms) -> dict:
    in_order(norms)
    return dict(zip(norms, torch.softmax(torch.tensor([*norms.values()]), 0).tolist(), strict=True))


@wrong(
    "auto_rgn_weights",
    "You round the shares to 0 or 1. Every tensor gets its share, not only the one with the largest norm.",
)
def only_the_largest(norms) -> dict:
    in_order(norms)
    return {name: float(norm == max(norms.values())) for name, norm in norms.items()}


@wrong(
    "auto_rgn_weights",
    "You accept a norm that is negative or not a number: it would become a learning rate.",
)
def only_zeros_are_refused(norms) -> dict:
    if not any(norms.values()):
        raise ValueError("all zero")
    return {name: norm / max(norms.values()) for name, norm in norms.items()}


@wrong("auto_rgn_weights", caught_by="changes its input")
def in_place(norms) -> dict:
    in_order(norms)
    largest = max(norms.values())
    for name in norms:
        norms[name] /= largest
    return norms


# --- surgical_parameter_groups -----------------------------------------------------------------------


def known(model, weights) -> dict:
    parameters = dict(model.named_parameters())
    if not weights.keys() <= parameters.keys():
        raise ValueError("there is no such parameter")
    return parameters


def groups_by(model, weights, rate, decay) -> list:
    """A group for each weight, with `rate(weight)` and `decay(parameter, weight)`."""
    parameters = known(model, weights)
    return [
        {"name": n, "params": [parameters[n]], "lr": rate(w), "weight_decay": decay(parameters[n], w)}
        for n, w in weights.items()
    ]


@right("surgical_parameter_groups")
def one_after_the_other(model, weights, learning_rate, weight_decay=0.0) -> list:
    groups = []
    for name in weights:
        try:
            p = model.get_parameter(name)
        except AttributeError:
            raise ValueError(f"no parameter {name}") from None
        group = {"params": [p], "lr": learning_rate * weights[name], "weight_decay": 0.0, "name": name}
        if len(p.shape) > 1:
            group["weight_decay"] = weight_decay
        groups.append(group)
    return groups


@right("surgical_parameter_groups")
def with_the_tensor_itself(model, weights, learning_rate, weight_decay=0.0) -> list:
    parameters = known(model, weights)
    return [
        dict(name=n, params=parameters[n], lr=w * learning_rate, weight_decay=weight_decay * (parameters[n].dim() > 1))
        for n, w in weights.items()
    ]


@wrong("surgical_parameter_groups", "All groups have the same learning rate: the weights have no effect.")
def the_same_rate_for_all(model, weights, learning_rate, weight_decay=0.0) -> list:
    return groups_by(model, weights, lambda w: learning_rate, lambda p, w: weight_decay * (p.ndim > 1))


@wrong("surgical_parameter_groups", "The learning rate is the weight alone: the requested learning rate is missing.")
def the_weight_alone(model, weights, learning_rate, weight_decay=0.0) -> list:
    return groups_by(model, weights, lambda w: w, lambda p, w: weight_decay * (p.ndim > 1))


@wrong(
    "surgical_parameter_groups",
    "You divide by the weight: what should learn slowly learns fastest.",
)
def divided_by_the_weight(model, weights, learning_rate, weight_decay=0.0) -> list:
    return groups_by(model, weights, lambda w: learning_rate / (w or 1), lambda p, w: weight_decay * (p.ndim > 1))


@wrong("surgical_parameter_groups", "Your biases and scales decay. Only tensors with two or more axes do.")
def vectors_decay_too(model, weights, learning_rate, weight_decay=0.0) -> list:
    return groups_by(model, weights, lambda w: w * learning_rate, lambda p, w: weight_decay)


@wrong("surgical_parameter_groups", "Nothing decays: the weight decay of the matrices is missing.")
def nothing_decays(model, weights, learning_rate, weight_decay=0.0) -> list:
    return groups_by(model, weights, lambda w: w * learning_rate, lambda p, w: 0.0)


@wrong(
    "surgical_parameter_groups",
    "You multiply the weight decay by the weight as well. AdamW already multiplies the decay by the learning rate, "
    "which includes the weight.",
)
def the_decay_weighted_too(model, weights, learning_rate, weight_decay=0.0) -> list:
    return groups_by(model, weights, lambda w: w * learning_rate, lambda p, w: w * weight_decay * (p.ndim > 1))


@wrong(
    "surgical_parameter_groups",
    "Parameters without a weight get a group as well, and would be trained at the full rate.",
)
def the_unnamed_at_the_full_rate(model, weights, learning_rate, weight_decay=0.0) -> list:
    known(model, weights)
    everything = {**weights, **{n: 1.0 for n, _ in model.named_parameters() if n not in weights}}
    return groups_by(model, everything, lambda w: w * learning_rate, lambda p, w: weight_decay * (p.ndim > 1))


@wrong(
    "surgical_parameter_groups",
    "You ignore a name that the model does not have. It is probably a typing error, and the tensor that was meant "
    "would never be trained.",
)
def unknown_names_are_passed_over(model, weights, learning_rate, weight_decay=0.0) -> list:
    there = {n: w for n, w in weights.items() if n in dict(model.named_parameters())}
    return groups_by(model, there, lambda w: w * learning_rate, lambda p, w: weight_decay * (p.ndim > 1))


@wrong(
    "surgical_parameter_groups",
    "Your groups contain copies of the parameters: the optimiser would train the copies, and the model would stay as "
    "it is.",
)
def copies_of_the_parameters(model, weights, learning_rate, weight_decay=0.0) -> list:
    groups = groups_by(model, weights, lambda w: w * learning_rate, lambda p, w: weight_decay * (p.ndim > 1))
    return [{**group, "params": [nn.Parameter(group["params"][0].detach().clone())]} for group in groups]
