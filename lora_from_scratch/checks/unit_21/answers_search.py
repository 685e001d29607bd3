"""Unit 21: mistakes that people make, and other right ways. The search for a prompt of real tokens."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.pez import hard_prompt_search


def nearest(prompt, table):
    return (F.normalize(prompt.detach(), dim=1) @ F.normalize(table, dim=1).T).argmax(dim=1)


@right("hard_prompt_search")
def straight_through(loss_of, prompt, table, steps, optimizer):
    """The value of E with the gradient of P."""
    results = []
    for _ in range(steps):
        tokens = nearest(prompt, table)
        loss = loss_of(table[tokens].detach() + prompt - prompt.detach())
        results.append((loss.item(), len(results), tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss, _, tokens = min(results)
    return tokens, loss


@right("hard_prompt_search")
def one_row_after_the_other(loss_of, prompt, table, steps, optimizer):
    best = None
    for _ in range(steps):
        tokens = []
        for row in prompt.detach():
            cosines = [float(torch.cosine_similarity(row, other, dim=0)) for other in table]
            tokens.append(cosines.index(max(cosines)))
        E = torch.stack([table[t].clone() for t in tokens]).requires_grad_(True)
        loss = loss_of(E)
        loss.backward()
        if best is None or float(loss.detach()) < best[1]:
            best = torch.tensor(tokens), float(loss.detach())
        prompt.grad = E.grad.clone()
        optimizer.step()
    return best


@right("hard_prompt_search")
def nearest_in_numpy(loss_of, prompt, table, steps, optimizer):
    directions = table.numpy() / np.linalg.norm(table.numpy(), axis=1, keepdims=True)
    losses, prompts = [], []
    while len(losses) < steps:
        tokens = torch.from_numpy((prompt.detach().numpy() @ directions.T).argmax(axis=1))
        E = torch.nn.Parameter(table[tokens].clone())
        loss = loss_of(E)
        prompts.append(tokens)
        losses.append(loss.item())
        prompt.grad = torch.autograd.grad(loss, [E])[0]
        optimizer.step()
    best = int(np.argmin(losses))
    return prompts[best], losses[best]


class NearestEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(context, prompt, table):
        return table[nearest(prompt, table)]

    @staticmethod
    def backward(context, gradient):
        return gradient, None


@right("hard_prompt_search")
def with_a_gradient_of_ones_own(loss_of, prompt, table, steps, optimizer):
    found = {}
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(NearestEmbedding.apply(prompt, table))
        found[step] = (nearest(prompt, table), loss.item())
        loss.backward()
        optimizer.step()
    return min(found.values(), key=lambda one: one[1])


@wrong("hard_prompt_search", "You return the last prompt. The best one may have come before it.")
@changed(hard_prompt_search, ("min(seen, key=lambda one: one[1])", "seen[-1]"))
def the_last(): ...


@wrong("hard_prompt_search", "You keep the prompt with the highest loss.")
@changed(hard_prompt_search, ("min(seen,", "max(seen,"))
def the_worst(): ...


@wrong(
    "hard_prompt_search",
    "The loss and its gradient are computed at P. That is prompt tuning, and its result is rounded to tokens only "
    "when it is returned.",
)
def a_soft_prompt_rounded(loss_of, prompt, table, steps, optimizer):
    best, lowest = None, math.inf
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(prompt)
        if loss.item() < lowest:
            best, lowest = nearest(prompt, table), loss.item()
        loss.backward()
        optimizer.step()
    return best, lowest


@wrong(
    "hard_prompt_search",
    "The step starts at E: P is replaced by its nearest embeddings each time. Then small steps never add up, and the "
    "prompt stays where it is.",
)
def P_is_replaced(loss_of, prompt, table, steps, optimizer):
    best, lowest = None, math.inf
    for _ in range(steps):
        tokens = nearest(prompt, table)
        with torch.no_grad():
            prompt.copy_(table[tokens])
        E = prompt.detach().clone().requires_grad_()
        loss = loss_of(E)
        if loss.item() < lowest:
            best, lowest = tokens, loss.item()
        prompt.grad = torch.autograd.grad(loss, E)[0]
        optimizer.step()
    return best, lowest


@wrong("hard_prompt_search", "The gradients add up from step to step: start each step without the last one's.")
@changed(
    hard_prompt_search,
    (
        "(prompt.grad,) = torch.autograd.grad(loss, E)",
        "prompt.grad = torch.autograd.grad(loss, E)[0] + (0 if prompt.grad is None else prompt.grad)",
    ),
)
def gradients_add_up(): ...


@wrong("hard_prompt_search", "The nearest token is chosen by the dot product, which favours long embeddings.")
def by_the_dot_product(loss_of, prompt, table, steps, optimizer):
    return with_distance(loss_of, prompt, table, steps, optimizer, lambda P: (P @ table.T).argmax(dim=1))


@wrong("hard_prompt_search", "The nearest token is chosen by the distance. What counts is the cosine.")
def by_the_distance(loss_of, prompt, table, steps, optimizer):
    return with_distance(loss_of, prompt, table, steps, optimizer, lambda P: torch.cdist(P, table).argmin(dim=1))


def with_distance(loss_of, prompt, table, steps, optimizer, choose):
    best, lowest = None, math.inf
    for _ in range(steps):
        tokens = choose(prompt.detach())
        E = table[tokens].clone().requires_grad_()
        loss = loss_of(E)
        if loss.item() < lowest:
            best, lowest = tokens, loss.item()
        prompt.grad = torch.autograd.grad(loss, E)[0]
        optimizer.step()
    return best, lowest


@wrong("hard_prompt_search", "The loss belongs to the tokens before the step; you keep those after it.")
@changed(
    hard_prompt_search,
    ("        seen.append((tokens, loss.item()))\n", ""),
    (
        "        optimizer.step()",
        "        optimizer.step()\n        seen.append((nearest_tokens(prompt.detach(), table), loss.item()))",
    ),
)
def the_tokens_after_the_step(): ...


@wrong("hard_prompt_search", "P never changes: the optimiser takes no step, or has no gradient to take it with.")
@changed(hard_prompt_search, ("        optimizer.step()\n", ""))
def without_a_step(): ...


@wrong("hard_prompt_search", "You change P against the gradient's sign, or by plain descent. The optimiser changes P.")
def by_hand(loss_of, prompt, table, steps, optimizer):
    best, lowest = None, math.inf
    for _ in range(steps):
        tokens = nearest(prompt, table)
        E = table[tokens].clone().requires_grad_()
        loss = loss_of(E)
        if loss.item() < lowest:
            best, lowest = tokens, loss.item()
        with torch.no_grad():
            prompt -= optimizer.param_groups[0]["lr"] * torch.autograd.grad(loss, E)[0]
    return best, lowest


@wrong("hard_prompt_search", "Of equally good prompts you return the last one; the first is wanted.")
@changed(hard_prompt_search, ("min(seen,", "min(reversed(seen),"))
def the_last_of_equals(): ...


@wrong("hard_prompt_search", "You take one step fewer than `steps`.")
@changed(hard_prompt_search, ("range(steps)", "range(1, steps)"))
def one_step_fewer(): ...


@wrong(
    "hard_prompt_search", "You compute the loss twice in a step. A comparison with other searches counts these calls."
)
@changed(hard_prompt_search, ("(tokens, loss.item())", "(tokens, loss_of(E).item())"))
def two_calls_in_a_step(): ...


@wrong("hard_prompt_search", "You return embeddings. What is wanted are the ids of the tokens.")
def the_embeddings(loss_of, prompt, table, steps, optimizer):
    tokens, loss = hard_prompt_search(loss_of, prompt, table, steps, optimizer)
    return table[tokens], loss


@wrong("hard_prompt_search", "You return the loss of the last prompt with the tokens of the best one.")
@changed(
    hard_prompt_search,
    ("return min(seen, key=lambda one: one[1])", "return min(seen, key=lambda one: one[1])[0], loss.item()"),
)
def the_last_loss(): ...


@wrong("hard_prompt_search", "You return the tokens alone. Their loss is wanted too.")
def the_tokens_alone(loss_of, prompt, table, steps, optimizer):
    return hard_prompt_search(loss_of, prompt, table, steps, optimizer)[0]
