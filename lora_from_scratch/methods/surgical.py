"""Surgical fine-tuning (Lee et al. 2023, arXiv:2210.11466): a separate learning rate for each tensor.

Auto-RGN trains every tensor, with a learning rate proportional to the norm of its gradient relative to its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.model import next_token_loss


def relative_gradient_norms(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor | None]]
) -> dict[str, float]:
    """The norm of each tensor's gradient g relative to the tensor p: the mean of `||g|| / ||p||` over the batches.

    This is the RGN of Lee et al., with Euclidean norms of whole tensors; their code uses five batches. g is the
    gradient of `next_token_loss` on one batch: each batch has its own quotient, and these are averaged. Only parameters
    with `requires_grad` are measured; no `.grad` and no weight is changed. A tensor that the loss does not depend on
    has the gradient 0.

    Args:
        model: any module with `model(input_ids, attention_mask=...) -> logits` (B, T, V).
        batches: each has input_ids (B, T), labels (B, T), attention_mask (B, T) or None, as in
            `finetune.training.Batch`. They may be iterable only once.

    Returns:
        name -> number, for each parameter that has `requires_grad`.

    Raises:
        ValueError: there is no batch, nothing to train, or a tensor is all zeros, so that the quotient is undefined.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("nothing to measure: no parameter of the model has requires_grad=True")
    sizes = {name: float(p.detach().norm()) for name, p in parameters.items()}
    for name, size in sizes.items():
        if size == 0:
            raise ValueError(
                f"{name} is all zeros, so its gradient has no relative size; set its requires_grad to False first"
            )
    sums, count = dict.fromkeys(parameters, 0.0), 0
    for input_ids, labels, attention_mask in batches:
        loss = next_token_loss(model(input_ids, attention_mask=attention_mask), labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            sums[name] += float(gradient.norm()) / sizes[name]
        count += 1
    if count == 0:
        raise ValueError("no batch to measure on; give at least one")
    return {name: total / count for name, total in sums.items()}


def auto_rgn_weights(norms: Mapping[str, float]) -> dict[str, float]:
    """The norms divided by the largest: the fraction, 0 to 1, of the learning rate that each tensor gets.

    Args:
        norms: name -> relative gradient norm; not modified.

    Returns:
        name -> fraction, for the same names.

    Raises:
        ValueError: no norm is above zero, or a norm is negative, infinite or NaN.
    """
    largest = max(norms.values(), default=0.0)
    wrong = {name: norm for name, norm in norms.items() if not 0 <= norm < float("inf")}
    if wrong or largest == 0:
        shown = ", ".join(f"{name}: {norm}" for name, norm in list((wrong or norms).items())[:3])
        raise ValueError(f"norms must be at least 0 and finite, and one above 0, got {shown or 'none'}")
    return {name: norm / largest for name, norm in norms.items()}


def surgical_parameter_groups(
    model: nn.Module, weights: Mapping[str, float], learning_rate: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, one for each tensor, with the learning rate `w * learning_rate`.

    Lee et al. repeat the measurement at the beginning of each epoch and create a new optimiser.

    Args:
        weights: full name of the parameter -> weight w, from `auto_rgn_weights`; a tensor without a weight is not
            trained and gets no group.
        learning_rate: of a tensor with weight 1.
        weight_decay: for the matrices, whatever their weight w; tensors with fewer than two axes get 0.

    Returns:
        One dictionary for each of the weights, in order, with the keys "name" (the full name), "params" (a list with
            the parameter itself), "lr" and "weight_decay".

    Raises:
        ValueError: a name is not that of a parameter of the model.
    """
    parameters = dict(model.named_parameters())
    for name in weights:
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name!r}; it has names like {next(iter(parameters))!r}")
    return [
        {
            "name": name,
            "params": [parameters[name]],
            "lr": weight * learning_rate,
            "weight_decay": weight_decay if parameters[name].ndim >= 2 else 0.0,
        }
        for name, weight in weights.items()
    ]
