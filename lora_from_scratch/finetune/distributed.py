"""The device to train on, and training in several processes (`torchrun`).

The model is not wrapped; the gradients are summed over the processes.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of processes; (0, 1) for a single process."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Join the process group that `torchrun` started (it sets WORLD_SIZE and RANK), if there is one."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), size)

    def all_reduce(self, tensors: list[Tensor]) -> None:
        """Replace each tensor with its sum over the processes, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)


def find_device(name: str) -> torch.device:
    """The device of this name: "cpu", "cuda" (under `torchrun`, one GPU per process), "cuda:1", or "auto".

    Raises:
        ValueError: the name is none of these, or PyTorch finds no such GPU.
    """
    if name not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"unknown device {name!r}; give cpu, cuda, cuda:0, cuda:1, ... or auto")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    if not gpus:
        raise ValueError(f"device {name} was requested, but PyTorch finds no GPU here; use --device cpu")
    index = int(name.partition(":")[2] or os.environ.get("LOCAL_RANK", "0"))
    if index >= gpus:
        raise ValueError(f"device cuda:{index} was requested, but the GPUs here are cuda:0 to cuda:{gpus - 1}")
    return torch.device("cuda", index)
