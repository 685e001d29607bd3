"""A second model whose modules can be replaced without changing the first."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def twin_of(model: M) -> M:
    """A copy of a model that shares the memory of its parameters and buffers, but has modules of its own."""
    parameters = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    buffers: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, {**parameters, **buffers})
