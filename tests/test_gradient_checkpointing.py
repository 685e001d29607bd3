"""Gradient checkpointing: PyTorch's own gradients, bit for bit, and nothing kept but the input."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lora_from_scratch.finetune.gradient_checkpointing import CheckpointFunction


def two_parts(dropout: float) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    make = [nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Dropout(dropout), nn.Linear(20, 6)) for _ in range(2)]
    return make[0], make[1]


def gradients(how: str, dropout: float) -> tuple[list[Tensor], Tensor]:
    """Of x and of all parameters, and what the random numbers are afterwards."""
    first, second = two_parts(dropout)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    h = 2 * x
    for part in (first, second):
        if how == "ours":
            h = CheckpointFunction.apply(part, h)
        elif how == "PyTorch's":
            h = torch.utils.checkpoint.checkpoint(part, h, use_reentrant=False)
        else:
            h = part(h)
    torch.rand(3)  # the state of the random numbers has moved on when the backward pass begins
    h.square().sum().backward()
    assert x.grad is not None
    found = [p.grad for part in (first, second) for p in part.parameters()]
    assert all(g is not None for g in found)
    return [x.grad, *found], torch.rand(3)  # type: ignore[list-item]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("other", ["PyTorch's", "plain"])
def test_the_gradients_are_those_of_pytorchs_checkpoint_and_of_none_bit_for_bit(other: str, dropout: float) -> None:
    ours, after = gradients("ours", dropout)
    theirs, after_theirs = gradients(other, dropout)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(mine, wanted)
    assert torch.equal(after, after_theirs)


def test_nothing_is_kept_but_the_input() -> None:
    part, _ = two_parts(0.5)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 6, requires_grad=True)
    for checkpointed in (True, False):  # without it the count sees more: it can see
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = CheckpointFunction.apply(part, x) if checkpointed else part(x)
        assert y.requires_grad
        assert ([tensor is x for tensor in kept] == [True]) == checkpointed


def test_gradients_add_up_and_without_one_for_x_none_flows_at_all() -> None:
    part, _ = two_parts(0.0)
    x = torch.randn(4, 6, requires_grad=True)
    for _ in range(2):
        CheckpointFunction.apply(part, x).sum().backward()
    twice = [p.grad.clone() for p in part.parameters() if p.grad is not None]
    part.zero_grad()
    part(x.detach()).sum().backward()
    for double, p in zip(twice, part.parameters(), strict=True):
        torch.testing.assert_close(double, 2 * p.grad)  # type: ignore[operator]
    assert not CheckpointFunction.apply(part, x.detach()).requires_grad  # the older form's well-known trap
