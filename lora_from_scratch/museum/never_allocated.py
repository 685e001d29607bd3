"""A training loop that never calls AdaLoRA's allocation, so that it trains at a fixed rank.

In PEFT (0.21.2) the choice of triplets is a method of the adapted model, `update_and_allocate(step)`, which a training
loop has to call after the optimiser's step and before the gradients are cleared. The `Trainer` of transformers does not
call it, and neither do other libraries' (PEFT's issues 432, 1327 and 1801). Nothing fails: the run is one of LoRA with
the rank of the beginning. In `lora_from_scratch.methods.adalora` the method's own hook, `after_step`, allocates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batches = Sequence[tuple[Tensor, Tensor]]


def faulty_train(model: Any, batches: Batches, optimizer: torch.optim.Optimizer) -> None:
    """One step for each batch (x, y), with the mean squared error."""
    model.train()
    for x, y in batches:
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def train(model: Any, batches: Batches, optimizer: torch.optim.Optimizer) -> None:
    """The same with the allocation: it needs this step's gradients, and the optimiser must not undo it."""
    model.train()
    for step, (x, y) in enumerate(batches, start=1):
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()


def test_train(train: Callable[..., Any]) -> None:
    """A test of a `train`, in the manner of pytest: an AssertionError if the loop does not allocate as it should.

    - A sound loop passes, wherever in a step it clears the gradients, and whether it sets them to None or to zero.
    - A loop fails if it does not call `model.update_and_allocate` exactly once in each step.
    - A loop fails if it gives it anything but the number of the step, counted from 1.
    - A loop fails if the gradients of the step are not there during the call: they are None or zero.
    - A loop fails if the optimiser takes its step after the call, and not before it.

    Args:
        train: is called as `train(model, batches, optimizer)`. The model is any module that has a method
            `update_and_allocate(step)`; the batches are a list of pairs (x, y), one for each step; the loss is the mean
            squared error of `model(x)`. It returns nothing.
    """
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    steps: list[Any] = []
    with_gradients: list[bool] = []
    weights = [model.weight.detach().clone()]

    def update_and_allocate(step: Any) -> None:
        steps.append(step)
        gradient = model.weight.grad
        with_gradients.append(gradient is not None and bool(gradient.any()))
        weights.append(model.weight.detach().clone())

    model.update_and_allocate = update_and_allocate  # type: ignore[assignment]
    train(
        model, [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(5)], torch.optim.SGD(model.parameters(), lr=0.1)
    )
    called = steps == [1, 2, 3, 4, 5]
    assert called, f"in five steps it is called with {steps}"
    there = all(with_gradients)
    assert there, "the gradients are gone when it is called"
    before = not torch.equal(weights[0], weights[1])
    assert before, "it is called before the optimiser's step"
