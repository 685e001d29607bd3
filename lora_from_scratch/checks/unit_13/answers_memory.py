"""Unit 13, QLoRA: mistakes that people make with recomputing and with memory by pages, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.finetune.gradient_checkpointing import CheckpointFunction
from lora_from_scratch.finetune.paged_optimizer import Pages, page_aligned

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
    """Restores the random state itself and keeps x as an attribute."""

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


@right("CheckpointFunction")
class PyTorchsNewerForm:
    @staticmethod
    def apply(function, x):
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)


@right("CheckpointFunction")
class ALeafMadeFirst(torch.autograd.Function):
    """Makes the leaf in the forward pass, and asks for the gradients of several tensors at once."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.leaf, ctx.run = x.detach().requires_grad_(), function
        ctx.generator = torch.Generator()
        ctx.generator.set_state(torch.default_generator.get_state())
        with torch.no_grad():
            return ctx.run(x)

    @staticmethod
    def backward(ctx, grad_y):
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(ctx.generator.get_state())
        torch.set_grad_enabled(True)
        y = ctx.run(ctx.leaf)
        torch.autograd.backward((y,), (grad_y,), inputs=None)
        torch.set_grad_enabled(False)
        torch.default_generator.set_state(before)
        return None, ctx.leaf.grad


@wrong("CheckpointFunction", "You keep y as well. The backward pass computes it again; keep only x.")
@changed(CheckpointFunction, ("return function(x)", "ctx.y = function(x)\n        return ctx.y.clone()"))
class KeepsTheOutput: ...


@wrong("CheckpointFunction", "You compute the function twice in the backward pass. Once is enough.")
@changed(
    CheckpointFunction,
    ("y = ctx.function(x)", "y = (ctx.function(x), torch.set_rng_state(ctx.random_state), ctx.function(x))[2]"),
)
class ThreeTimes: ...


@wrong(
    "CheckpointFunction",
    "You return no gradient for x. What comes before this function would never be trained.",
)
@changed(CheckpointFunction, ("return None, x.grad", "return None, None"))
class NoGradientOfX: ...


@wrong(
    "CheckpointFunction",
    "You record the first computation and go back through that graph. All its activations are kept, and no memory is "
    "saved.",
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
    "Inside `backward`, PyTorch does not record a graph unless it is told to, so there is no graph to go back through.",
)
@changed(CheckpointFunction, (", torch.enable_grad():", ":"))
class NothingIsRecorded: ...


@wrong(
    "CheckpointFunction",
    "Your second graph is connected to the first one: its backward pass continues into what came before x. Start from "
    "a detached copy.",
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
@changed(
    CheckpointFunction, ("y.backward(grad_y)", "(grad_x,) = torch.autograd.grad(y, x, grad_y)"), ("x.grad", "grad_x")
)
class OnlyTheGradientOfX: ...


@wrong(
    "CheckpointFunction",
    "The function draws different random numbers the second time: its dropout mask differs, and the gradient belongs "
    "to a y that was never returned.",
)
@changed(CheckpointFunction, ("torch.set_rng_state(ctx.random_state)", ""))
class OtherRandomNumbers: ...


@wrong(
    "CheckpointFunction",
    "The gradients are right, but after your backward pass the state of the random number generator is another than "
    "before it: leave it as you found it.",
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
    "You start the backward pass from the sum of y. Use dL/dy, the incoming gradient: y is not the loss.",
)
@changed(CheckpointFunction, ("ctx.function(x)", "ctx.function(x).sum()"), ("backward(grad_y)", "backward()"))
class IgnoresWhatComesFromAbove: ...


@wrong(
    "CheckpointFunction", "The gradients must be in the order of the arguments of `apply`: the function comes first."
)
@changed(CheckpointFunction, ("None, x.grad", "x.grad, None"))
class InTheOtherOrder: ...


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


@right("Pages")
class SlicesOfTheBytes(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        size = like.nbytes
        all_bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        self.m, self.v = (
            all_bytes[place : place + size].view(like.dtype).reshape(like.shape) for place in (start, start + size)
        )


@right("Pages")
class AMemoryviewOfTheFile(Released):
    def __init__(self, mapping, start, like):
        window = memoryview(mapping)[start : start + 2 * like.nbytes]
        numbers = torch.frombuffer(window, dtype=like.dtype).unflatten(0, (2, like.numel()))
        self.m, self.v = (numbers[i].view(like.size()) for i in range(2))
        self.length = -(-len(window) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.mapping, self.start = mapping, start


@wrong("Pages", "Where the module `mmap` has no MADV_DONTNEED, `release` must do nothing; yours raises an error.")
@changed(Pages, ('if hasattr(mmap, "MADV_DONTNEED"):', "if True:"))
class OnEverySystem: ...


@wrong("Pages", "Your length is counted in numbers. It is in bytes: multiply by the size of one number.")
@changed(Pages, ("page_aligned(2 * like.nbytes)", "page_aligned(2 * like.numel())"))
class CountsNumbers: ...


@wrong(
    "Pages", "You always take one page more than is needed: where m and v fill pages exactly, nothing is to be added."
)
@changed(Pages, ("page_aligned(2 * like.nbytes)", "page_aligned(2 * like.nbytes + 1)"))
class OnePageTooMany: ...


@wrong(
    "Pages",
    "m and v are separate tensors. What is written into them never reaches the file, and they stay in memory.",
)
class Copies(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        self.m, self.v = torch.zeros_like(like), torch.zeros_like(like)


@wrong("Pages", "m and v are in the same place: writing one overwrites the other.")
class AtTheSamePlace(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        self.m, self.v = part(mapping, like, start), part(mapping, like, start)


@wrong("Pages", "In your file v comes first and m second.")
@changed(Pages, ("self.m, self.v = ", "self.v, self.m = "))
class InTheOtherOrderInTheFile: ...


@wrong(
    "Pages",
    "Your m and v are always at the start of the file, whatever `start` is. All parameters would then share one place.",
)
@changed(Pages, ("offset=start", "offset=0"))
class AtTheBeginning: ...


@wrong("Pages", "Your v starts on a new page. It has to come right after m, or most of a page is wasted.")
class OnPagesOfTheirOwn(Released):
    def __init__(self, mapping, start, like):
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        self.m, self.v = part(mapping, like, start), part(mapping, like, start + page_aligned(like.nbytes))


@wrong("Pages", "Your length has room for only one of the two, but both m and v are there.")
@changed(Pages, ("page_aligned(2 * like.nbytes)", "page_aligned(like.nbytes)"))
class RoomForOne: ...


@wrong("Pages", "Your length is not rounded up. Memory can only be released in whole pages.")
@changed(Pages, ("page_aligned(2 * like.nbytes)", "2 * like.nbytes"))
class NotWholePages: ...


@wrong(
    "Pages",
    "You release the whole file. The pages of the other parameters are released too, and have to be loaded again for "
    "no reason.",
)
@changed(Pages, ("DONTNEED, self.start, self.length)", "DONTNEED)"))
class ReleasesAll: ...


@wrong(
    "Pages",
    "`release` does not free any memory. Writing to the disk is not enough: the pages stay in memory until they are "
    "released.",
)
@changed(Pages, ("madvise(mmap.MADV_DONTNEED, self", "flush(self"))
class ReleasesNothing: ...


@wrong("Pages", "m and v are float32 whatever the dtype of the parameter.")
@changed(Pages, ("dtype=like.dtype", "dtype=torch.float32"))
class AlwaysFloat32: ...
