"""The training runs behind `benchmarks/folklore.py`, each an entry of a JSON file, and the search of learning rates.

A run has 40 steps of batch 8 on short story cards, unless its setting says otherwise; the loss is that of 48 held-out
cards. The learning rate of each setting is tuned: neighbouring rates differ by a factor of 2 (SGD: 4). The search
begins with seed 0 and ends when the rate with the lowest mean loss has been run with all three seeds and lies between
two rates that are worse on the seeds that they were run with. So seed 0 takes part in the tuning and in the result.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import nn

from benchmarks.learning_rates import best_rung, next_rung
from lora_from_scratch.compare.folklore import relative_change_by_block
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.data import Example, references_by_mr
from lora_from_scratch.finetune.evaluation import tale_perplexity
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import NonFiniteLossError, Trainer, TrainingSettings
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA, delta_weight, lora_layers
from lora_from_scratch.methods.method import Method
from lora_from_scratch.support.files import write_json
from lora_from_scratch.support.linear_layers import weight_of

SEEDS = (0, 1, 2)
STEPS, BATCH = 40, 8
POOL = 1600  # training cards, the shortest
CARDS = 48  # held-out cards, the shortest

Result = dict[str, Any]  # "setting", "rate", "seed", "loss" (None: diverged), "tales", "blocks", "seconds"


@dataclass(frozen=True)
class Setting:
    """What is trained and how, except for the learning rate and the seed."""

    method: str = "lora"
    rank: int = 8
    alpha: float = 64
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    reverse: bool = False  # start with A zero and B random
    optimizer: str = "adamw"
    schedule: str = "linear"
    batch: int = BATCH
    steps: int = STEPS
    examples: int = POOL  # fewer: another subset of the pool for each seed
    wrong: float = 0.0  # fraction of the examples that have the text of another card
    cipher: bool = False  # the texts are in another language: every letter is replaced
    start: float = field(default=3e-3, compare=False)  # where the search of the learning rate begins
    factor: float = field(default=2.0, compare=False)  # between neighbouring learning rates

    @property
    def name(self) -> str:
        """The fields that differ from the defaults: "lora rank=1"."""
        own = [f for f in fields(self) if f.compare and f.name != "method" and getattr(self, f.name) != f.default]
        return " ".join([self.method, *(f"{f.name}={_plain(getattr(self, f.name))}" for f in own)])

    def rate(self, rung: int) -> float:
        return float(f"{self.start * self.factor**rung:.4g}")

    def make_method(self, seed: int) -> Method:
        if self.method == "full":
            return FullFineTuning(keep_base=False)
        return LoRA(rank=self.rank, alpha=self.alpha, targets=self.targets, dropout=self.dropout, seed=seed)


def _plain(value: object) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)


# --- The data ----------------------------------------------------------------------------------------


def in_cipher(text: str) -> str:
    """The text with every vowel replaced by the next vowel, and every consonant by the next consonant."""
    table: dict[str, str | int | None] = {}
    for letters in ("aeiou", "bcdfghjklmnpqrstvwxyz"):
        for case in (str.lower, str.upper):
            table.update(zip(case(letters), case(letters[1:] + letters[0]), strict=True))
    return text.translate(str.maketrans(table))


def _short(examples: Sequence[Example], number: int) -> list[Example]:
    return sorted(examples, key=lambda example: len(example.mr) + len(example.ref))[:number]


def _translated(examples: Sequence[Example]) -> list[Example]:
    """The first sentence of each text, in the other language: its letters need about three times as many tokens."""
    return [Example(e.mr, in_cipher(e.ref.partition(".")[0] + ".")) for e in examples]


def training_examples(setting: Setting, seed: int) -> list[Example]:
    pool = _short(load_dataset("story-cards").train, POOL)
    if setting.examples < POOL:
        pool = Random(f"subset {seed}").sample(pool, setting.examples)
    if setting.wrong:
        places = Random(f"wrong {seed}").sample(range(len(pool)), round(setting.wrong * len(pool)))
        texts = {place: pool[other].ref for place, other in zip(places, places[1:] + places[:1], strict=True)}
        pool = [Example(e.mr, texts.get(place, e.ref)) for place, e in enumerate(pool)]
    return _translated(pool) if setting.cipher else pool


@cache
def held_out(cipher: bool) -> list[Any]:
    cards = references_by_mr(load_dataset("story-cards").validation)
    firsts = _short([Example(mr, refs[0]) for mr, refs in cards.items()], CARDS)
    _, tokenizer = load_gpt2("bundled")
    return Completions(_translated(firsts) if cipher else firsts, tokenizer, 256).batches(8)


# --- One run -----------------------------------------------------------------------------------------


def carry_out(setting: Setting, rate: float, seed: int) -> Result:
    """Train, and measure the loss of the held-out cards, and of the default setting also what it forgot and changed."""
    model, tokenizer = load_gpt2("bundled")
    setting.make_method(seed).adapt(model)
    if setting.reverse:
        reverse_start(model, seed)
    completions = Completions(training_examples(setting, seed), tokenizer, model.config.n_positions)
    settings = TrainingSettings(
        steps=setting.steps,
        learning_rate=rate,
        warmup_steps=defaults.warmup_steps_for(setting.steps),
        schedule=setting.schedule,
        seed=seed,
    )
    trainer = Trainer(
        model,
        lambda step: completions.batch_at(step, setting.batch, seed),
        settings,
        optimizers=sgd(model, rate) if setting.optimizer == "sgd" else None,
        progress=False,
    )
    result: Result = {"setting": setting.name, "rate": rate, "seed": seed, "loss": None}
    began = time.process_time()
    try:
        trainer.run()
    except NonFiniteLossError:
        return result
    result["seconds"] = round(time.process_time() - began, 1)
    loss = completion_loss(model, held_out(setting.cipher))
    result["loss"] = round(loss, 5) if math.isfinite(loss) else None
    if setting.name in ("lora", "full"):
        result["tales"] = round(tale_perplexity(model, tokenizer), 2)
    if setting.name == "lora":
        result["blocks"] = [round(share, 5) for share in changes_of_blocks(model)]
    return result


def sgd(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Plain stochastic gradient descent, without momentum: it keeps no state."""
    return [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)]


@torch.no_grad()
def reverse_start(model: nn.Module, seed: int) -> None:
    """Make B random and A zero, with the same law as A's (uniform, up to one over the root of the inner width)."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_A.zero_()
        nn.init.kaiming_uniform_(layer.lora_B, a=math.sqrt(5), generator=generator)


@torch.no_grad()
def changes_of_blocks(model: nn.Module) -> list[float]:
    layers = lora_layers(model)
    weights = {name: weight_of(layer.base) for name, layer in layers.items()}
    changes = {name: delta_weight(layer.lora_A, layer.lora_B, layer.scaling) for name, layer in layers.items()}
    return list(relative_change_by_block(weights, changes).values())


# --- All runs ----------------------------------------------------------------------------------------


class NotRunError(LookupError):
    """A result is missing, and nothing may be run."""


class Runs:
    """The results of the runs, and of other measurements, in a JSON file. A stored run is not repeated."""

    def __init__(self, file: Path, run: bool = True) -> None:
        self.file, self.run = file, run
        document = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        self.results: dict[tuple[str, float, int], Result] = {(r["setting"], r["rate"], r["seed"]): r for r in document}

    def result(self, setting: str, rate: float, seed: int, carry_out: Callable[[], Result]) -> Result:
        key = (setting, rate, seed)
        if key not in self.results:
            if not self.run:
                raise NotRunError(setting)
            self.results[key] = carry_out()
            write_json(self.file, list(self.results.values()))
            print(self.results[key], flush=True)
        return self.results[key]

    def loss(self, setting: Setting, rate: float, seed: int) -> float:
        result = self.result(setting.name, rate, seed, lambda: carry_out(setting, rate, seed))
        return math.inf if result["loss"] is None else float(result["loss"])

    def at_rate(self, setting: Setting, rate: float) -> list[Result]:
        """The results of all seeds at this learning rate."""
        for seed in SEEDS:
            self.loss(setting, rate, seed)
        return [self.results[setting.name, rate, seed] for seed in SEEDS]

    def tuned(self, setting: Setting) -> list[Result]:
        """The results of all seeds at the best learning rate, which is searched for as the module says."""
        losses: dict[int, list[float]] = {0: [self.loss(setting, setting.rate(0), SEEDS[0])]}
        while True:
            means = {rung: fmean(known) for rung, known in losses.items()}
            best = best_rung(means, 0)
            rung = next_rung(means, 0)
            if rung is None:
                if len(losses[best]) == len(SEEDS):
                    return self.at_rate(setting, setting.rate(best))
                rung = best
            known = losses.setdefault(rung, [])
            known.append(self.loss(setting, setting.rate(rung), SEEDS[len(known)]))
