"""One fine-tuning run from beginning to end: load, adapt, train, judge, save."""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.data import Dataset, Example
from lora_from_scratch.finetune.distributed import World, find_device
from lora_from_scratch.finetune.evaluation import (
    CARDS,
    Scores,
    check_examples,
    evaluate,
    first_cards,
    tale_perplexity,
    write_texts,
)
from lora_from_scratch.finetune.paged_optimizer import PagedAdamW
from lora_from_scratch.finetune.peak_memory import PeakMemory
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings, adamw
from lora_from_scratch.gpt2.checkpoint import BUNDLED, checkpoint_directory, load_gpt2
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.method import Method
from lora_from_scratch.support.files import check_writable, remove_leftovers, write_json

CHECKPOINT = "training-checkpoint.pt"  # in the output directory while the run is under way
REPORT = "report.json"
SAMPLES = 3
OPTIMIZERS = ("adamw", "paged-adamw")


@dataclass(frozen=True)
class Run:
    """What to do. Everything in it is data, so that a run can be handed to another process and written down."""

    method: Method
    settings: TrainingSettings
    output: Path
    model: str = "bundled"
    data: str = "story-cards"
    batch_size: int = defaults.BATCH_SIZE
    optimizer: str = "adamw"  # or "paged-adamw": its state in a file, for where memory is short
    gradient_checkpointing: bool = False
    device: str = "cpu"
    split: str = "test"  # judged on "test" or "validation"; "" trains and saves only
    cards: int = CARDS  # judged by the first so many meanings
    checkpoint_every: int = 100  # steps

    def __post_init__(self) -> None:
        for name in ("batch_size", "cards", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")


@dataclass
class Report:
    """What came of it. Peak memory and seconds are of the training alone: judging it needs the whole base model."""

    method: str
    trained_parameters: int
    total_parameters: int
    learning_rate: float
    seconds: float
    peak_memory_bytes: int
    saved_bytes: int
    final_loss: float  # mean of the last 20 steps, nats per token
    output: str
    saved_parameters: int = 0  # numbers in what was saved: of a prefix, without the MLP that was trained with it
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
    _check_output(run)
    world = World.from_environment()
    if run.batch_size < world.size:
        raise ValueError(f"batch_size must be at least {world.size}, one for each process, got {run.batch_size}")
    device = find_device(run.device)
    dataset = load_dataset(run.data)
    judged = first_cards(getattr(dataset, run.split), run.cards) if run.split else []
    memory = PeakMemory(device)
    model, tokenizer = run.method.load_base(run.model)
    run = replace(run, method=run.method.for_tokenizer(tokenizer))
    model.to(device)
    total, base = _parameters(model), _fingerprint(model)
    run.method.adapt(model)
    context = model.config.n_positions  # a method may take some of it
    if judged:
        check_examples(judged, tokenizer, context)
    completions = _completions(dataset, tokenizer, context, progress)
    model.gradient_checkpointing = run.gradient_checkpointing
    trained = sum(p.numel() for p in run.method.trainable(model).values())
    history = _trainer(run, model, completions, base, progress).run()  # its optimiser state goes: judging needs room
    world.add_up([torch.zeros(())])  # every process is done with the checkpoint before the first one deletes it
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
    if world.rank == 0:
        report.saved_bytes, report.saved_parameters = _save(run, model, tokenizer)
        if judged:
            _judge(report, run, model, tokenizer, dataset, judged)
        _write_report(report, run)
        (run.output / CHECKPOINT).unlink(missing_ok=True)
        remove_leftovers(run.output)
    return report


def _check_output(run: Run) -> None:
    """The place can be written, and what lies there is neither what this run reads nor another kind of result."""
    check_writable(run.output)
    if run.output.resolve() == checkpoint_directory(run.model).resolve():
        raise ValueError(f"the output {run.output} is the model's own directory; choose another place for the result")
    other, kind = ("config.json", "a whole model") if run.method.peft_type else (CONFIG_FILE, "an adapter")
    if (run.output / other).exists():
        raise ValueError(f"{run.output} holds {kind}, which this run would leave beside its own; choose another output")


def _completions(dataset: Dataset, tokenizer: Tokenizer, context: int, progress: bool) -> Completions:
    completions = Completions(dataset.train, tokenizer, context)
    if completions.left_out and progress:
        print(
            f"{completions.left_out:,} of {len(dataset.train):,} examples are longer than the context of "
            f"{context} tokens and are left out"
        )
    return completions


def _judge(
    report: Report, run: Run, model: GPT2, tokenizer: Tokenizer, dataset: Dataset, judged: list[Example]
) -> None:
    base, _ = load_gpt2(run.model)
    base.to(next(model.parameters()).device)
    report.tale_perplexity_before = tale_perplexity(base, tokenizer)
    report.scores, texts = evaluate(model, base, tokenizer, judged, dataset)
    mrs = list(texts)[:SAMPLES]
    before = write_texts(base, tokenizer, mrs)
    report.samples = [{"mr": mr, "before": old, "after": texts[mr]} for mr, old in zip(mrs, before, strict=True)]


def _write_report(report: Report, run: Run) -> None:
    """`report.json` beside the weights: the numbers and what they were measured with."""
    document: dict[str, Any] = {"report": asdict(report), "run": {**asdict(run), "output": str(run.output)}}
    write_json(run.output / REPORT, document)


def _trainer(run: Run, model: GPT2, completions: Completions, base: int, progress: bool) -> Trainer:
    return Trainer(
        model,
        lambda step: completions.batch_at(step, run.batch_size, run.settings.seed),
        run.settings,
        optimizers=_optimizers(run, model),
        checkpoint=run.output / CHECKPOINT,
        checkpoint_every=run.checkpoint_every,
        # Not the names of model and data: by now they may stand for something else.
        settings_tag=f"{run.method} batch {run.batch_size} model {base} data {completions.fingerprint()}",
        progress=progress,
        description=run.method.name,
    )


def _optimizers(run: Run, model: GPT2) -> list[torch.optim.Optimizer] | None:
    """The optimiser that the run names; None: the trainer's own. The file of a paged one is on the output's disk."""
    if run.optimizer == "adamw":
        return None
    usual = adamw(run.method.trainable(model), run.settings)  # for its groups; it holds no state yet
    groups = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in usual.param_groups]
    place = next(place for place in (run.output, *run.output.parents) if place.is_dir())
    return [PagedAdamW(groups, lr=run.settings.learning_rate, betas=run.settings.betas, directory=place)]


def _parameters(model: GPT2) -> int:
    """How many a model of this shape has; of a quantised one too, whose weights are no parameters of PyTorch's."""
    with torch.device("meta"):  # shapes without memory
        return sum(p.numel() for p in GPT2(model.config).parameters())


def _fingerprint(model: GPT2) -> int:
    """A number that other weights, in all likelihood, do not have: a CRC-32."""
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().numpy(), crc)
    return crc


def _save(run: Run, model: GPT2, tokenizer: Tokenizer) -> tuple[int, int]:
    """Write the result; return its size in bytes, that of nothing else that may lie beside it, and in parameters."""

    def files() -> dict[str, int]:
        return {file.name: file.stat().st_ino for file in run.output.iterdir() if file.is_file()}

    before = files()
    run.method.save(model, run.output, base_model=None if run.model == BUNDLED else run.model, tokenizer=tokenizer)
    written = [name for name, inode in files().items() if before.get(name) != inode]
    numbers = sum(_numbers_in(run.output / name) for name in written if name.endswith(".safetensors"))
    return sum((run.output / name).stat().st_size for name in written), numbers


def _numbers_in(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:  # reads the table of contents only
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
