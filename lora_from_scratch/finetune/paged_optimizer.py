"""AdamW with its state in a file (Dettmers et al. 2023, QLoRA, section 3, "Paged Optimizers").

Adam keeps two numbers for every parameter, m and v: twice the memory of the trained parameters. They are needed only
while their own parameter is updated, so they can be stored elsewhere and loaded for one parameter at a time.

QLoRA uses CUDA's unified memory for this: the GPU's driver moves pages of m and v between GPU memory and main memory,
only when GPU memory runs out. This module does the same between main memory and disk, with a memory-mapped file. The
pages of a parameter are loaded when they are accessed and released after the update.

There are three differences. Every step moves all of m and v, not only when memory runs out. If the parameters are on a
GPU, m and v are copied to it and back. And released pages stay in the system's file cache until the memory is needed,
so on a machine with free memory the file is rarely read from disk.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")  # m and v, under PyTorch's names


class PagedAdamW(torch.optim.Optimizer):
    """Equal to `torch.optim.AdamW` bit for bit, with m and v in memory-mapped files.

    `state_dict` has AdamW's layout, so either optimiser can resume from the other's state.

    Args:
        parameters: parameters or parameter groups, as for any optimiser.
        lr, betas, eps, weight_decay: as in AdamW, with its defaults.
        directory: where to put the files. It should be on a disk: a folder in memory, as /tmp is on some systems, saves
            nothing. None: the system's temporary folder. The files have no name and vanish with the process.

    Raises:
        ValueError: a number is out of range.
        OSError: there is no such directory, or not enough space in it; all the space is allocated at the start.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        directory: str | Path | None = None,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {betas}")
        self.directory = directory
        self.pages: dict[nn.Parameter, Pages] = {}
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Create a file for the m and v of a parameter group, all zeros. The constructor calls it for each group."""
        super().add_param_group(param_group)
        parameters = self.param_groups[-1]["params"]
        for p, pages in zip(parameters, allocate(parameters, self.directory), strict=True):
            self.pages[p] = pages
            self.state[p] = self._fresh_state(pages)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, one at a time."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] += 1
                m, v = (state[name].to(p.device) for name in MOMENTS)  # loads the pages; on a CPU this makes no copy
                options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
                update_in_place(p, p.grad, m, v, int(state["step"]), **options)
                for name, moment in zip(MOMENTS, (m, v), strict=True):
                    if moment is not state[name]:  # a copy on another device
                        state[name].copy_(moment)
                self.pages[p].release()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of another PagedAdamW or AdamW; m and v are written directly to the files.

        Raises:
            ValueError: the groups, or the shapes of m and v, do not match this optimiser's parameters.
        """
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        moments = state_dict["state"]  # AdamW's is empty before the first step
        for place, p in zip(places, parameters, strict=False):
            if place in moments and moments[place]["exp_avg"].shape != p.shape:
                raise ValueError(
                    f"the state of parameter {place} has shape {tuple(moments[place]['exp_avg'].shape)}, but the "
                    f"parameter has {tuple(p.shape)}: the state belongs to another model"
                )
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for place, p in zip(places, parameters, strict=True):
            self.state[p] = state = self._fresh_state(self.pages[p])
            for name in MOMENTS:
                state[name].copy_(moments[place][name] if place in moments else torch.zeros(()))
            if place in moments:
                state["step"] = torch.tensor(float(moments[place]["step"]))
            self.pages[p].release()

    @staticmethod
    def _fresh_state(pages: Pages) -> dict[str, Tensor]:
        return {"step": torch.tensor(0.0), "exp_avg": pages.m, "exp_avg_sq": pages.v}


def update_in_place(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """The update of `finetune.adamw.adamw_step`, in place and in the order of PyTorch's operations.

    It works in place because m and v are in a file, and in this order to equal PyTorch's result bit for bit.

    Args:
        p, grad, m, v: tensors of the same shape.
        step: t, from 1.
    """
    beta1, beta2 = betas
    p.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - beta1)  # m = beta1 m + (1 - beta1) g
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)  # v = beta2 v + (1 - beta2) g^2
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step  # bias correction: m and v started at 0
    denominator = (v.sqrt() / correction2**0.5).add_(eps)
    p.addcdiv_(m, denominator, value=-(lr / correction1))  # p = p - lr m' / (sqrt(v') + eps)


# --- The files -------------------------------------------------------------------------------------


class Pages:
    """The m and v of one parameter, on the CPU, stored in a part of a memory-mapped file.

    - `Pages(mapping, start, like)`: m starts at byte `start` of the file and v follows it immediately, both in the
      shape and dtype of the parameter `like`. They are the attributes `m` and `v`, tensors that share the file's
      memory: writing to them changes the file, and vice versa (`torch.frombuffer` makes such a tensor). `length` is
      the number of bytes that they take in the file, rounded up to whole pages (`page_aligned`).
    - `release()`: releases these `length` bytes, and no others, from the process's memory; what was written stays in
      the file and is loaded again when it is accessed. This is `mapping.madvise(mmap.MADV_DONTNEED, start, length)`,
      which requires whole pages. On Windows, where the module `mmap` has no MADV_DONTNEED, it does nothing.

    Args:
        mapping: `mmap.mmap`, with room for `length` bytes from `start`.
        start: a multiple of the page size.
        like: a tensor of any shape and dtype, with at least one element. Its values do not matter.
    """

    def __init__(self, mapping: mmap.mmap, start: int, like: Tensor) -> None:
        self.mapping, self.start, self.length = mapping, start, page_aligned(2 * like.nbytes)
        both = torch.frombuffer(mapping, dtype=like.dtype, count=2 * like.numel(), offset=start)
        self.m, self.v = (half.view(like.shape) for half in both.chunk(2))

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED, self.start, self.length)


def allocate(parameters: list[nn.Parameter], directory: str | Path | None) -> list[Pages]:
    """Create one unnamed file, filled with zeros, for the m and v of these parameters."""
    starts = [0]
    for p in parameters:
        starts.append(starts[-1] + page_aligned(2 * p.nbytes))
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            _reserve_space(file.fileno(), starts[-1])
            mapping = mmap.mmap(file.fileno(), starts[-1])
    except OSError as error:
        place = tempfile.gettempdir() if directory is None else directory
        raise OSError(
            f"cannot keep {starts[-1]:,} bytes of optimiser state in a file in {place}: {error.strerror}"
        ) from None
    return [Pages(mapping, start, p) for p, start in zip(parameters, starts, strict=False)]


def _reserve_space(file: int, size: int) -> None:
    """Extend a file to `size` bytes and allocate them now: running out of disk later would be a crash (SIGBUS)."""
    os.ftruncate(file, size)
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        os.posix_fallocate(file, 0, size)


def page_aligned(size: int) -> int:
    """`size` rounded up to a multiple of the page size: only whole pages can be released."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
