"""The texts, the sides and the runs of `long_context`."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.learning_rates import best_rung, nearest_rung, next_rung, rate_at
from benchmarks.lora_vs_peft import saved_activations
from benchmarks.memorising import Result, Runs
from lora_from_scratch.finetune.data import Example
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import (
    Batch,
    NonFiniteLossError,
    Trainer,
    TrainingSettings,
    adamw,
    autocast,
)
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.gpt2.model import GPT2, IGNORE_INDEX, Embedding, next_token_loss
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.long_lora import LongLoRA, stretch_positions
from lora_from_scratch.methods.method import Method

FACTOR, GROUPS = 4, 4
TOKENS = 1_024
LENGTHS = (256, 512, TOKENS)  # of the texts of the test
QUARTER = TOKENS // 4
TEST_TEXTS, VALIDATION_TEXTS = 8, 6  # of `TOKENS` tokens; there are more of the shorter ones
TUNING_SEED, SEEDS = 0, (1, 2, 3)
VALIDATION, TEST = 1_000, 2_000  # the seeds of these texts
WARMUP, LAST = 3, 10  # steps
DIVERGED = 100.0  # stored as the loss of a run that diverged
PRECISIONS = ("bf16", "fp32")
ROUNDS = 3  # of the measurement of the cost


# --- The texts ---------------------------------------------------------------------------------------


@cache
def tokenizer() -> Tokenizer:
    return load_gpt2("bundled")[1]


def documents(split: str, number: int, tokens: int, seed: int) -> Tensor:
    """(number, tokens): tales of the story cards one after another, then their cards in the reverse order (unit 20).

    The card of the first tale comes last, a whole text away from it. Room that is left between tales and cards is
    filled with line breaks.
    """
    pool: list[Example] = list(getattr(load_dataset("story-cards"), split))
    random.Random(seed).shuffle(pool)
    encode, pieces = tokenizer().encode, iter(pool)
    return torch.tensor([document(pieces, encode, tokens) for _ in range(number)])


def document(examples: Iterator[Example], encode: Callable[[str], list[int]], tokens: int) -> list[int]:
    """The first examples that fit, and the one that does not is left out."""
    tales: list[int] = []
    cards: list[int] = []
    while True:
        example = next(examples)
        tale, card = encode(f"{example.ref}\n"), encode(f"{example.mr}\n")
        room = tokens - len(tales) - len(cards)
        if len(tale) + len(card) > room:
            return tales + encode("\n")[:1] * room + cards
        tales, cards = tales + tale, card + cards


def labels_of(texts: Tensor) -> Tensor:
    """The texts, with `IGNORE_INDEX` for the line breaks that fill up: those that follow another line break."""
    breaks = texts == tokenizer().encode("\n")[0]
    filling = breaks & F.pad(breaks, (1, 0))[:, :-1]
    return texts.masked_fill(filling, IGNORE_INDEX)


@cache
def test_texts() -> dict[int, Tensor]:
    """The texts of the test by their length, equally many tokens of each."""
    return {n: documents("test", TEST_TEXTS * TOKENS // n, n, TEST + n) for n in LENGTHS}


# --- The sides ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """What is compared: a method, and where the search for its learning rate begins."""

    label: str
    method: Method
    start: float = 3e-3

    @property
    def sparse(self) -> bool:
        return isinstance(self.method, LongLoRA) and self.method.groups > 1


LORA, LORA_PLUS, LONG, FULL = "LoRA", "LoRA, embeddings and norms", "LongLoRA", "full fine-tuning"
SIDES = (
    Side(LORA, LongLoRA(factor=FACTOR, groups=1, embeddings_and_norms=False)),
    Side(LORA_PLUS, LongLoRA(factor=FACTOR, groups=1)),
    Side(LONG, LongLoRA(factor=FACTOR, groups=GROUPS)),
    Side(FULL, FullFineTuning(keep_base=False), 1e-3),
)


def extend(model: GPT2, factor: int = FACTOR) -> None:
    """Interpolate the positions for a context that is `factor` times as long, as LongLoRA does."""
    table = stretch_positions(model.transformer.wpe.weight.detach(), factor)
    model.transformer.wpe = Embedding.from_pretrained(table, freeze=False)
    model.config = replace(model.config, n_positions=len(table))


def prepare(side: Side, model: GPT2, seed: int = 0) -> Method:
    """Adapt a base model for a side; its context is `FACTOR` times as long afterwards. The seed is that of A."""
    method = side.method
    if isinstance(method, LongLoRA):
        method = replace(method, seed=seed)
    else:
        extend(model)
    method.adapt(model)
    return method


# --- Runs --------------------------------------------------------------------------------------------


@torch.no_grad()
def losses(model: GPT2, texts: Tensor, as_in_training: bool = False) -> Tensor:
    """The loss of each token after the first in nats, (texts, tokens - 1), in fp32; NaN for what only fills up.

    Args:
        as_in_training: with the attention of training. If false, every token attends to all tokens before it.
    """
    model.train(as_in_training)  # the model has no dropout
    found = []
    for rows in texts.split(max(1, 2 * TOKENS // texts.shape[1])):
        labels = labels_of(rows)[:, 1:]
        each = F.cross_entropy(model(rows)[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=IGNORE_INDEX)
        found.append(each.masked_fill(labels == IGNORE_INDEX, math.nan))
    return torch.cat(found)


def tested(model: GPT2, sparse: bool) -> Result:
    """The mean losses on the test texts.

    "last quarter" and "last quarter alone" are of the same tokens (the last quarter of the longest texts without its
    first token), after all tokens before them, or after those of the quarter only.
    """
    texts = test_texts()
    found = {str(n): losses(model, texts[n]) for n in LENGTHS}
    found["last quarter"] = found[str(TOKENS)][:, -QUARTER + 1 :]
    found["last quarter alone"] = losses(model, texts[TOKENS][:, -QUARTER:])
    found["as in training"] = losses(model, texts[TOKENS], as_in_training=True) if sparse else found[str(TOKENS)]
    return {key: float(value.nanmean()) for key, value in found.items()}


def untrained() -> Result:
    """The base with interpolated positions; "original" is the loss on the shortest texts with its own positions."""
    model, _ = load_gpt2("bundled")
    original = float(losses(model, test_texts()[LENGTHS[0]]).nanmean())
    extend(model)
    return rounded({"original": original} | tested(model, sparse=False))


def train(side: Side, steps: int, seed: int, rate: float) -> tuple[GPT2, Method, list[float]]:
    """Train the bundled model on one text per step. Returns it with its method and training losses.

    Raises:
        NonFiniteLossError: training diverged.
    """
    model, _ = load_gpt2("bundled")
    method = prepare(side, model, seed)
    texts = documents("train", steps, TOKENS, seed)
    settings = TrainingSettings(
        steps=steps, learning_rate=rate, warmup_steps=WARMUP, precision="bf16", weight_decay=0.0, seed=seed
    )
    batch = Batch(texts, labels_of(texts))
    trainer = Trainer(model, lambda step: batch.rows(step, step + 1), settings, method=method, progress=False)
    return model, method, trainer.run().losses


def tuning_run(side: Side, steps: int, rate: float) -> Result:
    """The validation loss of a learning rate, at the whole length with full attention."""
    try:
        model, _, _ = train(side, steps, TUNING_SEED, rate)
    except NonFiniteLossError:
        return {"rate": rate, "loss": DIVERGED}
    loss = float(losses(model, documents("validation", VALIDATION_TEXTS, TOKENS, VALIDATION)).nanmean())
    return rounded({"rate": rate, "loss": loss if math.isfinite(loss) else DIVERGED})


def run(side: Side, steps: int, seed: int, rate: float) -> Result:
    """The test losses; "training" is the mean training loss of the last steps."""
    model, method, history = train(side, steps, seed, rate)
    parameters = sum(p.numel() for p in method.trainable(model).values())
    training = sum(history[-LAST:]) / len(history[-LAST:])
    return rounded({"rate": rate, "parameters": parameters, "training": training} | tested(model, side.sparse))


def rounded(result: Result) -> Result:
    return {key: value if key in ("rate", "parameters") else float(f"{value:.6g}") for key, value in result.items()}


Measured = tuple[list[Result], list[Result]]  # the sweep in order of the rate, and the results of `SEEDS`


def measured(
    runs: Runs,
    side: Side,
    steps: int,
    tune: Callable[[Side, int, float], Result] = tuning_run,
    carry_out: Callable[[Side, int, int, float], Result] = run,
) -> Measured:
    """Search the learning rate of a side, and make the runs with the best one. Stored runs are not repeated."""
    start, tried = nearest_rung(side.start), dict[int, Result]()
    while (rung := next_rung({key: one["loss"] for key, one in tried.items()}, start)) is not None:
        rate = rate_at(rung)
        tried[rung] = runs.result(f"{side.label}, {steps} steps, rate {rate:.0e}", partial(tune, side, steps, rate))
    best = rate_at(best_rung({key: one["loss"] for key, one in tried.items()}, start))
    results = [
        runs.result(
            f"{side.label}, {steps} steps, rate {best:.0e}, seed {seed}", partial(carry_out, side, steps, seed, best)
        )
        for seed in SEEDS
    ]
    return [tried[key] for key in sorted(tried)], results


# --- What a step costs -------------------------------------------------------------------------------


def cost() -> Result:
    """For each side and each precision: the least processor seconds of a step with one text in some
    rounds, and the bytes that the forward pass keeps for the backward pass, as "label, precision, seconds" and
    "label, precision, bytes"."""
    found: Result = {}
    ids = documents("train", 1, TOKENS, TUNING_SEED)
    for precision in PRECISIONS:
        for number in range(ROUNDS):
            for side in SIDES if number % 2 else reversed(SIDES):
                seconds, kept = step_of(side, ids, precision)
                name = f"{side.label}, {precision}"
                found[f"{name}, bytes"] = kept
                found[f"{name}, seconds"] = min(seconds, found.get(f"{name}, seconds", math.inf))
    return rounded(found)


def step_of(side: Side, ids: Tensor, precision: str) -> tuple[float, int]:
    """The processor seconds of the second training step of a side, and the bytes that the first one keeps."""
    model, _ = load_gpt2("bundled")
    method = prepare(side, model)
    model.train()
    optimizer = adamw(method.trainable(model), TrainingSettings(1, 1e-4))

    def forward() -> Tensor:
        with autocast(ids.device, precision):
            logits = model(ids)
        return next_token_loss(logits, ids)

    kept = saved_activations(forward, model.parameters())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    started = time.process_time()
    forward().backward()
    optimizer.step()
    return time.process_time() - started, kept
