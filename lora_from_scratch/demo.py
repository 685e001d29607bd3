"""The main job: the bundled GPT-2 learns the story cards, by full fine-tuning and by LoRA, side by side."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from lora_from_scratch.files import write_atomically
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.report import describe, table
from lora_from_scratch.finetune.run import Report, Run, finetune
from lora_from_scratch.finetune.training import TrainingSettings
from lora_from_scratch.full_finetuning import FullFineTuning
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.lora import LoRA
from lora_from_scratch.method import Method


def methods() -> list[Method]:
    """The two that the demo compares: every weight, and LoRA of rank 8 on every matrix of every block."""
    return [FullFineTuning(keep_base=False), LoRA(rank=8)]


def demo(output: str | Path, *, model: str = "bundled", steps: int = defaults.STEPS, seed: int = 0) -> list[Report]:
    """Fine-tune by each method in a process of its own (so that peak memory is each one's), show and save.

    Writes `table.md`, `demo.json`, `demo.png` and a directory for each method under `output`.
    """
    output = Path(output)
    config = GPT2Config.from_json(checkpoint_directory(model) / "config.json")
    runs = [
        Run(
            method=method,
            model=model,
            output=output / method.name,
            batch_size=defaults.BATCH_SIZE,
            settings=TrainingSettings(
                steps=steps,
                learning_rate=defaults.learning_rate_for(method.name, config),
                warmup_steps=defaults.warmup_steps_for(steps),
                weight_decay=defaults.WEIGHT_DECAY,
                seed=seed,
            ),
        )
        for method in methods()
    ]
    reports = in_fresh_processes(runs)
    text = table(reports)
    document = json.dumps([asdict(report) for report in reports], indent=1) + "\n"
    write_atomically(output / "table.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    write_atomically(output / "demo.json", lambda path: path.write_text(document, encoding="utf-8"))
    draw(reports, output / "demo.png")
    print(f"\n{text}\n\n{describe(reports)}\n")
    print(f"Table, figure and numbers: {output / 'table.md'}, {output / 'demo.png'}, {output / 'demo.json'}")
    print(f"The LoRA adapter (PEFT reads it too): {output / 'lora'}")
    print(f"The fully fine-tuned model (transformers reads it too): {output / 'full'}")
    return reports


def in_fresh_processes(runs: Sequence[Run]) -> list[Report]:
    """Carry out runs one after the other, each in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        return list(pool.map(finetune, runs))


def draw(reports: Sequence[Report], path: Path) -> None:
    """Two panels: the loss of each method, step by step; and what LoRA costs and reaches, relative to full."""
    from lora_from_scratch import plotting

    figure, (left, right) = plotting.panels(2)
    for style, report in enumerate(reports):
        plotting.curve(left, plotting.smooth(report.losses), label=report.method, style=style)
    left.set(xlabel="training step", ylabel="loss (nats per token)", title="Both learn the task")
    full, lora = reports[0], reports[-1]
    assert full.scores is not None
    assert lora.scores is not None
    ratios = {
        "trained parameters": lora.trained_parameters / full.trained_parameters,
        "bytes on disk": lora.saved_bytes / full.saved_bytes,
        "peak memory": lora.peak_memory_bytes / max(1, full.peak_memory_bytes),
        "seconds": lora.seconds / full.seconds,
        "BLEU": lora.scores.bleu / full.scores.bleu,
    }
    plotting.bars(right, {name: 100 * ratio for name, ratio in ratios.items()}, unit="%")
    right.set(xlabel="LoRA in % of full fine-tuning", title="LoRA trains and stores a fraction")
    write_atomically(path, lambda temporary: plotting.save(figure, temporary))
