"""Which forgets more at equal quality, full fine-tuning or LoRA? Three seeds, each method at its tuned rate.

    python -m benchmarks.forgetting [--model MODEL] [--seeds 0 1 2]

Writes `benchmarks/forgetting.md`. A seed draws the order of the examples and LoRA's first values; the
cards are the same.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from lora_from_scratch.compare.demo import methods
from lora_from_scratch.compare.side_by_side import in_fresh_processes, tuned_run
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.run import Report
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config

PLACE = Path(__file__).with_suffix(".md")


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and in brackets the least and the most."""
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def row(reports: Sequence[Report]) -> str:
    scores = [report.scores for report in reports if report.scores]
    cells = [
        reports[0].method,
        f"{reports[0].learning_rate:.1e}",
        spread([s.bleu for s in scores], 1),
        spread([100 * s.slot_errors for s in scores], 1),
        spread([s.tale_perplexity for s in scores], 1),
        spread([s.divergence for s in scores], 3),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=defaults.STEPS)
    options = parser.parse_args()
    config = GPT2Config.from_json(checkpoint_directory(options.model) / "config.json")
    lines: list[str] = []
    before = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for place, method in enumerate(methods()):
            rate = defaults.learning_rate_for(method.name, config)
            runs = [
                tuned_run(
                    methods(seed)[place],
                    Path(scratch) / f"{place}-{seed}",
                    rate=rate,
                    model=options.model,
                    steps=options.steps,
                    seed=seed,
                )
                for seed in options.seeds
            ]
            reports = in_fresh_processes(runs)
            before = reports[0].tale_perplexity_before
            lines.append(row(reports))
            print(lines[-1], flush=True)
    head = [
        f"# Forgetting at the tuned learning rates, {len(options.seeds)} seeds, test cards",
        "",
        "`python -m benchmarks.forgetting` writes this file. Each cell: mean (least to most).",
        f"Tale perplexity of the base model: {before:.1f}; its divergence from itself is 0.",
        "",
        "| method | learning rate | BLEU | slot errors, % | tale perplexity | divergence, nats per token |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    PLACE.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
