"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174, section 4): recompute activations, do not store them.

`GPT2` uses PyTorch's implementation (`torch.utils.checkpoint`, with `use_reentrant=False`), which also supports
autocast and functions of several arguments. This module shows the idea for one argument, in the older, reentrant form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CheckpointFunction(torch.autograd.Function):
    """`y = function(x)`, keeping only x for the backward pass, where the function is computed again.

    `CheckpointFunction.apply(function, x)` calls `forward`, and later PyTorch calls `backward`, with the same `ctx`:

    - `forward`: returns `function(x)`. PyTorch runs it without recording anything, so no activation is kept.
    - `backward`: grad_y = dL/dy, in the shape of y. It computes `function(x)` again, this time recorded (gradients
      must be enabled), and backpropagates through that. This is where the parameters that `function` uses get their
      gradients (added to `.grad`, as in any backward pass). Returns None for the function, and dL/dx.

    The function must see the same random numbers both times, or its dropout masks would differ: `ctx` also keeps the
    state of PyTorch's random number generator. The backward pass leaves that state unchanged.

    x may be part of a larger graph; the second computation starts from a detached copy of it.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function, ctx.random_state = function, torch.get_rng_state()
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random_state)
            y = ctx.function(x)
        y.backward(grad_y)
        return None, x.grad
