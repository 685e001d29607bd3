"""The main job: the bundled GPT-2 learns the story cards, by full fine-tuning and by LoRA, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lora_from_scratch.compare.side_by_side import in_fresh_processes, tuned_run
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.report import describe, table
from lora_from_scratch.finetune.run import Report
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.support.files import check_writable, write_atomically, write_json


def methods(seed: int = 0) -> list[Method]:
    """The two that the demo compares: every weight, and LoRA of rank 8 beside every matrix of every block."""
    return [FullFineTuning(keep_base=False), LoRA(seed=seed)]


def demo(
    output: str | Path, *, model: str = "bundled", steps: int = defaults.STEPS, seed: int = 0, jobs: int | None = None
) -> list[Report]:
    """Fine-tune by each method in a process of its own (so that peak memory is each one's), show and save.

    Writes `table.md`, `demo.json`, `demo.png` and a directory for each method under `output`.
    """
    output = Path(output)
    check_writable(output)
    config = GPT2Config.from_json(checkpoint_directory(model) / "config.json")
    runs = [
        tuned_run(
            method,
            output / method.name,
            rate=defaults.learning_rate_for(method.name, config),
            model=model,
            steps=steps,
            seed=seed,
        )
        for method in methods(seed)
    ]
    reports = in_fresh_processes(runs, jobs)
    text = table(reports)
    write_atomically(output / "table.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    write_json(output / "demo.json", [asdict(report) for report in reports])
    draw(reports, output / "demo.png")
    print(f"\n{text}\n\n{describe(reports)}\n")
    print(f"Table, figure and numbers: {output / 'table.md'}, {output / 'demo.png'}, {output / 'demo.json'}")
    print(f"The LoRA adapter (PEFT reads it too): {output / 'lora'}")
    print(f"The fully fine-tuned model (transformers reads it too): {output / 'full'}")
    return reports


def relative(report: Report, to: Report) -> dict[str, float]:
    """What one run cost and reached, in % of what another did. What that one has nothing of is left out."""
    assert report.scores is not None
    assert to.scores is not None
    pairs = {
        "trained parameters": (report.trained_parameters, to.trained_parameters),
        "bytes on disk": (report.saved_bytes, to.saved_bytes),
        "peak memory": (report.peak_memory_bytes, to.peak_memory_bytes),
        "seconds": (report.seconds, to.seconds),
        "BLEU": (report.scores.bleu, to.scores.bleu),
    }
    return {name: 100 * ours / theirs for name, (ours, theirs) in pairs.items() if theirs}


def draw(reports: Sequence[Report], path: Path) -> None:
    """Two panels: the loss of each method, step by step; and what LoRA costs and reaches, relative to full."""
    from lora_from_scratch.support import plotting

    figure, (left, right) = plotting.panels(2)
    curves = [plotting.smooth(report.losses) for report in reports]
    for style, (report, values) in enumerate(zip(reports, curves, strict=True)):
        highest = values[-1] == max(other[-1] for other in curves)
        plotting.curve(left, values, label=report.method, style=style, above=highest)
    left.set_ylim(0, None)
    plotting.label(left, x="training step", y="loss (nats per token)", title="Both learn the task")
    plotting.bars(right, relative(reports[-1], reports[0]), unit="%")
    plotting.label(right, x="LoRA in % of full fine-tuning", title="LoRA trains and stores a fraction")
    write_atomically(path, lambda temporary: plotting.save(figure, temporary))
