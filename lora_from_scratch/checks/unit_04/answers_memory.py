"""Unit 04, full fine-tuning, memory: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import right, wrong

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


@right("trainable_memory")
def measured_on_the_optimiser(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained or [torch.nn.Parameter(torch.zeros(0))], foreach=False)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return both(sum(p.grad.nbytes for p in trained), sum(tensor.nbytes for tensor in states))


@right("trainable_memory")
def module_by_module(model):
    gradients, tensors, seen = 0, 0, set()
    for module in model.modules():
        for p in vars(module)["_parameters"].values():
            if p is not None and p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                gradients, tensors = gradients + p.nbytes, tensors + 1
    return both(gradients, 2 * gradients + 4 * tensors)


@wrong(
    "trainable_memory",
    "You take the number of bytes of one parameter for all of them. Each has a dtype of its own.",
)
def the_dtype_of_the_first(model):
    size = next(model.parameters()).element_size() * sum(p.numel() for p in learning(model))
    return both(size, 2 * size + 4 * len(learning(model)))


@wrong("trainable_memory", "You count frozen parameters as well: they have no gradient, and the optimiser skips them.")
def counts_the_frozen(model):
    size = sum(p.nbytes for p in model.parameters())
    return both(size, 2 * size + 4 * len(list(model.parameters())))


@wrong("trainable_memory", "The optimiser's part is right, but a frozen parameter has no gradient either.")
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


@wrong("trainable_memory", "The step counter, which the optimiser keeps in addition to m and v, is missing.")
def without_the_counter(model):
    size = sum(p.nbytes for p in learning(model))
    return both(size, 2 * size)


@wrong("trainable_memory", "The optimiser keeps a step counter for every tensor; you count one for the whole model.")
def one_counter_for_all(model):
    size = sum(p.nbytes for p in learning(model))
    return both(size, 2 * size + (4 if size else 0))


@wrong("trainable_memory", "You count a step counter for every entry of a tensor. There is only one for each tensor.")
def a_counter_for_each_number(model):
    size = sum(p.nbytes for p in learning(model))
    return both(size, 2 * size + 4 * sum(p.numel() for p in learning(model)))


@wrong(
    "trainable_memory",
    "You always count 4 bytes per number. Not every model is in float32: use the dtype of each parameter.",
)
def always_float32(model):
    size = 4 * sum(p.numel() for p in learning(model))
    return both(size, 2 * size + 4 * len(learning(model)))


@wrong(
    "trainable_memory",
    "You keep m and v in float32. PyTorch's AdamW creates them in the dtype of the parameter, whatever that is.",
)
def state_in_float32(model):
    trained = learning(model)
    return both(sum(p.nbytes for p in trained), 8 * sum(p.numel() for p in trained) + 4 * len(trained))


@wrong("trainable_memory", "The step counter is a float32 number, whatever the parameter's dtype.")
def counter_in_the_dtype(model):
    trained = learning(model)
    size = sum(p.nbytes for p in trained)
    return both(size, 2 * size + sum(p.element_size() for p in trained))


@wrong("trainable_memory", "You return how many numbers there are, not how many bytes.")
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


@wrong(
    "trainable_memory",
    "You count the weights as well. They take memory whether they are trained or not, and are not asked for here.",
)
def weights_as_well(model):
    size = sum(p.nbytes for p in learning(model))
    return both(2 * size, 2 * size + 4 * len(learning(model)))


@wrong("trainable_memory", "You leave out the biases: small as they are, they have gradients just like the matrices.")
def only_matrices_count(model):
    trained = [p for p in learning(model) if p.ndim >= 2]
    size = sum(p.nbytes for p in trained)
    return both(size, 2 * size + 4 * len(trained))


@wrong("trainable_memory", caught_by="another type")
def the_sum(model):
    return 3 * sum(p.nbytes for p in learning(model)) + 4 * len(learning(model))
