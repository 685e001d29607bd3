"""Surgical fine-tuning: which part of a classifier to tune for which shift (Lee et al. 2023, arXiv:2210.11466,
sections 2 and 4).

The pretrained classifier is adapted to a shifted task with 100 pictures. The choices are to tune one part and freeze
the others, to tune all parts with the same learning rate, to tune all parts with a learning rate for each tensor
(Auto-RGN), and LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.model import IGNORE_INDEX
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.surgical import auto_rgn_weights, relative_gradient_norms, surgical_parameter_groups
from lora_from_scratch.pictures.digits import Pictures
from lora_from_scratch.pictures.training import classification_loss, pretrained_vit, train
from lora_from_scratch.pictures.vit import ViT, parts
from lora_from_scratch.support.wrapped import Wrapper

ALL, AUTO_RGN, LORA = "all", "Auto-RGN", "LoRA"
STEPS, BATCH_SIZE, EPOCH = 60, 10, 10  # total steps, pictures per step, steps between Auto-RGN's measurements


class OnePrediction(Wrapper):
    """A classifier with the interface of a language model that predicts one token after the first: the class."""

    def forward(self, pictures: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Map pictures (B, 8, 8) to logits (B, 2, C). Only the first position is used."""
        logits: Tensor = self.inside(pictures)
        return torch.stack([logits, logits], dim=1)


def as_text(data: Pictures) -> tuple[Tensor, Tensor, None]:
    """The pictures with labels (B, 2) for `next_token_loss`."""
    return data.pictures, torch.stack([torch.full_like(data.labels, IGNORE_INDEX), data.labels], dim=1), None


def choices(model: ViT) -> list[str]:
    """The choices: each part from the input to the output, then the three that tune the whole model."""
    return [*parts(model), ALL, AUTO_RGN, LORA]


def relative_norms(model: nn.Module, data: Pictures) -> dict[str, float]:
    """The `relative_gradient_norms` of a classifier on these pictures, computed in batches."""
    pieces = [data.rows(slice(i, i + BATCH_SIZE)) for i in range(0, len(data.labels), BATCH_SIZE)]
    norms = relative_gradient_norms(OnePrediction(model), map(as_text, pieces))
    return {name.removeprefix("inside."): norm for name, norm in norms.items()}


def relative_norm_of_parts(
    gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor], parts: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """The norm of each part's gradient relative to its weights: `||g|| / ||p||` (Lee et al. 2023, section 4).

    All tensors of a part together count as one long vector: g has the entries of all its gradients, p those of all its
    weights. A tensor without a gradient, because the loss does not depend on it, has a gradient of zeros.

    Args:
        gradients: name -> gradient of that tensor.
        weights: name -> tensor. There may be tensors that belong to no part.
        parts: part -> the names of its tensors.

    Returns:
        part -> its relative gradient norm, for every part.

    Raises:
        ValueError: all weights of a part are zero, so that its quotient is undefined.
    """
    found = {}
    for part, names in parts.items():
        p = torch.cat([weights[name].flatten() for name in names]).norm()
        g = torch.cat([gradients.get(name, torch.zeros_like(weights[name])).flatten() for name in names]).norm()
        if p == 0:
            raise ValueError(f"all weights of {part} are zero, so its gradient has no relative size")
        found[part] = float(g / p)
    return found


def adapt(choice: str, data: Pictures, learning_rate: float, *, steps: int = STEPS, seed: int = 0) -> ViT:
    """Adapt the pretrained classifier to pictures.

    Args:
        choice: one of `choices`.
        data: the pictures to train on.
        learning_rate: the learning rate of the tuned parameters; for Auto-RGN, that of the tensor with the largest
            relative gradient norm.
        steps: the number of training steps.
        seed: the seed of the batches and of LoRA's initialization.

    Returns:
        The adapted classifier.

    Raises:
        ValueError: `choice` is not one of `choices`.
    """
    model = pretrained_vit()
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "seed": seed}
    if choice == LORA:
        lora = LoRA(rank=4, alpha=8, seed=seed)
        lora.adapt(model)
        train(model, data, classification_loss, steps=steps, learning_rate=learning_rate, method=lora, **options)
    elif choice == AUTO_RGN:
        for start in range(0, steps, EPOCH):  # every epoch measures again and creates a new optimiser
            groups = surgical_parameter_groups(model, auto_rgn_weights(relative_norms(model, data)), learning_rate)
            groups = [{"params": group["params"], "lr": group["lr"]} for group in groups]
            options["seed"] = seed + 1000 * start
            some = min(EPOCH, steps - start)
            train(model, data, classification_loss, steps=some, learning_rate=1, groups=groups, **options)
    elif choice in choices(model):
        tuned = parts(model).get(choice)  # None: all
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(tuned is None or name in tuned)
        train(model, data, classification_loss, steps=steps, learning_rate=learning_rate, **options)
    else:
        raise ValueError(f"the choice must be one of {', '.join(choices(model))}, got {choice!r}")
    return model
