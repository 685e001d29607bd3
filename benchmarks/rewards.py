"""Training on a reward: LoRA of rank 1 and 8 compared with full fine-tuning. The reward is the share of words without
the letter e.

    python -m benchmarks.rewards           takes about ten minutes on an idle core; can be interrupted and continued
    python -m benchmarks.rewards report    writes rewards.md

Each run is evaluated by the reward of new samples, and by the divergence of the model from the base, on text drawn from
the base.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from lora_from_scratch.finetune.evaluation import text_drawn_from
from lora_from_scratch.finetune.metrics import divergence_from_base
from lora_from_scratch.finetune.rewards import RewardSettings, mean_reward, train_on_rewards, without_letter
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method

KEPT = Path("runs") / "rewards" / "runs.jsonl"
PAGE = Path(__file__).with_name("rewards.md")
SEEDS = range(3)
STEPS = 12
METHODS: dict[str, tuple[Method, float]] = {
    "LoRA, rank 1": (LoRA(rank=1, alpha=8), 3e-3),
    "LoRA, rank 8": (LoRA(rank=8, alpha=64), 3e-3),
    "full": (FullFineTuning(), 2e-4),
}


def main() -> None:
    base, tokenizer = load_gpt2()
    drawn = text_drawn_from(base, tokenizer)
    for seed in SEEDS:
        for name, (method, rate) in METHODS.items():
            if any((row["name"], row["seed"]) == (name, seed) for row in kept()):
                continue
            model, _ = load_gpt2()
            method.adapt(model)
            settings = RewardSettings(steps=STEPS, learning_rate=rate, prompts=2, seed=seed)
            history = train_on_rewards(model, tokenizer, method, without_letter, settings)
            row = {
                "name": name,
                "seed": seed,
                "trained": sum(p.numel() for p in method.trainable(model).values()),
                "before": mean_reward(base, tokenizer, without_letter),
                "after": mean_reward(model, tokenizer, without_letter),
                "divergence": divergence_from_base(model, base, drawn),
                "rewards": history.rewards,
            }
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            with KEPT.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def kept() -> list[dict[str, Any]]:
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []


def report() -> None:
    lines = ["| method | trained | rate | reward before | after | divergence |", "|---|---:|---:|---:|---:|---:|"]
    for name, (_, rate) in METHODS.items():
        rows = [row for row in kept() if row["name"] == name]
        cells = [_mean(rows, key) for key in ("before", "after", "divergence")]
        lines.append(f"| {name} | {rows[0]['trained']:,} | {rate:g} | {' | '.join(cells)} |")
    PAGE.write_text(TEXT.format(table="\n".join(lines), steps=STEPS, seeds=len(SEEDS)), encoding="utf-8")


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows]
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


TEXT = """# Training on a reward

Written by `python -m benchmarks.rewards report`. The bundled model continues the beginnings of fairy tales, and the
reward is the share of words without the letter e. Training takes {steps} steps with 16 texts of 24 tokens each (2
prompts, groups of 8). The table shows the mean and standard deviation over {seeds} seeds. The reward is measured on 64
new samples, and the divergence from the base model, in nats per token, on text drawn from the base. The learning rates
were not tuned.

{table}
"""

if __name__ == "__main__":
    torch.set_num_threads(1)
    report() if sys.argv[1:] == ["report"] else main()
