"""The demo: fine-tuning the bundled GPT-2 on the story cards, with full fine-tuning and with LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lora_from_scratch.compare.side_by_side import run_in_processes, tuned_run
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.distributed import find_device
from lora_from_scratch.finetune.report import describe, table
from lora_from_scratch.finetune.run import Report
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.support.files import check_writable, write_atomically, write_json


def methods(seed: int = 0) -> list[Method]:
    """The two methods of the demo: full fine-tuning, and LoRA of rank 8 on every matrix of every block."""
    return [FullFineTuning(keep_base=False), LoRA(seed=seed)]


def demo(
    output: str | Path,
    *,
    model: str = "bundled",
    steps: int = defaults.STEPS,
    seed: int = 0,
    jobs: int | None = None,
    device: str = "cpu",
) -> list[Report]:
    """Fine-tune with each method, print the results and save them.

    Each method runs in its own process, so that its peak memory can be measured. Writes `table.md`, `demo.json`,
    `demo.png` and a directory for each method under `output`.
    """
    output = Path(output)
    check_writable(output)
    find_device(device)
    config = GPT2Config.from_json(checkpoint_directory(model) / "config.json")
    runs = [
        tuned_run(
            method,
            output / method.name,
            rate=method.learning_rate(config.n_embd),
            model=model,
            steps=steps,
            seed=seed,
            device=device,
        )
        for method in methods(seed)
    ]
    reports = run_in_processes(runs, jobs)
    text = table(reports)
    write_atomically(output / "table.md", lambda path: path.write_text(text + "\n", encoding="utf-8"))
    write_json(output / "demo.json", [asdict(report) for report in reports])
    draw(reports, output / "demo.png")
    print(f"\n{text}\n\n{describe(reports)}\n")
    print(f"Table, figure and numbers: {output / 'table.md'}, {output / 'demo.png'}, {output / 'demo.json'}")
    print(f"LoRA adapter (PEFT can load it too): {output / 'lora'}")
    print(f"Fully fine-tuned model (transformers can load it too): {output / 'full'}")
    return reports


def relative(report: Report, to: Report) -> dict[str, float]:
    """The costs and the score of one run, in % of those of another. Quantities that are 0 there are omitted."""
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
    """Draw two panels: the loss of each method by step, and LoRA's costs and score relative to full fine-tuning."""
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
