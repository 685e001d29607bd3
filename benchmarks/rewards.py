"""Training on a reward: LoRA of rank 1 and 8 compared with full fine-tuning, at several learning rates. The reward is
the share of words without the letter e.

    python -m benchmarks.rewards           takes about ten minutes on an idle core; can be interrupted and continued
    python -m benchmarks.rewards report    writes rewards.md

Each run is evaluated by the reward of new samples for other prompts, by the divergence from the base model on these
samples, and by the perplexity of the project's own tales.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from lora_from_scratch.finetune.rewards import RewardSettings, score_on_rewards, train_on_rewards, without_letter
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method

KEPT = Path("runs") / "rewards" / "runs.jsonl"
PAGE = Path(__file__).with_name("rewards.md")
SEEDS = range(3)
STEPS = 12
LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RATES: dict[str, tuple[float, ...]] = {
    "LoRA, rank 1": LORA_RATES,
    "LoRA, rank 8": (3e-4, *LORA_RATES[:-1]),
    "full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
ENOUGH = 0.02  # a rate counts as good if its reward is within this of the best


def method_of(name: str, seed: int) -> Method:
    if name == "full":
        return FullFineTuning()
    return LoRA(rank=1, alpha=8, seed=seed) if name == "LoRA, rank 1" else LoRA(rank=8, alpha=64, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["train", "report"], default="train")
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"train": run, "report": report}[options.what]()


def run() -> None:
    base, tokenizer = load_gpt2()
    before = score_on_rewards(base, base, tokenizer, without_letter)
    print(f"base: reward {before.reward:.3f}, perplexity {before.perplexity:.1f}")
    for seed in SEEDS:
        for name, rates in RATES.items():
            for rate in rates:
                if any((row["name"], row["rate"], row["seed"]) == (name, rate, seed) for row in kept()):
                    continue
                model, _ = load_gpt2()
                method = method_of(name, seed)
                method.adapt(model)
                settings = RewardSettings(steps=STEPS, learning_rate=rate, prompts=2, precision="fp32", seed=seed)
                history = train_on_rewards(model, tokenizer, method, without_letter, settings, progress=False)
                scores = score_on_rewards(model, base, tokenizer, without_letter)
                row = {
                    "name": name,
                    "rate": rate,
                    "seed": seed,
                    "trained": sum(p.numel() for p in method.trainable(model).values()),
                    "before": before.reward,
                    "perplexity before": before.perplexity,
                    "reward": scores.reward,
                    "divergence": scores.divergence,
                    "perplexity": scores.perplexity,
                    "text": scores.texts[0],
                    "rewards": history.rewards,
                }
                KEPT.parent.mkdir(parents=True, exist_ok=True)
                with KEPT.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def kept() -> list[dict[str, Any]]:
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []


def chosen_rate(name: str) -> float:
    """The smallest rate whose mean reward is nearly the best."""
    means = {rate: statistics.mean(row["reward"] for row in rows_of(name, rate)) for rate in RATES[name]}
    return min(rate for rate, mean in means.items() if mean >= max(means.values()) - ENOUGH)


def rows_of(name: str, rate: float) -> list[dict[str, Any]]:
    return [row for row in kept() if (row["name"], row["rate"]) == (name, rate)]


def report() -> None:
    lines = ["| method | trained | rate | reward | divergence | perplexity |", "|---|---:|---:|---:|---:|---:|"]
    for name, rates in RATES.items():
        for rate in rates:
            rows = rows_of(name, rate)
            mark = "**" if rate == chosen_rate(name) else ""
            perplexities = ", ".join(f"{row['perplexity']:,.0f}" for row in rows)
            lines.append(
                f"| {name} | {rows[0]['trained']:,} | {mark}{rate:g}{mark} | {_mean(rows, 'reward')} | "
                f"{_mean(rows, 'divergence')} | {perplexities} |"
            )
    first = kept()[0]
    text = TEXT.format(
        table="\n".join(lines),
        steps=STEPS,
        seeds=len(SEEDS),
        enough=ENOUGH,
        before=f"{first['before']:.2f}",
        perplexity=f"{first['perplexity before']:.0f}",
    )
    PAGE.write_text(text, encoding="utf-8")


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


TEXT = """# Training on a reward

Written by `python -m benchmarks.rewards report`. The bundled model continues the beginnings of fairy tales, and the
reward is the share of words without the letter e. Training takes {steps} steps with 16 texts of 24 tokens each (2
prompts, groups of 8), without a penalty for the divergence from the base model. The table shows the mean and standard
deviation over {seeds} seeds. The reward is measured on 64 new samples for other prompts ({before} before training), the
divergence KL(model || base) on the same samples, in nats per token, and the perplexity on the project's own tales
({perplexity} before training; one number per seed). The bold rate of each method is the smallest whose reward is within
{enough} of its best.

{table}

In all runs with a reward above 0.95 the model has stopped writing sentences: its texts repeat a few short words, other
tokens or commas.
"""

if __name__ == "__main__":
    main()
