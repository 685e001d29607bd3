"""Unit 18: training loops on which the learner's test is tried, sound ones and faulty ones.

They use nothing of the exercises, whose solutions are missing where submissions are graded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F


def backward(model: Any, batch: Any) -> torch.Tensor:
    loss = F.mse_loss(model(batch[0]), batch[1])
    loss.backward()
    return loss


# --- Sound ---


def cleared_at_the_end(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches, start=1):
        backward(model, batch)
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()


def cleared_at_the_beginning(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches, start=1):
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
        model.update_and_allocate(step)


def set_to_zero(model: Any, batches: Any, optimizer: Any) -> None:
    for step in range(1, len(batches) + 1):
        backward(model, batches[step - 1])
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad(set_to_none=False)


def with_a_closure(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches, start=1):

        def closure(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            return backward(model, batch)

        optimizer.step(closure)
        model.update_and_allocate(step)


def with_an_evaluation(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches, start=1):
        model.train()
        backward(model, batch)
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            F.mse_loss(model(batch[0]), batch[1])


# --- Faulty ---


def never(model: Any, batches: Any, optimizer: Any) -> None:
    """The fault of the museum."""
    for batch in batches:
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()


def once_at_the_end(model: Any, batches: Any, optimizer: Any) -> None:
    for batch in batches:
        optimizer.zero_grad()
        backward(model, batch)
        optimizer.step()
    model.update_and_allocate(len(batches))


def every_second_step(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches, start=1):
        backward(model, batch)
        optimizer.step()
        if step % 2 == 1:
            model.update_and_allocate(step)
        optimizer.zero_grad()


def not_in_the_last_step(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches, start=1):
        backward(model, batch)
        optimizer.step()
        if step < len(batches):
            model.update_and_allocate(step)
        optimizer.zero_grad()


def twice(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches, start=1):
        backward(model, batch)
        optimizer.step()
        model.update_and_allocate(step)
        model.update_and_allocate(step)
        optimizer.zero_grad()


def counted_from_0(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches):
        backward(model, batch)
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()


def the_number_of_all_steps(model: Any, batches: Any, optimizer: Any) -> None:
    for batch in batches:
        backward(model, batch)
        optimizer.step()
        model.update_and_allocate(len(batches))
        optimizer.zero_grad()


def always_1(model: Any, batches: Any, optimizer: Any) -> None:
    for batch in batches:
        backward(model, batch)
        optimizer.step()
        model.update_and_allocate(1)
        optimizer.zero_grad()


def gradients_are_none(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches, start=1):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        model.update_and_allocate(step)


def gradients_are_zero(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches, start=1):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        model.update_and_allocate(step)


def gradients_are_there_once(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches, start=1):
        backward(model, batch)
        optimizer.step()
        if step > 1:
            optimizer.zero_grad()
        model.update_and_allocate(step)
        optimizer.zero_grad()


def before_the_step(model: Any, batches: Any, optimizer: Any) -> None:
    for step, batch in enumerate(batches, start=1):
        backward(model, batch)
        model.update_and_allocate(step)
        optimizer.step()
        optimizer.zero_grad()


SOUND: dict[str, Callable[..., None]] = {
    "the gradients are cleared at the end of a step": cleared_at_the_end,
    "the gradients are cleared at the beginning of a step": cleared_at_the_beginning,
    "the gradients are set to zero instead of None": set_to_zero,
    "the optimiser's step gets a closure": with_a_closure,
    "the model is evaluated after each step": with_an_evaluation,
}
FAULTY: dict[str, Callable[..., None]] = {
    "the allocation is never called": never,
    "the allocation is called once, after all steps": once_at_the_end,
    "the allocation is called in every second step": every_second_step,
    "the allocation is not called in the last step": not_in_the_last_step,
    "the allocation is called twice in each step": twice,
    "the steps are counted from 0": counted_from_0,
    "every call gets the number of all steps": the_number_of_all_steps,
    "every call gets the number 1": always_1,
    "the gradients are set to None before the call": gradients_are_none,
    "the gradients are set to zero before the call": gradients_are_zero,
    "the gradients are set to None before the call, except in the first step": gradients_are_there_once,
    "the optimiser takes its step after the call": before_the_step,
}
LOOPS = SOUND | FAULTY
