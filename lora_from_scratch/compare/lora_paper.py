"""The LoRA paper's experiment on E2E (Hu et al. 2021, arXiv:2106.09685, table 3), with the settings of its appendix.

One run for each seed: train, save the adapter, write a text for each meaning of the test set by beam search, score the
texts. Every part resumes where it was interrupted. What differs from the paper is in `docs/e2e.md`.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from lora_from_scratch.finetune.completions import Completions, prompt_text
from lora_from_scratch.finetune.data import Dataset, references_by_mr
from lora_from_scratch.finetune.distributed import find_device
from lora_from_scratch.finetune.e2e_metrics import E2EScores, e2e_scores, missing
from lora_from_scratch.finetune.evaluation import check_examples
from lora_from_scratch.finetune.label_smoothing import LabelSmoothing, labels_of
from lora_from_scratch.finetune.report import markdown
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer, TrainingSettings, autocast
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.methods.adapter_files import WEIGHTS_FILE
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.models.checkpoint import find_model
from lora_from_scratch.support.files import check_writable, write_atomically, write_json
from lora_from_scratch.support.progress_bar import tqdm

CHECKPOINT = "training-checkpoint.pt"
RUN, TEXTS, SCORES = "run.json", "texts.json", "scores.json"  # in the folder of a seed
TABLE = "table.md"
CHUNK = 16  # meanings whose texts are written between two saves


@dataclass(frozen=True)
class Recipe:
    """The settings of the experiment; the defaults are the paper's (appendix D.3, table 11, GPT-2 on E2E)."""

    rank: int = 4
    alpha: float = 32
    dropout: float = 0.1
    learning_rate: float = 2e-4
    warmup_steps: int = 500
    epochs: int = 5
    batch_size: int = 8
    weight_decay: float = 0.01
    label_smoothing: float = 0.1
    beams: int = 10
    length_penalty: float = 0.9
    no_repeat_ngram_size: int = 4
    max_new_tokens: int = 64  # as in the authors' script
    steps: int | None = None  # instead of the epochs
    meanings: int | None = None  # of the test set, from its beginning; None: all
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "beams", "max_new_tokens", "steps", "meanings"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {value}")

    def steps_for(self, examples: int) -> int:
        return self.steps or math.ceil(self.epochs * examples / self.batch_size)

    def method(self, seed: int) -> LoRA:
        """LoRA on the queries and the values of every block."""
        targets = ("c_attn.q", "c_attn.v")
        return LoRA(rank=self.rank, alpha=self.alpha, targets=targets, dropout=self.dropout, seed=seed)

    def training(self, steps: int, seed: int) -> TrainingSettings:
        """Without clipping, as in the authors' script. In a short run, the warm-up takes at most half of the steps."""
        return TrainingSettings(
            steps=steps,
            learning_rate=self.learning_rate,
            warmup_steps=min(self.warmup_steps, steps // 2),
            weight_decay=self.weight_decay,
            clip_norm=0.0,
            precision=self.precision,
            seed=seed,
        )


@dataclass(frozen=True)
class Published:
    """A row of the paper's table 3; its +- is in `spread`."""

    name: str
    width: int  # of the model's hidden states: 1024 is GPT-2 medium, 1280 GPT-2 large
    scores: E2EScores
    spread: E2EScores | None = None


PUBLISHED = (
    Published("full fine-tuning, GPT-2 medium", 1024, E2EScores(68.2, 8.62, 46.2, 71.0, 2.47)),
    Published(
        "LoRA, GPT-2 medium", 1024, E2EScores(70.4, 8.85, 46.8, 71.8, 2.53), E2EScores(0.1, 0.02, 0.2, 0.1, 0.02)
    ),
    Published("full fine-tuning, GPT-2 large", 1280, E2EScores(68.5, 8.78, 46.0, 69.9, 2.45)),
    Published("LoRA, GPT-2 large", 1280, E2EScores(70.4, 8.89, 46.8, 72.0, 2.47), E2EScores(0.1, 0.02, 0.2, 0.2, 0.02)),
)


def lora_paper(
    output: str | Path,
    data: str,
    *,
    model: str = "gpt2-medium",
    seeds: Sequence[int] = (0, 1, 2),
    recipe: Recipe | None = None,
    device: str = "cpu",
    checkpoint_every: int = 500,
    progress: bool = True,
) -> list[E2EScores]:
    """Carry out the experiment, print the table, and write it to `output/table.md`. Returns the scores of each seed.

    If it is interrupted and called again, it resumes; seeds that are finished with the same settings are not repeated.

    Args:
        data: an E2E CSV file, or a directory with E2E's three files; see `load_dataset`.
        model: "bundled", the directory of a GPT-2, or its name on the Hugging Face Hub.
        recipe: None: the paper's.
        checkpoint_every: steps between checkpoints.

    Raises:
        ValueError, OSError: something is wrong with the model, the data or the output folder, or the folder has the
            result of other settings.
    """
    output, recipe = Path(output), recipe or Recipe()
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"name each seed once, and at least one; got {' '.join(map(str, seeds)) or 'none'}")
    check_writable(output)
    where = find_device(device)
    dataset = load_dataset(data)
    if not find_model(model).is_gpt2:
        raise ValueError(f"{model} is not a GPT-2, whose queries and values the paper's recipe adapts; see finetune")
    scores = []
    for seed in seeds:
        base, tokenizer = load_gpt2(model)
        run = _Run(recipe, seed, output / f"seed-{seed}", model, dataset, tokenizer, progress, checkpoint_every)
        run.check(base)
        width = base.config.n_embd
        trained = 2 * base.config.n_layer * recipe.rank * 2 * width  # A and B of the queries and of the values
        scores.append(run.carry_out(base.to(where)))
    text = table(scores, f"LoRA, {model}", width)
    notes = _notes(recipe, len(references_by_mr(dataset.test)), trained)
    write_atomically(output / TABLE, lambda path: path.write_text(f"{text}\n\n{notes}\n", encoding="utf-8"))
    print(f"\n{text}\n\n{notes}\n\nTable: {output / TABLE}")
    return scores


@dataclass
class _Run:
    """The run of one seed."""

    recipe: Recipe
    seed: int
    output: Path
    model: str
    dataset: Dataset
    tokenizer: Tokenizer
    progress: bool
    checkpoint_every: int

    def check(self, base: GPT2) -> None:
        """Record what is being run, or refuse a folder in which something else was."""
        data = zlib.crc32(repr((self.dataset.train, self.dataset.test)).encode())
        wanted = {**asdict(self.recipe), "seed": self.seed, "model": _fingerprint(base), "data": data}
        before = _read(self.output / RUN)
        if before is not None and before != wanted:
            different = [name for name in wanted if before.get(name) != wanted[name]]
            raise ValueError(
                f"{self.output} has a run with other settings (different: {', '.join(different)}); use another output"
            )
        write_json(self.output / RUN, wanted)

    def carry_out(self, model: GPT2) -> E2EScores:
        """Train, write and score, as far as that is not done yet."""
        finished = _read(self.output / SCORES)
        if finished is not None:
            return E2EScores(**finished)
        examples = self.dataset.test
        check_examples(examples, self.tokenizer, model.config.n_positions)
        if (self.output / WEIGHTS_FILE).exists():
            load_adapter(model, self.output)
        else:
            self._train(model)
        (self.output / CHECKPOINT).unlink(missing_ok=True)
        references = references_by_mr(examples)
        mrs = list(references)[: self.recipe.meanings]
        texts = self._write(model, mrs)
        scores = e2e_scores([texts[mr] for mr in mrs], [references[mr] for mr in mrs])
        if None not in asdict(scores).values():  # otherwise it is computed again when the package is installed
            write_json(self.output / SCORES, asdict(scores))
        return scores

    def _train(self, model: GPT2) -> None:
        recipe = self.recipe
        method = recipe.method(self.seed)
        method.adapt(model)
        completions = Completions(self.dataset.train, self.tokenizer, model.config.n_positions)
        steps = recipe.steps_for(len(completions.rows))
        smoothed = LabelSmoothing(model, recipe.label_smoothing)
        trainer = Trainer(
            smoothed,
            lambda step: labels_of(completions.batch_at(step, recipe.batch_size, self.seed)),
            recipe.training(steps, self.seed),
            method=method,
            checkpoint=self.output / CHECKPOINT,
            checkpoint_every=self.checkpoint_every,
            settings_tag=json.dumps(_read(self.output / RUN), sort_keys=True),
            progress=self.progress,
            description=f"seed {self.seed}",
        )
        trainer.run()
        method.save(model, self.output, base_model=self.model)

    def _write(self, model: GPT2, mrs: Sequence[str]) -> dict[str, str]:
        """A text for each meaning, by beam search; saved after every few."""
        texts: dict[str, str] = _read(self.output / TEXTS) or {}
        waiting = sorted((mr for mr in mrs if mr not in texts), key=len)  # keeps the padding of a batch short
        chunks = range(0, len(waiting), CHUNK)
        device = next(model.parameters()).device
        for start in tqdm(chunks, desc=f"seed {self.seed}: texts", unit="batch", disable=not self.progress):
            chunk = waiting[start : start + CHUNK]
            with autocast(device, self.recipe.precision):
                texts |= dict(zip(chunk, self._beam_search(model, chunk), strict=True))
            write_json(self.output / TEXTS, texts)
        return texts

    def _beam_search(self, model: GPT2, mrs: Sequence[str]) -> list[str]:
        recipe = self.recipe
        prompts = [self.tokenizer.encode(prompt_text(mr)) for mr in mrs]
        room = model.config.n_positions - max(map(len, prompts))
        new = generate(
            model,
            prompts,
            max_new_tokens=min(recipe.max_new_tokens, room),
            num_beams=recipe.beams,
            length_penalty=recipe.length_penalty,
            no_repeat_ngram_size=recipe.no_repeat_ngram_size,
            eos_id=self.tokenizer.eos_id,
        )
        return [self.tokenizer.decode(ids).strip() for ids in new]


# --- The table -------------------------------------------------------------------------------------


def table(scores: Sequence[E2EScores], name: str, width: int) -> str:
    """Our scores (mean, and the smallest and largest of several seeds) and the paper's, in Markdown."""
    same = [row for row in PUBLISHED if row.width == width]
    lines: list[tuple[str, ...]] = [("", "BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr")]
    lines.append((f"ours: {name}", *(_ours([getattr(s, field) for s in scores], digits) for field, digits in _COLUMNS)))
    for row in same or PUBLISHED:
        lines.append((f"paper: {row.name}", *(_published(row, field, digits) for field, digits in _COLUMNS)))
    return markdown(lines)


_COLUMNS = (("bleu", 1), ("nist", 2), ("meteor", 1), ("rouge_l", 1), ("cider", 2))  # with the digits of the paper


def _ours(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    middle = f"{mean(known):.{digits}f}"
    return middle if len(known) == 1 else f"{middle} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def _published(row: Published, field: str, digits: int) -> str:
    spread = "" if row.spread is None else f" ± {getattr(row.spread, field):.{digits}f}"
    return f"{getattr(row.scores, field):.{digits}f}{spread}"


def _notes(recipe: Recipe, meanings: int, trained: int) -> str:
    """What has to be known to compare the rows."""
    said = [f"Trained: {trained:,} numbers", *missing()]
    if changed := [name for name, value in asdict(recipe).items() if value != getattr(Recipe(), name)]:
        said.append(f"Not the paper's recipe: {', '.join(f'{name} {getattr(recipe, name)}' for name in changed)}")
    used = min(meanings, recipe.meanings or meanings)
    said.append(f"Texts: {used} of {meanings} meanings")
    return "\n".join(f"- {sentence}." for sentence in said)


# --- Helpers ---------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """A JSON file, or None if there is none or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _fingerprint(model: GPT2) -> int:
    """A CRC-32 of the weights, to tell models apart."""
    crc = 0
    for tensor in model.state_dict().values():
        crc = zlib.crc32(tensor.cpu().contiguous().numpy(), crc)
    return crc
