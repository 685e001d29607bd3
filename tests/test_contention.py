"""Training while other programs use the processors. How fast it is then: `benchmarks/busy_computer.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from lora_from_scratch.checks import notebook
from lora_from_scratch.finetune import training
from lora_from_scratch.finetune.training import TrainingSettings
from lora_from_scratch.gpt2 import generation
from lora_from_scratch.support import contention
from tests.helpers import tiny_model

pytestmark = pytest.mark.skipif(contention.waiting() is None, reason="this system does not count waiting threads")


def run(program: str, threads: int = 2) -> Any:
    """What a program prints as JSON, in a process of its own: the tests' own process computes with one thread."""
    begin = "import json, os, threading, time, torch\nfrom lora_from_scratch.support import contention\n"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", begin + textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is that of Linux")
def test_a_second_team_has_threads_of_its_own_and_all_of_them_end_with_it() -> None:
    counts = run(
        """
        def threads():
            time.sleep(0.2)
            return len(os.listdir("/proc/self/task"))

        torch.zeros(contention.SPLIT).add_(1)
        counts = [threads()]
        for _ in range(3):
            team = contention.SecondTeam()
            counts.append(threads())
            team.end()
            counts.append(threads())
        print(json.dumps(counts))
        """
    )
    alone = counts[0]
    assert counts == [alone, alone + 2, alone, alone + 2, alone, alone + 2, alone]


def test_training_gives_the_same_bits_with_a_second_team() -> None:
    found = run(
        """
        def train():
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
            x = torch.randn(512, 256)
            losses = []
            for _ in range(5):
                loss = (model(x) - x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            return losses

        alone = train()
        team = contention.SecondTeam()
        print(json.dumps([torch.get_num_threads(), alone, train()]))
        """
    )
    threads, alone, beside = found
    assert threads == 2
    assert alone == beside


def test_the_second_team_comes_when_threads_wait_and_goes_when_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([0.0, 0.01, 0.3, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6])
    events: list[str] = []

    class Team:
        def __init__(self) -> None:
            events.append("begins")

        def end(self) -> None:
            events.append("ends")

    class Pause:
        def wait(self, seconds: float) -> bool:
            events.append("looks")
            return False

    monkeypatch.setattr(contention, "SecondTeam", Team)
    monkeypatch.setattr(threading, "Event", Pause)
    monkeypatch.setattr(contention, "waiting", lambda: next(looks))
    with pytest.raises((StopIteration, RuntimeError)):
        contention._watch()
    assert events == ["looks"] * 2 + ["begins"] + ["looks"] * 5 + ["ends"] + ["looks"] * 2


def test_it_is_watched_by_one_thread_and_not_at_all_with_a_single_thread() -> None:
    program = """
        contention.watch()
        contention.watch()
        print(json.dumps([thread.name for thread in threading.enumerate() if thread.name == "contention"]))
    """
    assert run(program) == (["contention"] if sys.platform == "linux" else [])
    assert run(program, threads=1) == []


def train() -> None:
    rows = torch.zeros(1, 4, dtype=torch.long)
    settings = TrainingSettings(steps=1, learning_rate=1e-3, warmup_steps=0)
    training.Trainer(tiny_model(), lambda step: training.Batch(rows, rows), settings, progress=False).run()


@pytest.mark.parametrize(
    ("module", "use"),
    [
        (training, train),
        (generation, lambda: generation.generate(tiny_model(), [[1, 2]], max_new_tokens=1)),
        (notebook, lambda: notebook.check("rank", namespace={})),
        (notebook, lambda: notebook.working("rank", namespace={})),
    ],
    ids=["training", "generation", "check", "working"],
)
def test_what_computes_for_long_is_watched(
    module: ModuleType, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(module, "watch", lambda: calls.append("watch"))
    use()
    assert calls
