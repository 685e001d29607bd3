"""Training while other programs use the processors: with `support.contention` and without it.

    python -m benchmarks.busy_computer [--rounds 3] [--seconds 10] [--neighbours 0 2 10] [--write]

One process trains the bundled model with LoRA and one trains it without watching, each alone with the given number of
neighbours (processes in an endless loop), in turns. The table gives the time of a step, as a multiple of the quiet time
of a step without watching. Goals: at most 1.03 when quiet, 2.2 with two neighbours, 12 with ten.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).with_suffix(".md")
GOALS = {0: 1.03, 2: 2.2, 10: 12.0}
STEPS = """
import sys, time
import torch
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.support.contention import watch

watches, seconds = sys.argv[1] == "with", float(sys.argv[2])
if watches:
    watch()
torch.manual_seed(0)
model, _ = load_gpt2()
lora = LoRA(rank=8)
lora.adapt(model)
optimizer = torch.optim.AdamW(lora.trainable(model).values(), 3e-3)
tokens = torch.randint(0, 4096, (8, 96))

def step():
    logits = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

begun = time.monotonic()
while time.monotonic() - begun < 2:
    step()
begun, count = time.monotonic(), 0
while time.monotonic() - begun < seconds:
    step()
    count += 1
print((time.monotonic() - begun) / count)
"""


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that each keep a processor busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def seconds_a_step(how: str, seconds: float) -> float:
    command = [sys.executable, "-c", STEPS, how, str(seconds)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 2, 10])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    took: dict[tuple[int, str], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for count in options.neighbours:
            with neighbours(count):
                for how in ("without", "with"):
                    took[count, how].append(seconds_a_step(how, options.seconds))
    quiet = statistics.median(took[0, "without"]) if 0 in options.neighbours else 1.0
    lines = ["| neighbours | without watching | with watching | goal |", "|---:|---:|---:|---:|"]
    for count in options.neighbours:
        cells = [
            f"{statistics.median(times) / quiet:.2f} ({min(times) / quiet:.2f} to {max(times) / quiet:.2f})"
            for times in (took[count, "without"], took[count, "with"])
        ]
        lines.append(f"| {count} | {' | '.join(cells)} | {GOALS.get(count, '')} |")
    text = "\n".join(lines)
    print(text)
    if options.write:
        head = f"# Training on a busy computer\n\n{str(__doc__).partition('[--write]')[2].strip()}\n\n"
        about = f"{os.cpu_count()} processors; a quiet step takes {quiet * 1000:.0f} ms; "
        about += f"medians of {options.rounds} rounds, with the range.\n\n"
        TABLE.write_text(f"{head}{about}{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
