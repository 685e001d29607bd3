"""Unit 13, QLoRA: mistakes that people make with recomputing and with memory by pages, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.finetune.paged_optimizer import page_aligned

# --- CheckpointFunction ------------------------------------------------------------------------------


def remember(ctx: Any, function: Any, x: Any) -> Any:
    ctx.function, ctx.random_state = function, torch.get_rng_state()
    ctx.save_for_backward(x)
    return function(x)


@right("CheckpointFunction")
class PyTorchsOlderForm:
    @staticmethod
    def apply(function, x):
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=True)


@right("CheckpointFunction")
class StateByHand(torch.autograd.Function):
    """Puts the random numbers back itself; keeps x as an attribute."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.all = function, x.detach(), torch.get_rng_state()
        return function(x)

    @staticmethod
    def backward(ctx, grad_y):
        function, x, state = ctx.all
        now = torch.get_rng_state()
        copy = torch.empty_like(x).copy_(x).requires_grad_(True)
        try:
            torch.set_rng_state(state)
            with torch.enable_grad():
                product = (function(copy) * grad_y).sum()
        finally:
            torch.set_rng_state(now)
        torch.autograd.backward(product)
        return None, copy.grad


@wrong(
    "CheckpointFunction",
    "You record the first computation and go back through that. All its activations are kept, and nothing is saved.",
)
class KeepsTheGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x):
        ctx.x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.y = function(ctx.x)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad_y):
        ctx.y.backward(grad_y)
        return None, ctx.x.grad


@wrong(
    "CheckpointFunction",
    "Inside of `backward` PyTorch records nothing unless it is told to, so there is no graph to go back through.",
)
class NothingIsRecorded(torch.autograd.Function):
    forward = staticmethod(remember)

    @staticmethod
    def backward(ctx, grad_y):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.random_state)
            y = ctx.function(x)
        y.backward(grad_y)
        return None, x.grad


@wrong(
    "CheckpointFunction",
    "Your second graph hangs on the first one: going back through it runs on into what came before x. Begin at a copy "
    "that is cut off.",
)
class NotCutOff(torch.autograd.Function):
    forward = staticmethod(remember)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        x.retain_grad()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random_state)
            y = ctx.function(x)
        y.backward(grad_y)
        return None, x.grad


@wrong(
    "CheckpointFunction",
    "x gets its gradient, but the parameters that the function uses get none: they would never be trained.",
)
class OnlyTheGradientOfX(torch.autograd.Function):
    forward = staticmethod(remember)

    @staticmethod
    def backward(ctx, grad_y):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random_state)
            y = ctx.function(x)
        return None, *torch.autograd.grad(y, x, grad_y)


@wrong(
    "CheckpointFunction",
    "The function draws other random numbers the second time: its dropout is another one, and the gradient belongs to "
    "a y that nobody has seen.",
)
class OtherRandomNumbers(torch.autograd.Function):
    forward = staticmethod(remember)

    @staticmethod
    def backward(ctx, grad_y):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            y = ctx.function(x)
        y.backward(grad_y)
        return None, x.grad


@wrong(
    "CheckpointFunction",
    "The gradients are right, but after your backward pass the random numbers begin again where the forward pass "
    "stood: leave their state as you found it.",
)
class LeavesTheOldState(torch.autograd.Function):
    forward = staticmethod(remember)

    @staticmethod
    def backward(ctx, grad_y):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        torch.set_rng_state(ctx.random_state)
        with torch.enable_grad():
            y = ctx.function(x)
        y.backward(grad_y)
        torch.set_rng_state(ctx.random_state)
        return None, x.grad


@wrong(
    "CheckpointFunction",
    "You go back from the sum of y. What comes from above, dL/dy, has to go into it: y is not the loss.",
)
class IgnoresWhatComesFromAbove(torch.autograd.Function):
    forward = staticmethod(remember)

    @staticmethod
    def backward(ctx, grad_y):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random_state)
            y = ctx.function(x).sum()
        y.backward()
        return None, x.grad


@wrong("CheckpointFunction", "The gradients come in the order of the arguments of `apply`: the function is the first.")
class InTheOtherOrder(torch.autograd.Function):
    forward = staticmethod(remember)

    @staticmethod
    def backward(ctx, grad_y):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.set_rng_state(ctx.random_state)
            y = ctx.function(x)
        y.backward(grad_y)
        return x.grad, None


# --- Pages -------------------------------------------------------------------------------------------


class Released:
    """What most of the wrong ones do right."""

    mapping: mmap.mmap
    start: int
    length: int

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED, self.start, self.length)


def part(mapping: Any, like: Any, offset: int, numbers: int | None = None) -> Any:
    return torch.frombuffer(mapping, dtype=like.dtype, count=numbers or like.numel(), offset=offset).view(like.shape)


@right("Pages")
class TwoWindows(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start = mapping, start
        size = like.numel() * like.element_size()
        self.length = (2 * size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE
        self.m, self.v = part(mapping, like, start), part(mapping, like, start + size)


@right("Pages")
class ByNumpy(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        numbers = np.frombuffer(
            mapping, dtype=str(like.dtype).removeprefix("torch."), count=2 * like.numel(), offset=start
        )
        self.m, self.v = torch.from_numpy(numbers).reshape(2, *like.shape)


@wrong(
    "Pages",
    "m and v are tensors of their own. What is written into them never reaches the file, and the memory stays taken.",
)
class Copies(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        self.m, self.v = torch.zeros_like(like), torch.zeros_like(like)


@wrong("Pages", "m and v lie at the same place: who writes one overwrites the other.")
class AtTheSamePlace(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        self.m, self.v = part(mapping, like, start), part(mapping, like, start)


@wrong("Pages", "v comes first in your file, and m behind it.")
class InTheOtherOrderInTheFile(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        self.v, self.m = part(mapping, like, start), part(mapping, like, start + like.nbytes)


@wrong(
    "Pages",
    "Your m and v always lie at the beginning of the file, whatever `start` is. There all parameters would share one "
    "place.",
)
class AtTheBeginning(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        self.m, self.v = part(mapping, like, 0), part(mapping, like, like.nbytes)


@wrong("Pages", "v begins on a page of its own. It has to lie right behind m, or most of a page is wasted.")
class OnPagesOfTheirOwn(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        self.m, self.v = part(mapping, like, start), part(mapping, like, start + page_aligned(like.nbytes))


@wrong("Pages", "Your length has room for one of the two, and m and v both lie there.")
class RoomForOne(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(like.nbytes)
        self.m, self.v = part(mapping, like, start), part(mapping, like, start + like.nbytes)


@wrong("Pages", "Your length is not rounded up. Memory can only be given back in whole pages.")
class NotWholePages(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, 2 * like.nbytes
        self.m, self.v = part(mapping, like, start), part(mapping, like, start + like.nbytes)


@wrong(
    "Pages",
    "You release the whole file. The pages of the other parameters go with it, and have to come back for no reason.",
)
class ReleasesAll:
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        self.m, self.v = part(mapping, like, start), part(mapping, like, start + like.nbytes)

    def release(self):
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


@wrong(
    "Pages",
    "`release` takes nothing out of the memory. Writing to the disk is not enough: the pages stay until they are "
    "given back.",
)
class ReleasesNothing:
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        self.m, self.v = part(mapping, like, start), part(mapping, like, start + like.nbytes)

    def release(self):
        self.mapping.flush(self.start, self.length)


@wrong("Pages", "m and v are float32 whatever the parameter is.")
class AlwaysFloat32(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        like = like.float()
        self.m, self.v = part(mapping, like, start), part(mapping, like, start + like.nbytes)
