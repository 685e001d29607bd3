"""One fine-tuning run from beginning to end: load, adapt, train, save, evaluate."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
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
from lora_from_scratch.gpt2.checkpoint import BUNDLED
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.method import Method
from lora_from_scratch.models.checkpoint import AnyTokenizer, LanguageModel, find_model, load_language_model
from lora_from_scratch.support.files import check_writable, is_leftover, remove_leftovers, write_json

CHECKPOINT = "training-checkpoint.pt"  # in the output directory during the run
REPORT = "report.json"
SAMPLES = 3
OPTIMIZERS = ("adamw", "paged-adamw")


@dataclass(frozen=True)
class Run:
    """The specification of a run: plain data, so that it can be passed to another process and saved."""

    method: Method
    settings: TrainingSettings
    output: Path
    model: str = "bundled"
    data: str = "story-cards"
    batch_size: int = defaults.BATCH_SIZE
    optimizer: str = "adamw"  # or "paged-adamw", which keeps its state in a file to save memory
    gradient_checkpointing: bool = False
    device: str = "cpu"
    split: str = "test"  # evaluate on "test" or "validation"; "": do not evaluate
    cards: int = CARDS  # the number of meanings to evaluate on, from the beginning of the split
    checkpoint_every: int = 100  # steps
    overwrite: bool = False  # whether the result of another run in `output` may be replaced

    def __post_init__(self) -> None:
        for name in ("batch_size", "cards", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")


@dataclass
class Report:
    """The result of a run.

    Peak memory and seconds are those of training only; evaluation also needs the whole base model.
    """

    method: str
    trained_parameters: int
    total_parameters: int
    learning_rate: float
    seconds: float
    peak_memory_bytes: int
    saved_bytes: int
    final_loss: float  # mean of the last 20 steps, nats per token
    output: str
    saved_parameters: int = 0  # number of saved parameters; for a prefix, without the MLP that was trained with it
    learned_text: str = ""  # where what was learned can be read, such as a prompt of real tokens
    scores: Scores | None = None
    tale_perplexity_before: float = float("nan")
    samples: list[dict[str, str]] = field(default_factory=list)  # each with mr, before, after
    losses: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Trained parameters over all parameters of the base model."""
        return self.trained_parameters / self.total_parameters


def finetune(run: Run, progress: bool = True) -> Report:
    """Carry out a run. If it is interrupted and called again, it resumes from its last checkpoint.

    Raises:
        ValueError, OSError: something is wrong with the model, the data, the settings or the output folder. Raised
            before training wherever possible.
    """
    _check_output(run)
    world = World.from_environment()
    if run.batch_size < world.size:
        raise ValueError(f"batch_size must be at least {world.size}, one per process, got {run.batch_size}")
    device = find_device(run.device)
    dataset = load_dataset(run.data)
    evaluated = first_cards(getattr(dataset, run.split), run.cards) if run.split else []
    memory = PeakMemory(device)
    model, tokenizer = run.method.load_base(run.model)
    run = replace(run, method=run.method.for_tokenizer(tokenizer))
    model.to(device)
    total, base = _parameters(model), _fingerprint(model)
    run.method.adapt(model)
    context = model.config.n_positions  # a method may take up some of it
    if evaluated:
        check_examples(evaluated, tokenizer, context)
    completions = _completions(dataset, tokenizer, context, progress)
    model.gradient_checkpointing = run.gradient_checkpointing
    trained = sum(p.numel() for p in run.method.trainable(model).values())
    # The trainer is not kept, which frees the optimiser's state for the evaluation.
    history = _trainer(run, model, completions, base, memory, progress).run()
    world.all_reduce([torch.zeros(())])  # a barrier: no process still needs the checkpoint when it is deleted
    report = Report(
        method=run.method.name,
        trained_parameters=trained,
        total_parameters=total,
        learning_rate=run.settings.learning_rate,
        seconds=history.seconds,
        peak_memory_bytes=history.peak_memory,
        saved_bytes=0,
        final_loss=sum(history.losses[-20:]) / len(history.losses[-20:]),
        output=str(run.output),
        losses=history.losses,
    )
    model.gradient_checkpointing = False
    report.learned_text = run.method.readable(model, tokenizer)
    if world.rank == 0:
        report.saved_bytes, report.saved_parameters = _save(run, model, tokenizer)
        if evaluated:
            _evaluate(report, run, model, tokenizer, dataset, evaluated)
        _write_report(report, run)
        (run.output / CHECKPOINT).unlink(missing_ok=True)
        remove_leftovers(run.output)
    return report


def _check_output(run: Run) -> None:
    """Check that the output folder is writable and holds neither this run's base model nor another kind of result."""
    check_writable(run.output)
    if run.output.resolve() == find_model(run.model).directory.resolve():
        raise ValueError(f"the output {run.output} is the model's own directory; choose another output")
    other, kind = ("config.json", "a whole model") if run.method.peft_type else (CONFIG_FILE, "an adapter")
    if (run.output / other).exists():
        raise ValueError(f"{run.output} holds {kind}, and this run would add its own result; choose another output")
    if not run.overwrite:
        _refuse_to_replace(run)


def _refuse_to_replace(run: Run) -> None:
    """Refuse an output folder that holds another run's result or unrelated files.

    The same run may be repeated, and an interrupted run may be resumed.
    """
    choose = "choose another output, or use --overwrite"
    if (run.output / REPORT).exists():
        different = _differences(run)
        if different:
            raise ValueError(f"{run.output} holds the result of another run (different: {different}); {choose}")
    elif not (run.output / CHECKPOINT).exists() and run.output.is_dir():
        names = sorted(path.name for path in run.output.iterdir() if not is_leftover(path))
        if names:
            raise ValueError(f"{run.output} holds other files ({', '.join(names[:3])}); {choose}")


def _differences(run: Run) -> str:
    """The names of the settings in which the run that wrote the report differs from this one."""
    try:
        document = json.loads((run.output / REPORT).read_text(encoding="utf-8"))
        before, method = dict(document["run"]), document["report"]["method"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its report cannot be read"
    if method != run.method.name:
        return "method"
    now = json.loads(json.dumps(asdict(run), default=str))
    parts = {name: (before.pop(name, {}), now.pop(name)) for name in ("method", "settings")}
    for place in ("output", "checkpoint_every", "overwrite"):
        before.pop(place, None)
        now.pop(place)
    names = [name for old, new in ((before, now), *parts.values()) for name in new if old.get(name) != new[name]]
    return ", ".join(dict.fromkeys(names))


def _completions(dataset: Dataset, tokenizer: AnyTokenizer, context: int, progress: bool) -> Completions:
    completions = Completions(dataset.train, tokenizer, context)
    if completions.left_out and progress:
        print(
            f"{completions.left_out:,} of {len(dataset.train):,} examples are longer than the context of "
            f"{context} tokens and are skipped"
        )
    if completions.end_removed and progress:
        print(
            f"{completions.end_removed:,} of {len(dataset.train):,} references end with {tokenizer.end}; it was "
            "removed from them, as one is added to every reference"
        )
    return completions


def _evaluate(
    report: Report, run: Run, model: LanguageModel, tokenizer: AnyTokenizer, dataset: Dataset, examples: list[Example]
) -> None:
    base, _ = load_language_model(run.model)
    base.to(next(model.parameters()).device)
    report.tale_perplexity_before = tale_perplexity(base, tokenizer)
    report.scores, texts = evaluate(model, base, tokenizer, examples, dataset)
    mrs = list(texts)[:SAMPLES]
    before = write_texts(base, tokenizer, mrs)
    report.samples = [{"mr": mr, "before": old, "after": texts[mr]} for mr, old in zip(mrs, before, strict=True)]


def _write_report(report: Report, run: Run) -> None:
    """Write `report.json` beside the weights: the results, and the run that produced them."""
    document: dict[str, Any] = {"report": asdict(report), "run": {**asdict(run), "output": str(run.output)}}
    write_json(run.output / REPORT, document)


def _trainer(
    run: Run, model: LanguageModel, completions: Completions, base: int, memory: PeakMemory, progress: bool
) -> Trainer:
    return Trainer(
        model,
        lambda step: completions.batch_at(step, run.batch_size, run.settings.seed),
        run.settings,
        method=run.method,
        optimizers=_paged_optimizers(run, model) if run.optimizer == "paged-adamw" else None,
        checkpoint=run.output / CHECKPOINT,
        checkpoint_every=run.checkpoint_every,
        peak_memory=memory.bytes,
        # Fingerprints instead of names: what the names of the model and the data refer to may have changed.
        settings_tag=f"{run.method} batch {run.batch_size} model {base} data {completions.fingerprint()}",
        progress=progress,
        description=run.method.name,
    )


def _paged_optimizers(run: Run, model: LanguageModel) -> Callable[[], list[torch.optim.Optimizer]]:
    """A function that makes the optimiser whose state is in a file, on the same disk as the output."""

    def optimizers() -> list[torch.optim.Optimizer]:
        usual = adamw(run.method.parameter_groups(model), run.settings)  # only for its groups; it has no state yet
        groups = [{name: group[name] for name in ("params", "weight_decay", "lr")} for group in usual.param_groups]
        place = next(place for place in (run.output, *run.output.parents) if place.is_dir())
        return [PagedAdamW(groups, lr=run.settings.learning_rate, betas=run.settings.betas, directory=place)]

    return optimizers


def _parameters(model: LanguageModel) -> int:
    """The parameter count of a base model; quantised weights, which are no `nn.Parameter`, count too."""
    if not isinstance(model, GPT2):
        return sum(p.numel() for p in model.parameters())
    with torch.device("meta"):  # shapes without memory
        return sum(p.numel() for p in GPT2(model.config).parameters())


def _fingerprint(model: LanguageModel) -> int:
    """A CRC-32 of the weights, to tell models apart."""
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().numpy(), crc)
    return crc


def _save(run: Run, model: LanguageModel, tokenizer: AnyTokenizer) -> tuple[int, int]:
    """Save the result; return its size in bytes and in parameters, not counting other files in the folder."""

    def files() -> dict[str, int]:
        return {file.name: file.stat().st_ino for file in run.output.iterdir() if file.is_file()}

    before = files()
    run.method.save(model, run.output, base_model=None if run.model == BUNDLED else run.model, tokenizer=tokenizer)
    written = [name for name, inode in files().items() if before.get(name) != inode]
    numbers = sum(_numbers_in(run.output / name) for name in written if name.endswith(".safetensors"))
    return sum((run.output / name).stat().st_size for name in written), numbers


def _numbers_in(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:  # reads only the header
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
