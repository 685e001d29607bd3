"""The gradients of weights that are not trained, for methods that begin with them or look at them during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.model import next_token_loss
from lora_from_scratch.support.linear_layers import dense, is_conv1d


def visit_weight_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, visit: Callable[[str, Tensor], None]
) -> None:
    """Call `visit(name, G)` with the gradient of each layer's weight, as soon as it is complete.

    One forward and one backward pass, without dropout and in the precision of the weights. Each gradient is freed after
    its visit, so the gradients of all weights are never in memory together. A layer that the batch does not reach is
    not visited. Afterwards, also after an error, the model is in its mode and trains what it trained before.

    Args:
        model: maps `input_ids` to logits.
        layers: linear layers in the model, by name.
        batch: with `input_ids`, `labels` and `attention_mask`.
        visit: is given a layer's name and G (out, in), the gradient of the loss.
    """
    weights: dict[str, Any] = {name: dense(layer) for name, layer in layers.items()}
    flags, training = {name: weight.requires_grad for name, weight in weights.items()}, model.training

    def hook(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        visit(name, weight.grad.T if is_conv1d(layers[name]) else weight.grad)
        weight.grad = None

    for weight in weights.values():
        weight.requires_grad_(True)
    hooks = [weight.register_post_accumulate_grad_hook(partial(hook, name)) for name, weight in weights.items()]
    model.eval()
    try:
        batch = batch.to(next(iter(weights.values())).device)
        with torch.enable_grad():
            loss = next_token_loss(model(batch.input_ids, attention_mask=batch.attention_mask), batch.labels)
            loss.backward(inputs=list(weights.values()))  # and not to what is trained
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(flags[name])
            weight.grad = None
