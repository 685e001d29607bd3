"""Tune the learning rate of each method by itself, on the validation cards; write what came out.

    python -m benchmarks.learning_rates [--model MODEL] [--methods full lora] [--steps 300]

Writes `benchmarks/learning_rates.md`. The default of a method (`finetune/defaults.py`) is its best here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lora_from_scratch.demo import in_fresh_processes, methods
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.run import Report, Run
from lora_from_scratch.finetune.training import TrainingSettings
from lora_from_scratch.method import Method

RATES = {
    "full": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "lora": (2.5e-3, 5e-3, 1e-2, 2e-2),
}
PLACE = Path(__file__).with_suffix(".md")


def run(method: Method, rate: float, steps: int, seed: int, model: str, output: Path, split: str = "validation") -> Run:
    """One run of the sweep: the demo's, at another learning rate, judged on the validation cards."""
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


def row(report: Report) -> str:
    s = report.scores
    assert s is not None
    return (
        f"| {report.method} | {report.learning_rate:.1e} | {s.bleu:.1f} | {100 * s.slot_errors:.1f} % | "
        f"{s.perplexity:.3f} | {s.tale_perplexity:.1f} | {s.divergence:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--steps", type=int, default=defaults.STEPS)
    parser.add_argument("--methods", nargs="+", default=list(RATES))
    options = parser.parse_args()
    lines = [
        f"# Learning rates, {options.steps} steps of batch {defaults.BATCH_SIZE}, validation cards, seed 0",
        "",
        "`python -m benchmarks.learning_rates` writes this file.",
        "",
        "| method | learning rate | BLEU | slot errors | perplexity | tale perplexity | divergence |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for method in methods():
            for rate in RATES[method.name] if method.name in options.methods else ():
                out = Path(scratch) / f"{method.name}-{rate}"
                [report] = in_fresh_processes([run(method, rate, options.steps, 0, options.model, out)])
                lines.append(row(report))
                print(lines[-1], flush=True)
                PLACE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
