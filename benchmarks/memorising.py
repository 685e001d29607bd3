"""Memorising random pairs: does a higher rank help at the same number of trained parameters?

    python -m benchmarks.memorising [--steps 250] [--pairs 128] [--ranks 1]

A pair consists of a key and a value of four random tokens each, so nothing generalises from one pair to another (MoRA,
Jiang et al. 2024, section 3, makes this experiment with UUIDs). The base is a small GPT-2 that was fully trained on
other pairs; each method then learns new pairs. Its learning rate is tuned on the pairs of seed 0, with a grid that is
extended as long as the best rate is at its edge. The reported results use this rate on the pairs of seeds 1, 2 and 3.

Writes `benchmarks/memorising.md`, adding each row as soon as it is finished. Finished runs are kept in the scratch
folder and not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.finetune.training import Batch, NonFiniteLossError, Trainer, TrainingSettings
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, IGNORE_INDEX, next_token_loss
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.mora import ROTATION, SHARING, MoRA
from lora_from_scratch.methods.relora import ReLoRA
from lora_from_scratch.methods.remora import ReMoRA
from lora_from_scratch.support.files import write_atomically, write_json

PLACE = Path(__file__).with_suffix(".md")
CONFIG = GPT2Config(
    vocab_size=256, n_positions=8, n_embd=64, n_layer=2, n_head=4, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
)
KEY = VALUE = 4  # tokens
OTHER_PAIRS, OTHER_STEPS = 256, 200  # the training of the base
RATES = (3e-3, 1e-2, 3e-2)
RATIO = 10**0.5  # between adjacent rates when the grid is extended
FULL_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (1, 2, 3)
SCALING = 8.0  # s = alpha / r of LoRA and ReLoRA, the default of this library

HEAD = """\
# Memorising random pairs

{summary}

| method | trained parameters | learning rate | correct tokens of values, % | bits per token |
|---|---:|---:|---:|---:|
"""
SWEEP = """
The learning rates that were tried on a fourth set of pairs, with the resulting bits per token:

| method | learning rate: bits |
|---|---|
"""

METHODS: dict[str, Callable[[int], Method]] = {
    "lora": lambda rank: LoRA(rank=rank, alpha=SCALING * rank),
    "relora": lambda rank: ReLoRA(rank=rank, alpha=SCALING * rank, keep_base=False),
    "mora, sharing": lambda rank: MoRA(rank=rank, variant=SHARING),
    "mora, rotation": lambda rank: MoRA(rank=rank, variant=ROTATION),
    "remora": lambda rank: ReMoRA(rank=rank, keep_base=False),
}

Result = dict[str, float]  # the rate, loss in bits per token of a value, accuracy and number of parameters of a run


def random_pairs(pairs: int, seed: int) -> Batch:
    """All pairs as one batch (pairs, 8), with labels only for the values."""
    ids = torch.randint(CONFIG.vocab_size, (pairs, KEY + VALUE), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :KEY] = IGNORE_INDEX
    return Batch(ids, labels)


def learn(model: GPT2, method: Method, batch_at: Callable[[int], Batch], steps: int, rate: float) -> None:
    """Train for `steps` steps; step t has the batch `batch_at(t)`."""
    method.adapt(model)
    settings = TrainingSettings(
        steps=steps, learning_rate=rate, warmup_steps=round(0.06 * steps), precision="fp32", weight_decay=0.0
    )
    Trainer(model, batch_at, settings, method=method, progress=False).run()


@cache
def base_weights() -> dict[str, Tensor]:
    """The weights of the base, which has learned other pairs."""
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    batch = random_pairs(OTHER_PAIRS, seed=1_000)
    learn(model, FullFineTuning(keep_base=False), lambda step: batch, OTHER_STEPS, 3e-3)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def run(method: Method, pairs: int, steps: int, seed: int, rate: float) -> Result:
    """Learn the pairs of a seed. The loss is infinite if training diverges."""
    model, batch = GPT2(CONFIG), random_pairs(pairs, seed)
    model.load_state_dict(base_weights())
    try:
        learn(model, method, lambda step: batch, steps, rate)
    except NonFiniteLossError:
        return {"rate": rate, "bits": math.inf, "accuracy": 0.0, "parameters": 0}
    model.eval()
    with torch.no_grad():
        logits = model(batch.input_ids)
        predicted = logits[:, KEY - 1 : -1].argmax(dim=-1)
        accuracy = float((predicted == batch.input_ids[:, KEY:]).float().mean())
        bits = float(next_token_loss(logits, batch.labels)) / math.log(2)
    parameters = sum(p.numel() for p in method.trainable(model).values())
    return {"rate": rate, "bits": bits, "accuracy": accuracy, "parameters": parameters}


class Runs:
    """The results of runs by name, stored in a JSON file. Stored runs are not repeated."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.results: dict[str, Result] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def result(self, name: str, carry_out: Callable[[], Result]) -> Result:
        if name not in self.results:
            self.results[name] = carry_out()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, self.results)
            print(name, self.results[name], flush=True)
        return self.results[name]


def tuned(runs: Runs, name: str, carry_out: Callable[[int, float], Result], rates: tuple[float, ...]) -> list[Result]:
    """The runs of seed 0 in order of the rate. The grid is extended until the best rate is not at its edge."""

    def of(rate: float) -> Result:
        return runs.result(f"{name}, seed 0, rate {rate:.2e}", lambda: carry_out(0, rate))

    tried = [of(rate) for rate in rates]
    while (best := tried.index(min(tried, key=lambda result: result["bits"]))) in (0, len(tried) - 1):
        if best == 0:
            tried.insert(0, of(tried[0]["rate"] / RATIO))
        else:
            tried.append(of(tried[-1]["rate"] * RATIO))
    return tried


def row(runs: Runs, label: str, method: Method, pairs: int, steps: int, rates: tuple[float, ...]) -> tuple[str, str]:
    """A row of the table of results, and a row of the table of rates."""
    name = f"{label}, {method}, {pairs} pairs, {steps} steps"
    tried = tuned(runs, name, partial(run, method, pairs, steps), rates)
    best = min(tried, key=lambda result: result["bits"])["rate"]
    results = [
        runs.result(f"{name}, seed {seed}, rate {best:.2e}", partial(run, method, pairs, steps, seed, best))
        for seed in SEEDS
    ]
    cells: list[Any] = [label, f"{results[0]['parameters']:,}", f"{best:.1e}"]
    for key, factor, digits in (("accuracy", 100, 1), ("bits", 1, 2)):
        values = [factor * result[key] for result in results]
        spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        cells.append(f"{statistics.mean(values):.{digits}f} ({spread})")
    rates_tried = ", ".join(f"{result['rate']:.1e}: {result['bits']:.2f}" for result in tried)
    return f"| {' | '.join(cells)} |", f"| {label} | {rates_tried} |"


def page(rows: Sequence[tuple[str, str]], pairs: int, steps: int) -> str:
    summary = (
        f"This file is written by `python -m benchmarks.memorising`. The task is to memorise {pairs} pairs of a random "
        f"key and a random value, with {KEY} + {VALUE} tokens from a vocabulary of {CONFIG.vocab_size}, that is "
        f"{math.log2(CONFIG.vocab_size):g} bits per token, in {steps} steps on all pairs together. The base is a GPT-2 "
        f"of width {CONFIG.n_embd} with {CONFIG.n_layer} blocks that has learned {OTHER_PAIRS} other pairs. The "
        "methods adapt every matrix of every block. MoRA of rank r has about as many parameters as LoRA of rank r. "
        "ReLoRA and ReMoRA train the same number of parameters at a time, in 4 cycles, and change the weights of the "
        "base. The results are means over three sets of pairs (lowest to highest)."
    )
    results, sweep = ("\n".join(lines) for lines in zip(*rows, strict=True))
    return HEAD.format(summary=textwrap.fill(summary, 120)) + f"{results}\n{SWEEP}{sweep}\n"


def write_page(place: Path, text: str) -> None:
    write_atomically(place, lambda path: path.write_text(text, encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--output", type=Path, default=PLACE)
    parser.add_argument("--scratch", type=Path, default=Path("runs/memorising"))
    options = parser.parse_args()
    runs = Runs(options.scratch / "runs.json")
    plan = [(f"{name}, r = {rank}", method(rank), RATES) for rank in options.ranks for name, method in METHODS.items()]
    plan.append(("full", FullFineTuning(keep_base=False), FULL_RATES))
    rows: list[tuple[str, str]] = []
    for label, method, rates in plan:
        rows.append(row(runs, label, method, options.pairs, options.steps, rates))
        write_page(options.output, page(rows, options.pairs, options.steps))


if __name__ == "__main__":
    main()
