"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174, section 4): compute twice what you have no room to keep.

`GPT2` uses PyTorch's own (`torch.utils.checkpoint`, with `use_reentrant=False`), which also knows of autocast and of
functions with many arguments. This is its idea, for one argument, in the older of its two forms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CheckpointFunction(torch.autograd.Function):
    """`y = function(x)`, of which nothing is kept for the backward pass but x. There, it is computed once more.

    `CheckpointFunction.apply(function, x)` calls `forward`, and later PyTorch calls `backward`, with the same `ctx`:

    - `forward`: returns `function(x)`. PyTorch runs it without recording anything, so no activation is kept.
    - `backward`: grad_y = dL/dy, in the shape of y. It computes `function(x)` again, this time recorded (gradients
      have to be enabled), and goes back through that. The parameters that `function` uses get their gradients there
      (added to `.grad`, as by any backward pass). Returns None for the function, and dL/dx.

    Both times the function sees the same random numbers, or its dropout would be another one: `ctx` keeps the state of
    PyTorch's random numbers too. The backward pass leaves that state as it finds it.

    x is whatever tensor was given, perhaps a part of a larger graph; the second computation begins at a copy that is
    cut off from it.
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
