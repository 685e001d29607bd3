"""ReLoRA: what a restart does to the weights, to the optimiser and to the learning rate.

Compared outside this repository with Guitaricet/relora (commit 176f376): the outputs of a layer of theirs and of ours
with the same W, A and B (32 x 24, r 4), and the weights after their `merge_and_reinit` and our `absorb`, are equal bit
for bit; `magnitude_pruning_` at 0.9 keeps the same entries of a first moment as `cut_moments` at 0.1. The jagged
learning rate (20,000 steps, 4 cycles, 100 steps of warm-up) differs by at most 0.0101 of the peak, in the warm-ups
only: theirs begins at 0 and ours at 1/100, as the schedules of this library do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.cli import main
from lora_from_scratch.finetune.run import CHECKPOINT
from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.adapter_files import WEIGHTS_FILE
from lora_from_scratch.methods.lora import LoRA, lora_layers
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.methods.relora import ReLoRA, cut_moments
from lora_from_scratch.support.linear_layers import weight_of
from tests.helpers import REPOSITORY, tiny_model
from tests.test_method import assert_same, snapshot
from tests.tiny_runs import run_in

STEPS = 12


def batch_at(step: int) -> Batch:
    ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids)


def trained(method: Method, steps: int = STEPS, **changes: Any) -> tuple[GPT2, list[float]]:
    model = tiny_model()
    method.adapt(model)
    settings = TrainingSettings(steps=steps, learning_rate=1e-2, precision="fp32", **changes)
    losses = Trainer(model, batch_at, settings, method=method, progress=False).run().losses
    return model.eval(), losses


def changes_of(model: GPT2, method: Method, base: GPT2 | None = None) -> dict[str, Tensor]:
    """By how much the weight of each adapted layer differs from the pretrained one, (out, in)."""
    plain, base = method.merged_copy(model), base or tiny_model()
    places = lora_layers(model)
    return {n: (weight_of(plain.get_submodule(n)).double() - weight_of(base.get_submodule(n)).double()) for n in places}


def rank_of(change: Tensor) -> int:
    """The number of singular values above what the rounding of weights of size 1 leaves."""
    return int((torch.linalg.svdvals(change) > 1e-5).sum())


# --- The rank of the sum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cycles", [1, 2, 4])
def test_the_sum_of_the_updates_has_the_rank_of_all_cycles_together(cycles: int) -> None:
    method = ReLoRA(rank=2, cycles=cycles)
    model, _ = trained(method)
    assert {rank_of(change) for change in changes_of(model, method).values()} == {2 * cycles}


def test_one_cycle_is_a_lora_bit_for_bit() -> None:
    model, losses = trained(ReLoRA(rank=2, cycles=1, dropout=0.1))
    lora, expected = trained(LoRA(rank=2, dropout=0.1))
    assert losses == expected
    assert_same(snapshot(model), snapshot(lora))


def test_until_the_first_restart_it_is_a_lora_and_afterwards_it_is_not() -> None:
    _, losses = trained(ReLoRA(rank=2, cycles=3))
    _, expected = trained(LoRA(rank=2))
    first = STEPS // 3
    assert losses[: first + 1] == pytest.approx(expected[: first + 1], abs=1e-6)  # the function goes on as it was
    assert losses[:first] == expected[:first]
    assert losses[-1] != pytest.approx(expected[-1], abs=1e-6)


def test_a_killed_run_that_is_resumed_across_a_restart_ends_with_the_same_adapter_of_high_rank(
    quiet_run: Path, short_evaluation: None, tmp_path: Path
) -> None:
    """SIGKILL when the first checkpoint is there, after step 2: the restarts are after steps 4 and 8."""
    flags = ["--method", "relora", "--cycles", "3", "--steps", "12", "--checkpoint-every", "2"]
    quiet, troubled = tmp_path / "quiet", tmp_path / "troubled"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "lora_from_scratch", *run_in(quiet_run, troubled, *flags)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (troubled / CHECKPOINT).exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert main(run_in(quiet_run, troubled, *flags)) == 0
    assert main(run_in(quiet_run, quiet, *flags)) == 0
    assert (troubled / WEIGHTS_FILE).read_bytes() == (quiet / WEIGHTS_FILE).read_bytes()

    base, _ = load_gpt2(quiet_run / "model")
    model, _ = load_gpt2(quiet_run / "model")
    method = load_adapter(model, troubled)
    assert min(rank_of(change) for change in changes_of(model, method, base).values()) > 2  # the rank of `run_in`


@pytest.mark.parametrize("place", [3, 4, 5, 8, 11])
def test_a_run_that_is_interrupted_before_at_or_after_a_restart_ends_the_same(place: int, tmp_path: Path) -> None:
    method = ReLoRA(rank=2, cycles=3)
    quiet, losses = trained(method)

    def trainer(model: GPT2, stop: int) -> Trainer:
        def interrupted(step: int) -> Batch:
            if step == stop:
                raise KeyboardInterrupt
            return batch_at(step)

        settings = TrainingSettings(steps=STEPS, learning_rate=1e-2, precision="fp32")
        file = tmp_path / "checkpoint.pt"
        return Trainer(model, interrupted, settings, method=method, checkpoint=file, checkpoint_every=1, progress=False)

    model, resumed = tiny_model(), tiny_model()
    method.adapt(model)
    method.adapt(resumed)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, place).run()
    assert trainer(resumed, -1).run().losses == losses
    assert_same(method.state_dict(resumed), method.state_dict(quiet))
    method.undo(resumed)
    assert_same(snapshot(resumed), snapshot(tiny_model()))


# --- A restart -----------------------------------------------------------------------------------------------


def one_restart(method: ReLoRA) -> tuple[GPT2, torch.optim.Optimizer]:
    """A model just before its first restart, and its optimiser, whose state is full of numbers."""
    model = tiny_model()
    method.adapt(model)
    method.before_training(model, [], STEPS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.normal_(generator=generator)
    optimizer = torch.optim.AdamW(method.trainable(model).values())
    for parameter in method.trainable(model).values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return model, optimizer


def test_a_restart_puts_the_product_into_the_weight_and_draws_a_new_a() -> None:
    method = ReLoRA(rank=2, alpha=6, cycles=2)
    model, optimizer = one_restart(method)
    before = {
        n: (la.lora_A.clone(), la.lora_B.clone(), weight_of(la.base).clone()) for n, la in lora_layers(model).items()
    }
    logits = model(batch_at(0).input_ids)
    method.after_step(model, STEPS // 2 - 1, optimizer)
    assert torch.equal(model(batch_at(0).input_ids), logits)  # not yet
    method.after_step(model, STEPS // 2, optimizer)
    torch.testing.assert_close(model(batch_at(0).input_ids), logits, atol=1e-3, rtol=1e-3)
    for name, layer in lora_layers(model).items():
        A, B, W = before[name]
        torch.testing.assert_close(weight_of(layer.base), W + 3 * B @ A)
        assert not layer.lora_B.any()
        bound = A.shape[1] ** -0.5
        assert 0.5 * bound < float(layer.lora_A.detach().abs().max()) <= bound
    model(batch_at(0).input_ids).square().mean().backward()
    gradients = [layer.lora_B.grad for layer in lora_layers(model).values()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)  # not dead, as with A = 0


def test_every_restart_draws_other_factors_and_the_same_in_every_process() -> None:
    method = ReLoRA(rank=2, cycles=3)
    drawn = []
    for step, process in ((4, 0), (8, 0), (4, 1)):
        model, optimizer = one_restart(method)
        torch.manual_seed(process)  # the generator of a process of a distributed run is its own
        method.after_step(model, step, optimizer)
        drawn.append(lora_layers(model)["transformer.h.0.attn.c_attn"].lora_A.detach())
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_only_the_entries_with_the_largest_moments_keep_them() -> None:
    method = ReLoRA(rank=2, cycles=2, kept_moments=0.25)
    model, optimizer = one_restart(method)
    states = {name: dict(optimizer.state[p]) for name, p in method.trainable(model).items()}
    before = {name: {k: v.clone() for k, v in state.items()} for name, state in states.items()}
    method.after_step(model, STEPS // 2, optimizer)
    for name, state in states.items():
        kept = state["exp_avg"] != 0
        assert int(kept.sum()) == round(0.25 * kept.numel())
        assert torch.equal(kept, state["exp_avg_sq"] != 0)
        old = before[name]["exp_avg"].abs()
        assert old[kept].min() >= old[~kept].max()
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[moment][kept], before[name][moment][kept])
        assert state["step"] == before[name]["step"]


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_exactly_the_share_of_the_moments_is_kept_even_when_all_are_equal(count: int, kept: float, seed: int) -> None:
    values = torch.randint(1, 3, (count, 1), generator=torch.Generator().manual_seed(seed)).float()
    state = {"step": torch.tensor(5.0), "exp_avg": values.clone(), "exp_avg_sq": values.square()}
    cut_moments(state, kept)
    assert int(state["exp_avg"].count_nonzero()) == round(kept * count)
    assert state["step"] == 5
    cut_moments({}, kept)  # an optimiser without moments


# --- The learning rate ---------------------------------------------------------------------------------------


def test_the_learning_rate_begins_at_zero_again_after_each_restart() -> None:
    method = ReLoRA(rank=2, cycles=3, restart_warmup=0.25)
    model = tiny_model()
    method.adapt(model)
    settings = TrainingSettings(steps=48, learning_rate=1e-2, precision="fp32", schedule="constant")
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])

    watched: list[torch.optim.Optimizer] = [Watched(method.trainable(model).values(), lr=1.0)]
    Trainer(model, batch_at, settings, method=method, optimizers=watched, progress=False).run()
    later = [0.25, 0.5, 0.75] + [1.0] * 13
    assert rates == [1.0] * 16 + later + later


@pytest.mark.parametrize(
    ("cycles", "steps", "expected"), [(1, 10, []), (4, 500, [125, 250, 375]), (3, 10, [3, 6]), (9, 3, [1, 2])]
)
def test_the_restarts_divide_the_run_evenly_and_none_is_at_its_end(
    cycles: int, steps: int, expected: list[int]
) -> None:
    assert ReLoRA(cycles=cycles).restarts(steps) == expected


# --- What is kept, and what is refused -----------------------------------------------------------------------


def test_it_trains_as_many_numbers_as_a_lora_of_the_rank_of_one_cycle() -> None:
    method = ReLoRA(rank=2, targets=("c_attn", "mlp.c_proj"), cycles=4)
    model, _ = trained(method)
    d, blocks = 24, 2
    assert sum(p.numel() for p in method.trainable(model).values()) == blocks * 2 * ((d + 3 * d) + (4 * d + d))


def test_without_a_copy_of_the_base_less_is_kept_and_undo_is_refused() -> None:
    kept, light = ReLoRA(rank=2), ReLoRA(rank=2, keep_base=False)
    model, _ = trained(light)
    assert sum(b.numel() for b in model.buffers()) == 0
    with pytest.raises(ValueError, match="keep_base=False kept no copy of the base model"):
        light.undo(model)
    twin, _ = trained(kept)
    assert torch.equal(model(batch_at(0).input_ids), twin(batch_at(0).input_ids))
    assert sum(b.numel() for b in twin.buffers()) == 2 * 12 * 24**2


def test_a_state_taken_in_the_middle_of_a_run_switches_back_to_it() -> None:
    method = ReLoRA(rank=2, cycles=3)
    (early, _), (late, _) = trained(method, steps=6), trained(method)
    expected = early(batch_at(0).input_ids)
    method.load_state_dict(late, method.state_dict(early))
    assert torch.equal(late(batch_at(0).input_ids), expected)
    method.merge(late)
    state = method.state_dict(late)  # the change of the last cycle is not in W twice
    method.unmerge(late)
    assert_same(state, method.state_dict(early))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cycles": 0}, "cycles must be a whole number of at least 1, got 0"),
        ({"restart_warmup": 1.5}, "restart_warmup must be from 0 to 1, got 1.5"),
        ({"kept_moments": -0.1}, "kept_moments must be from 0 to 1, got -0.1"),
        ({"rank": 0}, "rank"),
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ReLoRA(**fields)
    assert "\n" not in str(error.value)


def test_a_base_that_is_not_made_of_floating_point_numbers_is_refused_and_stays_as_it_was() -> None:
    from lora_from_scratch.methods.qlora import quantize_model

    model = tiny_model()
    quantize_model(model)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="not made of floating-point numbers"):
        ReLoRA(rank=2).adapt(model)
    assert [type(module) for module in model.modules()] == before
