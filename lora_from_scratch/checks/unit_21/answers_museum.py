"""Unit 21: tests that people write of an edit with dropout."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch

from lora_from_scratch.checks.bank import right, wrong


def with_numbers(Edit, p=0.5, width=6, rank=2):
    """An edit whose W and b are random, and a hidden state."""
    torch.manual_seed(1)
    edit = Edit(width, rank, p)
    with torch.no_grad():
        edit.W.normal_()
        edit.b.normal_()
    return edit, torch.randn(width)


def change_of(edit, x):
    return ((edit.W @ x + edit.b - edit.R @ x) @ edit.R).detach()


def formula_holds(edit, x) -> None:
    edit.eval()
    assert torch.allclose(edit(x[None].clone())[0], x + change_of(edit, x), atol=1e-4)
    edit.train()


def is_random(edit, x) -> None:
    draws = edit(x.repeat(200, 1))
    assert (draws - draws[0]).abs().max() > 1e-3


def mean_is_kept(edit, x) -> None:
    mean, change = edit(x.repeat(4000, 1)).mean(dim=0), change_of(edit, x)
    assert (mean - x - change).norm() < 0.2 * change.norm()


@torch.no_grad()
def zero_is_kept(edit, x) -> None:
    edit.W.copy_(edit.R)
    edit.b.zero_()
    assert torch.allclose(edit(x.repeat(200, 1)), x, atol=1e-4)


def given_is_kept(edit, x) -> None:
    given = x[None].clone()
    edit(given)
    assert torch.equal(given[0], x)


def run(Edit, *steps) -> None:
    edit, x = with_numbers(Edit)
    for step in steps:
        step(edit, x)


ALL = (formula_holds, is_random, mean_is_kept, given_is_kept, zero_is_kept)


def all_but(Edit, left_out) -> None:
    run(Edit, *(step for step in ALL if step is not left_out))


# --- Right -------------------------------------------------------------------------------------------


@right("test_edit")
def in_small_steps(Edit):
    run(Edit, *ALL)


@right("test_edit")
def in_many_calls(Edit):
    edit, x = with_numbers(Edit, p=0.4, width=5, rank=3)
    h = x.expand(2, 3, 5).contiguous()
    copy = h.clone()
    wanted = h + change_of(edit, x)
    draws = torch.stack([edit(h.repeat(60, 1, 1)) for _ in range(12)]).detach()
    edit(h)
    assert torch.equal(h, copy), "h was changed"
    assert bool((edit.eval()(h) - wanted).abs().max() < 1e-3)
    assert float(draws.std(dim=(0, 1)).max()) > 1e-3, "no dropout"
    relative = (draws.mean(dim=(0, 1, 2)) - wanted[0, 0]).norm() / change_of(edit, x).norm()
    assert float(relative) < 0.25, "the mean"
    with torch.no_grad():
        edit.b.fill_(0.0)
        edit.W.data = edit.R.data.clone()
    for _ in range(20):
        assert (edit.train()(copy.clone()) - copy).abs().max() < 1e-4


@right("test_edit")
def every_fault_noted(Edit):
    faults = []
    for step in ALL:
        edit, x = with_numbers(Edit, p=0.3, width=8, rank=4)
        try:
            step(edit, x)
        except AssertionError:
            faults.append(step.__name__)
    assert not faults, faults


@right("test_edit")
def from_simple_numbers(Edit):
    edit = Edit(3, 1, 0.5)
    x = torch.tensor([1.0, 2.0, -3.0])
    with torch.no_grad():
        edit.R.copy_(torch.tensor([[0.6, 0.8, 0.0]]))
        edit.W.copy_(torch.tensor([[0.0, 0.0, 1.0]]))
        edit.b.fill_(0.5)
        wanted = x + (-3.0 + 0.5 - 2.2) * torch.tensor([0.6, 0.8, 0.0])
        edit.train(False)
        batch = x.repeat(5000, 1)
        assert ((edit(batch) - wanted).abs() < 1e-4).all()
        edit.train(True)
        batch = x.repeat(5000, 1)
        out = edit(batch)
        assert (batch == x).all()
        assert len(out.round(decimals=3).unique(dim=0)) > 1
        assert ((out.mean(0) - wanted).abs() < 0.6).all()
        edit.W.copy_(edit.R)
        edit.b.fill_(0.0)
        assert ((edit(x.repeat(50, 1)) - x).abs() < 1e-4).all()


# --- Wrong -------------------------------------------------------------------------------------------


@wrong("test_edit", "Your test passes every edit, the faulty ones too: it never raises an AssertionError.")
def never_fails(Edit):
    edit, x = with_numbers(Edit)
    return torch.allclose(edit(x[None]), x + change_of(edit, x))


@wrong("test_edit", "Your test refuses every edit, the sound ones too. Dropout changes the result of a single call.")
def compares_a_single_draw(Edit):
    edit, x = with_numbers(Edit)
    assert torch.allclose(edit(x[None].clone())[0], x + change_of(edit, x), atol=1e-4)
    formula_holds(edit, x)


@wrong(
    "test_edit",
    "Your test looks at evaluation mode only, where the exhibit does what it should. Its fault is in training mode.",
)
def evaluation_mode_only(Edit):
    run(Edit, formula_holds, given_is_kept)


@wrong(
    "test_edit",
    "Your test never sets W = R and b = 0 in training mode. With any other W, dropout on h looks like dropout on the "
    "change: both are random, and both keep the mean.",
)
def without_a_change_of_zero(Edit):
    all_but(Edit, zero_is_kept)


@wrong("test_edit", "Your test never looks at evaluation mode. There nothing may be dropped, and the formula holds.")
def training_mode_only(Edit):
    all_but(Edit, formula_holds)


@wrong("test_edit", "Your test does not notice if nothing is dropped at all.")
def nothing_dropped_is_not_seen(Edit):
    all_but(Edit, is_random)


@wrong("test_edit", "Your test does not compare the mean of many draws: what is kept may be too small, or too large.")
def no_mean(Edit):
    all_but(Edit, mean_is_kept)


@wrong("test_edit", "Your test does not look whether the given h has changed. Give a copy, and compare it afterwards.")
def changes_are_not_seen(Edit):
    all_but(Edit, given_is_kept)


@wrong("test_edit", "In your test b is zero, as at the start, so it cannot see that b is left out.")
def b_is_zero(Edit):
    def start(edit, x):
        with torch.no_grad():
            edit.b.zero_()

    run(Edit, start, *ALL)


@wrong(
    "test_edit",
    "Your test demands that single entries of the change are dropped. Dropout on the r coordinates, on whole tokens, "
    "or on what is read is sound too.",
)
def entries_must_be_dropped(Edit):
    run(Edit, *ALL[:-1])
    edit, x = with_numbers(Edit)
    whole = change_of(edit, x)
    change = (edit(x.repeat(2000, 1)) - x).detach()
    dropped = change.abs() < 1e-4
    assert (dropped | ((change - 2 * whole).abs() < 1e-3)).all()
    assert len(dropped.unique(dim=0)) > 2
    run(Edit, zero_is_kept)


@wrong(
    "test_edit",
    "Your test demands that outside of the subspace of R's rows nothing changes. Dropout on the entries of the change "
    "leads out of it in a single draw, and is sound.",
)
def nothing_outside_the_subspace(Edit):
    run(Edit, *ALL)
    edit, x = with_numbers(Edit)
    change = (edit(x.repeat(200, 1)) - x).detach()
    assert torch.allclose(change @ edit.R.T @ edit.R, change, atol=1e-3)


@wrong("test_edit", caught_by="raises")
def another_exception(Edit):
    try:
        run(Edit, *ALL)
    except AssertionError:
        raise ValueError("a fault") from None
