"""Tune each method by itself, on the validation cards; write what came out.

    python -m benchmarks.learning_rates [--model MODEL] [--methods full lora] [--steps 500]

Writes `benchmarks/learning_rates.md`. The defaults (`finetune/defaults.py`, and LoRA's own alpha) are the best here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from lora_from_scratch.demo import in_fresh_processes
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.run import Report, Run
from lora_from_scratch.finetune.training import TrainingSettings
from lora_from_scratch.full_finetuning import FullFineTuning
from lora_from_scratch.lora import LoRA
from lora_from_scratch.method import Method

GRID: list[tuple[Method, tuple[float, ...]]] = [
    (FullFineTuning(keep_base=False), (5e-4, 1e-3, 2e-3)),
    (LoRA(rank=8, alpha=16), (5e-3,)),
    (LoRA(rank=8, alpha=64), (2e-3, 4e-3)),
    (LoRA(rank=8, alpha=128), (2e-3,)),
]
PLACE = Path(__file__).with_suffix(".md")
HEAD = """\
# Tuning on the story cards

`python -m benchmarks.learning_rates` writes this file: {steps} steps of batch {batch}, judged on the validation cards,
seed 0. LoRA has rank 8 on every matrix of every block.

| method | learning rate | BLEU | slot errors | perplexity | tale perplexity | divergence |
|---|---:|---:|---:|---:|---:|---:|
"""


def run(method: Method, rate: float, steps: int, seed: int, model: str, output: Path, split: str = "validation") -> Run:
    """One run of the demo's kind, at another learning rate."""
    settings = TrainingSettings(
        steps=steps,
        learning_rate=rate,
        warmup_steps=defaults.warmup_steps_for(steps),
        weight_decay=defaults.WEIGHT_DECAY,
        seed=seed,
    )
    return Run(
        method=method, settings=settings, output=output, model=model, batch_size=defaults.BATCH_SIZE, split=split
    )


def label(method: Method) -> str:
    return f"lora, alpha {method.alpha:g}" if isinstance(method, LoRA) else method.name


def row(method: Method, report: Report) -> str:
    s = report.scores
    assert s is not None
    return (
        f"| {label(method)} | {report.learning_rate:.1e} | {s.bleu:.1f} | {100 * s.slot_errors:.1f} % | "
        f"{s.perplexity:.3f} | {s.tale_perplexity:.1f} | {s.divergence:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--steps", type=int, default=defaults.STEPS)
    parser.add_argument("--methods", nargs="+", default=["full", "lora"])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come, two at once
    grid = [(method, rate) for method, rates in GRID if method.name in options.methods for rate in rates]
    with tempfile.TemporaryDirectory() as scratch:
        runs = [
            run(method, rate, options.steps, 0, options.model, Path(scratch) / str(place))
            for place, (method, rate) in enumerate(grid)
        ]
        reports = in_fresh_processes(runs, at_once=2)
    rows = [row(method, report) for (method, _), report in zip(grid, reports, strict=True)]
    text = HEAD.format(steps=options.steps, batch=defaults.BATCH_SIZE) + "\n".join(rows) + "\n"
    PLACE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
