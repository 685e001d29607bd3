"""The training loop: repeatable, resumable after any kill, the same in one process and in two."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lora_from_scratch.finetune.step_seeds import shuffled_places
from lora_from_scratch.finetune.training import (
    Batch,
    NonFiniteLossError,
    Trainer,
    TrainingSettings,
    learning_rate_at,
)
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2

SCRIPT = Path(__file__).parent / "training_script.py"


def tiny_model(dropout: float = 0.1) -> GPT2:
    torch.manual_seed(1)
    return GPT2(
        GPT2Config(
            vocab_size=50,
            n_positions=16,
            n_embd=16,
            n_layer=2,
            n_head=2,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
        )
    )


def random_batch(step: int, rows: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(50, (rows, 12), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    return Batch(ids, labels)


def settings(**changes: object) -> TrainingSettings:
    given = {"steps": 6, "learning_rate": 1e-2, "warmup_steps": 2, "precision": "fp32", **changes}
    return TrainingSettings(**given)  # type: ignore[arg-type]


def weights_after(model: GPT2, **changes: object) -> tuple[torch.Tensor, list[float]]:
    history = Trainer(model, random_batch, settings(**changes), progress=False).run()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), history.losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_with_the_same_seed_end_with_the_same_bits(precision: str) -> None:
    first, losses = weights_after(tiny_model(), precision=precision)
    second, again = weights_after(tiny_model(), precision=precision)
    assert torch.equal(first, second)
    assert losses == again


def test_another_seed_draws_other_dropout_masks() -> None:
    assert not torch.equal(weights_after(tiny_model())[0], weights_after(tiny_model(), seed=1)[0])


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulation_gives_the_same_losses_as_one_large_batch(parts: int) -> None:
    whole = weights_after(tiny_model(dropout=0))[1]
    cut = weights_after(tiny_model(dropout=0), accumulation=parts)[1]
    assert cut == pytest.approx(whole, abs=1e-5)


def test_the_first_steps_equal_plain_pytorch_with_the_same_loss_and_optimiser() -> None:
    ours, theirs = tiny_model(dropout=0), tiny_model(dropout=0)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.3},
            {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        fused=True,
    )
    for step in range(3):
        batch = random_batch(step)
        logits = theirs(batch.input_ids)[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, 50), batch.labels[:, 1:].reshape(-1), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * [1 / 2, 1, 1][step]  # two steps of warm-up, then the top of the line
        optimizer.step()
        optimizer.zero_grad()
    Trainer(ours, random_batch, settings(steps=3, weight_decay=0.3, clip_norm=0.5), progress=False).run()
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, its, atol=1e-6)


def test_frozen_parameters_do_not_move_by_a_bit() -> None:
    model = tiny_model()
    model.transformer.wte.requires_grad_(False)
    before = model.transformer.wte.weight.clone()
    weights_after(model)
    assert torch.equal(model.transformer.wte.weight, before)
    assert model.transformer.wte.weight.grad is None


# --- The schedule ---


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_schedule_warms_up_in_a_line_then_falls_towards_zero(schedule: str) -> None:
    s = settings(steps=100, warmup_steps=10, schedule=schedule)
    rates = [learning_rate_at(step, s) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.02
    assert rates[55] == pytest.approx(0.5)  # both pass through one half in the middle


def test_the_trapezoid_stays_at_the_top_and_falls_in_a_line_over_its_last_part() -> None:
    s = settings(steps=100, warmup_steps=10, schedule="trapezoid", decay_fraction=0.4)
    rates = [learning_rate_at(step, s) for step in range(100)]
    assert rates[10:61] == [1.0] * 51
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 40)


# --- Batches ---


def test_every_item_comes_once_an_epoch_and_in_another_order_in_the_next() -> None:
    places = [place for step in range(20) for place in shuffled_places(40, 4, seed=3, step=step)]
    epochs = [[item for epoch, item in places if epoch == e] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40))
    assert epochs[0] != epochs[1]


# --- What goes wrong ---


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"schedule": "triangle"}, "schedule"),
        ({"precision": "fp8"}, "precision"),
        ({"accumulation": 0}, "accumulation"),
        ({"warmup_steps": 7}, "warmup_steps"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(changes: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        settings(**changes)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = tiny_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        Trainer(model, random_batch, settings())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "checkpoint.pt"

    def poisoned(step: int) -> Batch:
        if step == 4:
            with torch.no_grad():
                model.transformer.ln_f.weight[0] = math.nan
        return random_batch(step)

    trainer = Trainer(model, poisoned, settings(), checkpoint=path, checkpoint_every=2, progress=False)
    with pytest.raises(NonFiniteLossError, match=r"step 4: the loss is nan at learning rate 0\.005.*checkpoint"):
        trainer.run()
    kept = torch.load(path, weights_only=True)
    assert kept["step"] == 4
    assert all(bool(t.isfinite().all()) for t in kept["trainable"].values())


def test_the_checkpoint_of_another_run_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    Trainer(tiny_model(), random_batch, settings(), checkpoint=path, progress=False).run()
    for changes, tag, said in [
        ({"learning_rate": 2e-2}, "", "learning_rate"),
        ({}, "other data", "data, model or method"),
    ]:
        with pytest.raises(ValueError, match=said):
            Trainer(
                tiny_model(), random_batch, settings(**changes), checkpoint=path, settings_tag=tag, progress=False
            ).run()


def test_a_damaged_checkpoint_is_refused_in_one_line_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a readable checkpoint"):
        Trainer(tiny_model(), random_batch, settings(), checkpoint=path, progress=False).run()


def test_a_trapezoid_run_may_be_made_longer_before_its_decay_and_not_after(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"

    def train(steps: int, stop: int) -> None:
        trainer = Trainer(
            tiny_model(),
            random_batch,
            settings(steps=steps, schedule="trapezoid"),
            checkpoint=path,
            checkpoint_every=1,
            progress=False,
            evaluate=lambda: _stop_at(trainer.step, stop),
            evaluate_every=1,
        )
        trainer.run()

    with pytest.raises(InterruptedError):
        train(10, stop=4)
    train(20, stop=99)  # the checkpoint is of step 3: the decay of neither length has begun
    with pytest.raises(ValueError, match="steps"):
        train(30, stop=99)


def _stop_at(step: int, stop: int) -> dict[str, float]:
    if step == stop:
        raise InterruptedError
    return {}


# --- Processes ---


def run_script(directory: Path, *arguments: str, command: list[str] | None = None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.Popen([*(command or [sys.executable]), str(SCRIPT), str(directory), *arguments], env=environment)


def result(directory: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((directory / "result.json").read_text())
    return loaded


def test_a_run_killed_again_and_again_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    quiet, troubled = tmp_path / "quiet", tmp_path / "troubled"
    for directory in (quiet, troubled):
        directory.mkdir()
    assert run_script(quiet).wait() == 0
    kills = 0
    for extra in (0.0, 0.004, 0.011, 0.03, 0.07):  # seconds after the next step: in steps and while writing
        process = run_script(troubled)
        seen = _lines(troubled)
        while process.poll() is None and _lines(troubled) <= seen + 1:
            time.sleep(0.001)
        time.sleep(extra)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    assert run_script(troubled).wait() == 0
    assert result(troubled) == result(quiet)


def _lines(directory: Path) -> int:
    log = directory / "steps.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_two_processes_give_the_losses_of_one_with_the_same_batch(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for directory in (alone, together):
        directory.mkdir()
    assert run_script(alone, "--no-dropout").wait() == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert run_script(together, "--no-dropout", command=torchrun).wait() == 0
    assert result(together)["losses"] == pytest.approx(result(alone)["losses"], abs=1e-5)
