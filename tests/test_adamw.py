"""One step of AdamW is PyTorch's, and warm-up with a cosine is PyTorch's schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_from_scratch.finetune.adamw import adamw_step
from lora_from_scratch.finetune.training import TrainingSettings, learning_rate_at, warmup_cosine

RATES = st.floats(1e-5, 0.5)
BETAS = st.floats(0.0, 0.999)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1_000),
    learning_rate=RATES,
    beta1=BETAS,
    beta2=BETAS,
    eps=st.sampled_from([1e-8, 1e-3, 0.3]),
    weight_decay=st.floats(0.0, 1.0),
)
def test_five_steps_are_those_of_torch(
    seed: int, learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=learning_rate, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    ours, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
    options = {"learning_rate": learning_rate, "eps": eps, "weight_decay": weight_decay}
    for step in range(1, 6):
        gradient = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        theirs.grad = gradient.clone()
        optimizer.step()
        ours, m, v = adamw_step(ours, gradient, m, v, step, betas=(beta1, beta2), **options)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(m, optimizer.state[theirs]["exp_avg"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(v, optimizer.state[theirs]["exp_avg_sq"], rtol=1e-9, atol=1e-12)


def test_the_defaults_of_a_step_are_those_of_torch() -> None:
    start, gradient = torch.tensor([2.0, -3.0]), torch.tensor([0.1, 40.0])
    theirs = nn.Parameter(start.clone())
    theirs.grad = gradient
    torch.optim.AdamW([theirs], lr=0.1).step()
    ours, _, _ = adamw_step(start, gradient, torch.zeros(2), torch.zeros(2), 1, learning_rate=0.1)
    torch.testing.assert_close(ours, theirs.detach())


def test_a_step_leaves_its_arguments_as_they_are() -> None:
    p, gradient, m, v = torch.randn(4), torch.randn(4), torch.randn(4), torch.rand(4)
    before = [tensor.clone() for tensor in (p, gradient, m, v)]
    adamw_step(p, gradient, m, v, 3, learning_rate=0.1)
    assert all(map(torch.equal, (p, gradient, m, v), before))


def test_a_step_before_the_first_is_refused() -> None:
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match="step must be at least 1"):
        adamw_step(zeros, zeros, zeros, zeros, 0, learning_rate=0.1)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), steps=st.integers(1, 40))
def test_warm_up_and_cosine_are_two_schedules_of_torch_in_a_row(data: st.DataObject, steps: int) -> None:
    warmup = data.draw(st.integers(0, steps))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rates: list[float] = []
    if warmup:
        rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / warmup)
        for _ in range(warmup):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            rise.step()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup))
    for _ in range(steps - warmup):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        fall.step()
    assert [warmup_cosine(step, steps, warmup) for step in range(steps)] == pytest.approx(rates, abs=1e-9)


def test_the_training_loop_takes_its_cosine_from_there() -> None:
    run = TrainingSettings(steps=20, learning_rate=1e-3, warmup_steps=3, schedule="cosine")
    assert [learning_rate_at(step, run) for step in range(20)] == [warmup_cosine(step, 20, 3) for step in range(20)]


@pytest.mark.parametrize(("step", "steps", "warmup"), [(-1, 10, 2), (10, 10, 2), (0, 10, 11), (0, 10, -1), (0, 0, 0)])
def test_a_step_outside_of_the_run_is_refused(step: int, steps: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="step must be from 0"):
        warmup_cosine(step, steps, warmup)
