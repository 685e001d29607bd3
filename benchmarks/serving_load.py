"""Load test of `lora-from-scratch serve` with a thousand concurrent clients; extends serving.json, writes serving.md.

    python -m benchmarks.serving_load --folder runs/adapters

The server runs in its own process with 1,000 adapters and listens on the loopback interface. There are three runs: with
a queue that has room for all clients, with a smaller queue, and with a server that is killed during the run and started
again. For a sample of the adapters, the responses are compared with the output of the merged models.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import serving_table
from benchmarks.lora_vs_peft import base_model
from benchmarks.make_adapters import make_adapters, name_of
from benchmarks.serving import Results
from lora_from_scratch.gpt2.checkpoint import load_tokenizer
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.methods.registry import load_adapter

ADAPTERS, COMPARED = 1000, 4
TOKENS = 8


class Served:
    """A running server process."""

    def __init__(self, folder: Path, waiting: int) -> None:
        command = [sys.executable, "-m", "lora_from_scratch", "serve", "--adapters", str(folder), "--port", "0"]
        started = time.perf_counter()
        self.process = subprocess.Popen([*command, "--waiting", str(waiting)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.seconds = time.perf_counter() - started
        self.address = next(word for word in line.split() if word.startswith("http"))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait()


def prompt_of(number: int) -> str:
    return f"Tale number {number}. Once upon a time"


def asked_of(clients: int) -> list[str]:
    draw = random.Random(0)
    return [name_of(n) for n in draw.choices(range(ADAPTERS), [1 / (n + 1) for n in range(ADAPTERS)], k=clients)]


async def ask(
    address: str, names: list[str], numbers: Sequence[int], answered: Callable[[], object] = lambda: None
) -> list[tuple[int, str]]:
    """The status and text that each client receives, with all requests sent at once. Status 0: connection lost.

    Args:
        answered: is called after each response.
    """
    async with httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as client:

        async def one(number: int) -> tuple[int, str]:
            body = {"model": names[number], "prompt": prompt_of(number), "max_tokens": TOKENS, "temperature": 0}
            try:
                answer = await client.post(f"{address}/completions", json=body)
            except httpx.TransportError:
                return 0, ""
            answered()
            return answer.status_code, answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text

        return list(await asyncio.gather(*map(one, numbers)))


def expected(folder: Path, names: list[str]) -> dict[int, str]:
    """The texts that the merged models generate, for the clients of a few adapters."""
    model, tokenizer = base_model("bundled").eval(), load_tokenizer()
    texts = {}
    for name in sorted(set(names))[:COMPARED]:
        method = load_adapter(model, folder / name)
        method.merge(model)
        numbers = [n for n, other in enumerate(names) if other == name]
        ids = [tokenizer.encode(prompt_of(n)) for n in numbers]
        for number, tokens in zip(
            numbers, generate(model, ids, max_new_tokens=TOKENS, eos_id=tokenizer.eos_id), strict=True
        ):
            texts[number] = tokenizer.decode(tokens)
        method.undo(model)
    return texts


def summary(answers: list[tuple[int, str]], right: dict[int, str], **more: Any) -> dict[str, Any]:
    statuses = [status for status, _ in answers]
    different = sum(answers[n][0] == 200 and answers[n][1] != text for n, text in right.items())
    answered, refused = statuses.count(200), statuses.count(429)
    errors = len(answers) - answered - refused
    compared = sum(answers[n][0] == 200 for n in right)
    counts = {"requests": len(answers), "answered": answered, "refused": refused, "errors": errors}
    return counts | {"different": different, "compared": compared, **more}


def run_once(folder: Path, names: list[str], right: dict[int, str], waiting: int) -> dict[str, Any]:
    server = Served(folder, waiting)
    answers = asyncio.run(ask(server.address, names, range(len(names))))
    code = server.stop()
    return summary(answers, right, start_seconds=server.seconds, exit_code=code)


def run_killed(folder: Path, names: list[str], right: dict[int, str]) -> dict[str, Any]:
    """Kill the server after a third of the responses, start it again, and repeat the lost requests."""
    server = Served(folder, len(names))
    left = itertools.count(len(names) // 3, -1)

    def count() -> None:
        if next(left) == 0:
            os.kill(server.process.pid, signal.SIGKILL)

    answers = asyncio.run(ask(server.address, names, range(len(names)), count))
    server.process.wait()
    lost = [number for number, (status, _) in enumerate(answers) if status == 0]
    again = Served(folder, len(names))
    second = asyncio.run(ask(again.address, names, lost))
    again.stop()
    for number, answer in zip(lost, second, strict=True):
        answers[number] = answer
    return summary(answers, right, lost_by_the_kill=len(lost), start_seconds=again.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--clients", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder, results = arguments.folder / "thousand", Results()
    model = base_model("bundled")
    make_adapters(folder, ADAPTERS, model.config, (4, 32), 64)
    names = asked_of(arguments.clients)
    right = expected(folder, names)
    results.get("load/room for all", lambda: run_once(folder, names, right, waiting=arguments.clients))
    results.get("load/room for 256", lambda: run_once(folder, names, right, waiting=256))
    results.get("load/killed and started again", lambda: run_killed(folder, names, right))
    serving_table.write(results.values)


if __name__ == "__main__":
    main()
