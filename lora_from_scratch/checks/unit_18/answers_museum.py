"""Unit 18: mistakes that people make, and other right ways. The test of a training loop."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import copy
from unittest import mock

import torch
from torch import nn

from lora_from_scratch.checks.bank import right, wrong


def batches(number=4):
    return [(torch.randn(6, 3), torch.randn(6, 2)) for _ in range(number)]


class Recorded:
    """What a loop does with a small model, call by call."""

    def __init__(self, train, number=4):
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.start = self.model.weight.detach().clone()
        self.steps, self.gradients, self.weights = [], [], []
        self.model.update_and_allocate = self.call
        train(self.model, batches(number), torch.optim.SGD(self.model.parameters(), lr=0.1))

    def call(self, step):
        self.steps.append(step)
        gradient = self.model.weight.grad
        self.gradients.append(None if gradient is None else gradient.clone())
        self.weights.append(self.model.weight.detach().clone())


# --- test_train --------------------------------------------------------------------------------------


@right("test_train")
def from_a_record(train):
    seen = Recorded(train)
    assert seen.steps == [1, 2, 3, 4]
    assert all(g is not None and g.abs().max() > 0 for g in seen.gradients)
    assert not torch.equal(seen.weights[0], seen.start)


@right("test_train")
def nothing_changes_after_the_last_call(train):
    seen = Recorded(train, 3)
    assert list(seen.steps) == list(range(1, 4)), seen.steps
    for gradient in seen.gradients:
        assert gradient is not None
        assert gradient.any()
    assert torch.equal(seen.weights[-1], seen.model.weight)


@right("test_train")
def with_a_class_of_its_own(train):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.calls = 0

        def forward(self, x):
            return x @ self.w

        def update_and_allocate(self, step):
            self.calls += 1
            assert step == self.calls
            assert self.w.grad is not None
            assert self.w.grad.norm() > 0
            assert not torch.equal(self.w, torch.ones(3))

    model = Model()
    train(
        model, [(torch.randn(5, 3), torch.randn(5)) for _ in range(6)], torch.optim.AdamW(model.parameters(), lr=0.01)
    )
    assert model.calls == 6


@right("test_train")
def with_a_mock(train):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    before, there = copy.deepcopy(model.state_dict()), []

    def look(step):
        there.append(sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0)
        there.append(any(not torch.equal(before[name], now) for name, now in model.state_dict().items()))

    model.update_and_allocate = mock.Mock(side_effect=look)
    data = [(torch.randn(4, 2), torch.randn(4, 1)) for _ in range(3)]
    train(model, data, torch.optim.SGD(model.parameters(), lr=0.5))
    assert model.update_and_allocate.call_args_list == [mock.call(1), mock.call(2), mock.call(3)]
    assert all(there)


@right("test_train")
def with_an_optimizer_that_keeps_a_record(train):
    model, events = nn.Linear(3, 2), []

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            result = super().step(closure)
            events.append("step")
            return result

    def allocate(step):
        events.append(step if model.bias.grad is not None and model.bias.grad.any() else "no gradient")

    model.update_and_allocate = allocate
    train(model, batches(3), Optimizer(model.parameters(), lr=0.1))
    assert events == ["step", 1, "step", 2, "step", 3]


@wrong("test_train", "Your test passes every loop, the faulty ones too: it never raises an AssertionError.")
def never_fails(train):
    seen = Recorded(train)
    return seen.steps == [1, 2, 3, 4]


@wrong("test_train", "Your test refuses every loop, the sound ones too.")
def always_fails(train):
    seen = Recorded(train)
    assert seen.steps == [1, 2, 3, 4]
    assert not seen.gradients


@wrong("test_train", "Your test looks only whether `update_and_allocate` is called, not when and how often.")
def only_whether_it_is_called(train):
    assert Recorded(train).steps


@wrong("test_train", "Your test counts the calls, but does not look at the number that each of them gets.")
def only_how_often(train):
    seen = Recorded(train)
    assert len(seen.steps) == 4
    assert all(g is not None and g.any() for g in seen.gradients)
    assert not torch.equal(seen.weights[0], seen.start)


@wrong(
    "test_train",
    "Your test looks at the numbers of the steps only. The gradients could be gone, or the step still to come.",
)
def only_the_steps(train):
    assert Recorded(train).steps == [1, 2, 3, 4]


@wrong("test_train", "Your test looks whether gradients are None. They may also have been set to zero.")
def zeros_are_not_seen(train):
    seen = Recorded(train)
    assert seen.steps == [1, 2, 3, 4]
    assert all(g is not None for g in seen.gradients)
    assert not torch.equal(seen.weights[0], seen.start)


@wrong("test_train", "Your test looks at the gradients of a single step. They could be gone in another one.")
def gradients_of_one_step(train):
    seen = Recorded(train)
    assert seen.steps == [1, 2, 3, 4]
    assert any(g is not None and g.any() for g in seen.gradients)
    assert not torch.equal(seen.weights[0], seen.start)


@wrong("test_train", "Your test does not look at the gradients during the call.")
def gradients_are_not_seen(train):
    seen = Recorded(train)
    assert seen.steps == [1, 2, 3, 4]
    assert not torch.equal(seen.weights[0], seen.start)


@wrong(
    "test_train",
    "Your test cannot see that the call comes before the optimiser's step. Compare the weights at the first call with "
    "those of the beginning, or those at the last call with those of the end. They differ from call to call anyway.",
)
def the_order_is_not_seen(train):
    seen = Recorded(train)
    assert seen.steps == [1, 2, 3, 4]
    assert all(g is not None and g.any() for g in seen.gradients)


@wrong("test_train", "Your test uses a single batch: with one step it cannot see how steps are counted.")
def a_single_batch(train):
    seen = Recorded(train, 1)
    assert seen.steps == [1]
    assert all(g is not None and g.any() for g in seen.gradients)
    assert not torch.equal(seen.weights[0], seen.start)


@wrong("test_train", "Your test takes for granted that steps are counted from 0. The statement says from 1.")
def counted_from_0(train):
    seen = Recorded(train)
    assert seen.steps == [0, 1, 2, 3]
    assert all(g is not None and g.any() for g in seen.gradients)


@wrong(
    "test_train",
    "Your test demands that the gradients are cleared at the end. A loop may clear them before the next one.",
)
def demands_cleared_gradients(train):
    seen = Recorded(train)
    assert seen.steps == [1, 2, 3, 4]
    assert all(g is not None and g.any() for g in seen.gradients)
    assert not torch.equal(seen.weights[0], seen.start)
    left = seen.model.weight.grad
    assert left is None or not left.any()


@wrong(
    "test_train", "Your test demands that gradients are set to None. They may also be set to zero, or cleared later."
)
def demands_none(train):
    seen = Recorded(train)
    assert seen.steps == [1, 2, 3, 4]
    assert all(g is not None and g.any() for g in seen.gradients)
    assert not torch.equal(seen.weights[0], seen.start)
    assert seen.model.weight.grad is None


@wrong("test_train", "Your test counts how often the model is called. A loop may also evaluate it.")
def counts_the_forwards(train):
    model, forwards, steps, fine = nn.Linear(3, 2), [], [], []
    model.register_forward_hook(lambda *_: forwards.append(1))
    start = model.weight.detach().clone()

    def allocate(step):
        steps.append(step)
        fine.append(model.weight.grad is not None and bool(model.weight.grad.any()))
        fine.append(not torch.equal(model.weight, start))

    model.update_and_allocate = allocate
    train(model, batches(), torch.optim.SGD(model.parameters(), lr=0.1))
    assert steps == [1, 2, 3, 4]
    assert all(fine)
    assert len(forwards) == 4


@wrong("test_train", caught_by="raises")
def another_exception(train):
    seen = Recorded(train)
    if seen.steps != [1, 2, 3, 4]:
        raise ValueError("wrong steps")
    assert all(g is not None and g.any() for g in seen.gradients)
    assert not torch.equal(seen.weights[0], seen.start)
