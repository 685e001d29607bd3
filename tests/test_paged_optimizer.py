"""The paged optimiser is AdamW, bit for bit, and its m and v are not in the process's own memory."""

from __future__ import annotations

import copy
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_from_scratch.finetune.paged_optimizer import PagedAdamW, Pages, page_aligned
from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings
from tests.helpers import tiny_model

Parameters = list[nn.Parameter]


def some_parameters(dtype: torch.dtype = torch.float32) -> Parameters:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in [(7, 5), (3,), (40, 40), ()]]


def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Gradients that depend on the step alone; the second parameter gets none in odd steps."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(parameters):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if i == 1 and step % 2 else grad
        optimizer.step()


def groups(parameters: Parameters) -> list[dict[str, Any]]:
    return [
        {"params": parameters[:2], "weight_decay": 0.1, "lr": 0.02},
        {"params": parameters[2:], "betas": (0.8, 0.95), "eps": 1e-6},
    ]


def assert_equal(ours: Parameters, theirs: Parameters) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_adamw_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    ours, theirs = some_parameters(dtype), some_parameters(dtype)
    steps(PagedAdamW(groups(ours), lr=0.01, directory=tmp_path), 0, 12)
    steps(torch.optim.AdamW(groups(theirs), lr=0.01, foreach=False), 0, 12)
    assert_equal(ours, theirs)
    assert not torch.equal(ours[0], some_parameters(dtype)[0])


def test_a_fresh_one_goes_on_from_a_state_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, halves = some_parameters(), some_parameters()
    steps(PagedAdamW(groups(whole)), 0, 10)
    first = PagedAdamW(groups(halves))
    steps(first, 0, 5)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    steps(first, 5, 7)  # what is written on from here must not reach the file
    with torch.no_grad():
        resumed = some_parameters()
        steps(PagedAdamW(groups(resumed)), 0, 5)
    second = PagedAdamW([{**group, "lr": 9.0} for group in groups(resumed)])
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    steps(second, 5, 10)
    assert_equal(resumed, whole)


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("directions", [(PagedAdamW, torch.optim.AdamW), (torch.optim.AdamW, PagedAdamW)])
def test_states_go_to_adamw_and_come_from_it(directions: tuple[type, type], before: int) -> None:
    def make(kind: type, parameters: Parameters) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = kind(groups(parameters))
        return optimizer

    one, whole = some_parameters(), some_parameters()
    first = make(directions[0], one)
    steps(first, 0, before)
    second = make(directions[1], one)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for group in second.param_groups:
        group["foreach"] = False
    steps(second, before, 9)
    steps(torch.optim.AdamW(groups(whole), foreach=False), 0, 9)
    assert_equal(one, whole)


def test_a_training_run_that_stops_and_goes_on_ends_like_one_that_does_not(tmp_path: Path) -> None:
    def batch_at(step: int) -> Batch:
        ids = torch.randint(0, 61, (2, 8), generator=torch.Generator().manual_seed(step))
        return Batch(ids, ids)

    def run(stop: int, checkpoint: Path) -> dict[str, torch.Tensor]:
        model = tiny_model()
        optimizer = PagedAdamW(model.parameters(), lr=1e-2)
        settings = TrainingSettings(steps=6, learning_rate=1e-2, precision="fp32")
        trainer = Trainer(
            model,
            batch_at,
            settings,
            optimizers=[optimizer],
            checkpoint=checkpoint,
            checkpoint_every=3,
            evaluate=lambda: (_ for _ in ()).throw(KeyboardInterrupt) if trainer.step == stop else {},
            evaluate_every=1,
            progress=False,
        )
        trainer.run()
        return model.state_dict()

    straight = run(99, tmp_path / "straight.pt")
    with pytest.raises(KeyboardInterrupt):
        run(4, tmp_path / "resumed.pt")
    resumed = run(99, tmp_path / "resumed.pt")
    for name, tensor in straight.items():
        assert torch.equal(resumed[name], tensor), name


def mapped_bytes() -> int:
    """What this process has in memory of files, those of a file system in memory among them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssFile", "RssShmem")))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not count memory as Linux does")
def test_after_a_step_m_and_v_have_left_the_process_and_keep_their_values(tmp_path: Path) -> None:
    p = nn.Parameter(torch.zeros(4 * 2**20))  # 16 MiB; m and v take 32
    p.grad = torch.ones_like(p)
    start = mapped_bytes()
    optimizer = PagedAdamW([p], directory=tmp_path)
    optimizer.step()
    before = mapped_bytes()
    m = optimizer.state[p]["exp_avg"]
    assert before - start < 12 * 2**20  # of the 32; some is code of PyTorch
    assert m.sum().item() == pytest.approx(0.1 * p.numel(), rel=1e-3)
    touched = mapped_bytes()
    assert touched - before > 12 * 2**20
    optimizer.step()
    assert touched - mapped_bytes() > 12 * 2**20
    assert torch.equal(m[:3], torch.full((3,), 0.1).lerp_(torch.ones(3), 1 - 0.9))
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_m_and_v_are_the_files_bytes_at_their_place_and_nowhere_else() -> None:
    p, start = torch.empty(3, 5, dtype=torch.float64), mmap.PAGESIZE
    mapping = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    pages = Pages(mapping, start, p)
    assert pages.length == page_aligned(2 * p.nbytes) == mmap.PAGESIZE
    pages.m.fill_(1.5)
    pages.v.fill_(-2.0)
    pages.release()
    written = torch.frombuffer(bytearray(mapping[:]), dtype=torch.float64)
    first = start // 8
    assert written[first : first + 30].tolist() == [1.5] * 15 + [-2.0] * 15
    assert written.count_nonzero() == 30
    mapping[start : start + 8] = bytes(8)
    assert pages.m[0, 0] == 0
    assert (pages.m.shape, pages.v.dtype) == (p.shape, p.dtype)


def test_parameters_can_be_added_and_a_closure_is_called() -> None:
    parameters = some_parameters()
    optimizer = PagedAdamW(parameters[:1])
    optimizer.add_param_group({"params": parameters[1:], "lr": 0.5})
    before = [p.detach().clone() for p in parameters]

    def closure() -> float:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in parameters)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(sum((p**2).sum().item() for p in before), rel=1e-5)
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


def test_bad_numbers_and_foreign_states_are_refused() -> None:
    parameters = some_parameters()
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        PagedAdamW(parameters, lr=-1)
    with pytest.raises(ValueError, match=r"betas .* got \(0.9, 1"):
        PagedAdamW(parameters, betas=(0.9, 1.0))
    with pytest.raises(OSError, match="nowhere"):
        PagedAdamW(parameters, directory="/nowhere")
    optimizer, other = PagedAdamW(parameters[:1]), PagedAdamW(parameters[2:3])
    steps(optimizer, 0, 2)
    steps(other, 0, 2)
    held = optimizer.state[parameters[0]]["exp_avg"].clone()
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(40, 40\), and the parameter has \(7, 5\)"):
        optimizer.load_state_dict(other.state_dict())
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], held)
