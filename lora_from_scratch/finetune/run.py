"""One fine-tuning run from beginning to end: load, adapt, train, judge, save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_from_scratch.files import write_atomically
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.data import Dataset, Example, load_dataset
from lora_from_scratch.finetune.evaluation import Scores, evaluate, tale_perplexity, write_texts
from lora_from_scratch.finetune.memory import PeakMemory
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.method import Method

CHECKPOINT = "training-checkpoint.pt"  # in the output directory while the run is under way
SAMPLES = 3


@dataclass(frozen=True)
class Run:
    """What to do. Everything in it is data, so that a run can be handed to another process and written down."""

    method: Method
    settings: TrainingSettings
    output: Path
    model: str = "bundled"
    data: str = "story-cards"
    batch_size: int = 16
    gradient_checkpointing: bool = False
    device: str = "cpu"
    split: str = "test"  # judged on "test" or "validation"; "" trains and saves only


@dataclass
class Report:
    """What came of it. Bytes and seconds are of the training alone."""

    method: str
    trained_parameters: int
    total_parameters: int
    learning_rate: float
    seconds: float
    peak_memory_bytes: int
    saved_bytes: int
    final_loss: float  # mean of the last 20 steps, nats per token
    output: str
    scores: Scores | None = None
    tale_perplexity_before: float = float("nan")
    samples: list[dict[str, str]] = field(default_factory=list)  # each with mr, before, after
    losses: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Trained parameters over all parameters of the base model."""
        return self.trained_parameters / self.total_parameters


def finetune(run: Run, progress: bool = True) -> Report:
    """Carry out a run. Killed and started again, it goes on from its last checkpoint.

    Raises:
        ValueError, OSError: whatever is wrong with the model, the data, the settings or the place to save to,
            before the training where it can be known before.
    """
    dataset = load_dataset(run.data)
    device = _device(run.device)
    memory = PeakMemory(device)
    model, tokenizer = load_gpt2(run.model)
    model.to(device)
    total = sum(p.numel() for p in model.parameters())
    run.method.adapt(model)
    model.gradient_checkpointing = run.gradient_checkpointing
    trained = sum(p.numel() for p in run.method.trainable(model).values())
    trainer = _trainer(run, model, tokenizer, dataset, progress)
    history = trainer.run()
    report = Report(
        method=run.method.name,
        trained_parameters=trained,
        total_parameters=total,
        learning_rate=run.settings.learning_rate,
        seconds=history.seconds,
        peak_memory_bytes=memory.bytes(),
        saved_bytes=0,
        final_loss=sum(history.losses[-20:]) / len(history.losses[-20:]),
        output=str(run.output),
        losses=history.losses,
    )
    model.gradient_checkpointing = False
    if trainer.world.rank == 0:
        run.method.save(model, run.output, tokenizer=tokenizer)
        report.saved_bytes = _bytes_in(run.output)
        if run.split:
            _judge(report, run, model, tokenizer, dataset, device)
        _write_report(report, run)
        (run.output / CHECKPOINT).unlink(missing_ok=True)
    return report


def _trainer(run: Run, model: GPT2, tokenizer: Tokenizer, dataset: Dataset, progress: bool) -> Trainer:
    completions = Completions(dataset.train, tokenizer, model.config.n_positions)
    if completions.left_out and progress:
        print(
            f"{completions.left_out:,} of {len(dataset.train):,} examples are longer than the context of "
            f"{model.config.n_positions} tokens and are left out"
        )
    return Trainer(
        model,
        lambda step: completions.batch_at(step, run.batch_size, run.settings.seed),
        run.settings,
        checkpoint=run.output / CHECKPOINT,
        settings_tag=_tag(run),
        progress=progress,
        description=run.method.name,
    )


def _judge(report: Report, run: Run, model: GPT2, tokenizer: Tokenizer, dataset: Dataset, device: torch.device) -> None:
    base, _ = load_gpt2(run.model)
    base.to(device)
    report.tale_perplexity_before = tale_perplexity(base, tokenizer)
    cards = _first_cards(getattr(dataset, run.split), 300)
    report.scores, texts = evaluate(model, base, tokenizer, cards, dataset)
    mrs = list(texts)[:SAMPLES]
    before = write_texts(base, tokenizer, mrs)
    report.samples = [{"mr": mr, "before": old, "after": texts[mr]} for mr, old in zip(mrs, before, strict=True)]


def _first_cards(examples: Sequence[Example], cards: int) -> list[Example]:
    """The examples of the first so many meanings: enough for a judgement, and not the whole afternoon."""
    kept = set(list(dict.fromkeys(example.mr for example in examples))[:cards])
    return [example for example in examples if example.mr in kept]


def _write_report(report: Report, run: Run) -> None:
    """`report.json` beside the weights: the numbers and what they were measured with."""
    document: dict[str, Any] = {"report": asdict(report), "run": {**asdict(run), "output": str(run.output)}}
    text = json.dumps(document, indent=1, default=str) + "\n"
    write_atomically(run.output / "report.json", lambda path: path.write_text(text, encoding="utf-8"))


def _tag(run: Run) -> str:
    return f"{run.model} {run.data} {run.method} batch {run.batch_size}"


def _bytes_in(directory: Path) -> int:
    """What has to be kept: the files of the result, without the training checkpoint and the report."""
    passing = {CHECKPOINT, "report.json"}
    return sum(file.stat().st_size for file in directory.iterdir() if file.is_file() and file.name not in passing)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but PyTorch sees no GPU here; use --device cpu")
    return torch.device(name)
