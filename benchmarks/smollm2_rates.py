"""Tune the learning rates for `benchmarks.smollm2`, by the loss on validation cards.

The rates are 1 and 3 times powers of ten. The search begins at `START` and goes on until the best rate lies between two
that are worse. The model is loaded once for each method; `Method.undo` restores it, bit for bit, after each run.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from benchmarks.learning_rates import best_rung, nearest_rung, next_rung, rate_at
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.data import Example, references_by_mr
from lora_from_scratch.finetune.defaults import warmup_steps_for
from lora_from_scratch.finetune.evaluation import first_cards
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Batch, NonFiniteLossError, Trainer, TrainingSettings
from lora_from_scratch.methods.method import Method
from lora_from_scratch.models.checkpoint import AnyTokenizer, LanguageModel
from lora_from_scratch.support.files import write_json

VALIDATION_CARDS = 32
START = {"full": 1e-4, "lora": 1e-3, "dora": 1e-3, "qlora": 1e-3, "layernorm": 1e-2}


def settings_for(steps: int, rate: float, precision: str, seed: int = 0) -> TrainingSettings:
    """The settings of every run, tuning or not."""
    return TrainingSettings(
        steps=steps, learning_rate=rate, warmup_steps=warmup_steps_for(steps), precision=precision, seed=seed
    )


def tune(method: Method, file: Path, *, model: str, steps: int, batch_size: int, precision: str) -> None:
    """Search the best learning rate of a method, and write the validation loss at each rate to `file`.

    If it is interrupted and called again, rates that are in the file are not tried again.
    """
    losses: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    start = nearest_rung(START[method.name])
    loaded: tuple[LanguageModel, AnyTokenizer] | None = None
    while (rung := next_rung({nearest_rung(float(r)): _number(x) for r, x in losses.items()}, start)) is not None:
        loaded = loaded or method.load_base(model)
        began = time.process_time()
        loss = _validation_loss(method, *loaded, settings_for(steps, rate_at(rung), precision), batch_size)
        losses[f"{rate_at(rung):.0e}"] = loss
        write_json(file, losses)
        print(
            f"{method.name} {rate_at(rung):.0e}: {loss} ({time.process_time() - began:.0f} s of CPU time)", flush=True
        )


def best_rate(losses: dict[str, float | None]) -> float:
    """The rate with the lowest validation loss.

    Raises:
        ValueError: it has not been compared with both of its neighbours.
    """
    by_rung = {nearest_rung(float(rate)): _number(loss) for rate, loss in losses.items()}
    best = best_rung(by_rung, min(by_rung))
    if {best - 1, best + 1} - set(by_rung) or not math.isfinite(by_rung[best]):
        raise ValueError(f"the best of the learning rates {', '.join(losses)} is at the edge: tune on")
    return rate_at(best)


def _number(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _validation_loss(
    method: Method, model: LanguageModel, tokenizer: AnyTokenizer, settings: TrainingSettings, batch_size: int
) -> float | None:
    """Train, and return the loss on the first reference of validation cards in nats per token; None if it diverged."""
    data = load_dataset("story-cards")
    completions = Completions(data.train, tokenizer, model.config.n_positions)
    firsts = [
        Example(mr, references[0])
        for mr, references in references_by_mr(first_cards(data.validation, VALIDATION_CARDS)).items()
    ]
    firsts.sort(key=lambda example: len(example.mr) + len(example.ref))

    def batch_at(step: int) -> Batch:
        return completions.batch_at(step, batch_size, settings.seed)

    method.adapt(model)
    try:
        Trainer(model, batch_at, settings, method=method, progress=False).run()
        loss = completion_loss(model, Completions(firsts, tokenizer, model.config.n_positions).batches(batch_size=8))
    except NonFiniteLossError:
        loss = math.inf
    finally:
        method.undo(model)
    return loss if math.isfinite(loss) else None
