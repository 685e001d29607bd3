"""Tune the learning rate of each method by its loss on the validation cards, and write the results.

    python -m benchmarks.learning_rates [--methods dora pissa] [--steps 500] [--shard 1/2] [--results FOLDER]

The rates are 1 and 3 times powers of ten. The search begins at the rate in the method's file and goes on until the best
rate lies between two that are worse, so the best is never at the edge. Each run leaves a small JSON file in the results
folder, and is not repeated. To use several machines, give each its `--shard`, collect the files in one folder, and run
the command again without `--shard`: it writes `learning_rates.json` and `learning_rates.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_from_scratch.compare.shootout import contestants
from lora_from_scratch.compare.side_by_side import model_fingerprint, tuned_run
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.data import Example, references_by_mr
from lora_from_scratch.finetune.evaluation import first_cards
from lora_from_scratch.finetune.metrics import completion_loss
from lora_from_scratch.finetune.run import Run, finetune
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import NonFiniteLossError
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.models.checkpoint import load_language_model
from lora_from_scratch.support.files import write_atomically, write_json
from lora_from_scratch.support.shard import EVERYTHING, parse_shard

CARDS = 64  # validation cards for the loss
PLACE = Path(__file__).with_suffix(".md")
RUNGS = range(-12, 7)  # from 1e-6 to 1e3

Result = dict[str, Any]  # "method", "steps", "learning_rate", "loss" (None: it diverged), and more from older sweeps


# --- The search --------------------------------------------------------------------------------------


def rate_at(rung: int) -> float:
    """The learning rate on a rung: 1e-3 on rung -6, 3e-3 on rung -5, 1e-2 on rung -4."""
    return float(f"{(1, 3)[rung % 2]}e{rung // 2}")


def nearest_rung(rate: float) -> int:
    return min(RUNGS, key=lambda rung: abs(math.log(rate_at(rung) / rate)))


def best_rung(losses: dict[int, float], start: int) -> int:
    """The rung with the lowest loss; of several, the one nearest to the start, or the lowest if all diverged."""
    return min(losses, key=lambda rung: (losses[rung], abs(rung - start) if math.isfinite(losses[rung]) else rung))


def next_rung(losses: dict[int, float], start: int) -> int | None:
    """The rung to try next, or None if the best so far has been compared with both of its neighbours."""
    if not losses:
        return start
    best = best_rung(losses, start)
    return next((rung for rung in (best + 1, best - 1) if rung not in losses and rung in RUNGS), None)


# --- The runs ----------------------------------------------------------------------------------------


def validation_loss(run: Run) -> float | None:
    """Train, and return the loss on the first reference of validation cards in nats per token; None if it diverged."""
    try:
        finetune(run, progress=False)
    except NonFiniteLossError:
        return None
    model, tokenizer = load_language_model(run.model)
    load_adapter(model, run.output)
    cards = first_cards(load_dataset(run.data).validation, CARDS)
    firsts = [Example(mr, references[0]) for mr, references in references_by_mr(cards).items()]
    firsts.sort(key=lambda example: len(example.mr) + len(example.ref))  # keeps the padding of a batch short
    loss = completion_loss(model, Completions(firsts, tokenizer, model.config.n_positions).batches(batch_size=8))
    return loss if math.isfinite(loss) else None


def sweep(name: str, results: Path, *, model: str = "bundled", steps: int = defaults.STEPS) -> float:
    """Search the best learning rate of a method, and return it.

    Raises:
        ValueError: no rate was better than its neighbours.
    """
    method = contestants()[name]
    width = GPT2Config.from_json(checkpoint_directory(model) / "config.json").n_embd
    start = nearest_rung(method.learning_rate(width))
    losses: dict[int, float] = {}
    while (rung := next_rung(losses, start)) is not None:
        file = results / f"{name}-{rate_at(rung):.0e}.json"
        if not file.exists():
            run = tuned_run(
                method, results / f"{file.stem}-run", rate=rate_at(rung), model=model, steps=steps, split=""
            )
            loss = validation_loss(run)
            write_json(file, {"method": name, "steps": steps, "learning_rate": rate_at(rung), "loss": loss})
            shutil.rmtree(run.output, ignore_errors=True)
            print(file.read_text(encoding="utf-8"), flush=True)
        loss = json.loads(file.read_text(encoding="utf-8"))["loss"]
        losses[rung] = math.inf if loss is None else loss
    best = best_rung(losses, start)
    if not math.isfinite(losses[best]) or {best - 1, best + 1} - set(losses):
        raise ValueError(f"{name}: no learning rate from {rate_at(RUNGS[0])} to {rate_at(RUNGS[-1])} is best")
    return rate_at(best)


# --- The table ---------------------------------------------------------------------------------------

HEAD = """\
# Tuning on the story cards

`python -m benchmarks.learning_rates` writes this file. Batch {batch}, seed 0, model {model}; the method's own defaults
unless stated otherwise. The test cards play no part. The best rate of each method is in bold. The rates in the methods'
files are the best ones for {usual} steps, the default of `finetune`; a run of 50 steps may want another one.
"""
LOSSES = """
## {steps} steps: validation loss

Nats per token of the first reference of {cards} validation cards, for learning rates a factor of about 3 apart.
"""
SCORES = """
## {steps} steps: validation scores

An earlier sweep with a fixed grid, from which the rates of these methods were chosen by BLEU and slot errors. LoRA and
QLoRA have rank 8 and alpha 64 on every matrix of every block unless stated otherwise; their scaling alpha / r is 8 in
every row.

| method | learning rate | BLEU | slot errors | perplexity | tale perplexity | divergence |
|---|---:|---:|---:|---:|---:|---:|
"""


def page(results: Sequence[Result], model: str) -> str:
    """The results in Markdown: one table for each number of steps."""
    text = HEAD.format(batch=defaults.BATCH_SIZE, model=model, usual=defaults.STEPS)
    for steps in sorted({result["steps"] for result in results}):
        chosen = [result for result in results if result["steps"] == steps]
        scored = [result for result in chosen if "bleu" in result]
        if len(scored) < len(chosen):
            others = [result for result in chosen if "bleu" not in result]
            text += LOSSES.format(steps=steps, cards=CARDS) + "\n" + losses_table(others)
        if scored:
            text += SCORES.format(steps=steps) + "".join(f"{scores_row(result)}\n" for result in scored)
    return text


def losses_table(results: Iterable[Result]) -> str:
    """A row for each method and a column for each rate."""
    methods: dict[str, dict[float, float | None]] = {}
    for result in results:
        methods.setdefault(result["method"], {})[result["learning_rate"]] = result["loss"]
    rates = sorted({rate for losses in methods.values() for rate in losses})
    lines = [["method", *(f"{rate:.0e}" for rate in rates)], ["---", *["---:"] * len(rates)]]
    for name, losses in methods.items():
        best = min((loss for loss in losses.values() if loss is not None), default=None)
        cells = []
        for rate in rates:
            loss = losses.get(rate)
            text = "diverged" if rate in losses and loss is None else "" if loss is None else f"{loss:.3f}"
            cells.append(f"**{text}**" if loss is not None and loss == best else text)
        lines.append([name, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def scores_row(result: Result) -> str:
    cells = [result["method"], f"{result['learning_rate']:.1e}"]
    if result["loss"] is None:
        return f"| {' | '.join([*cells, 'diverged', *[''] * 4])} |"
    cells += [f"{result['bleu']:.1f}", f"{100 * result['slot_errors']:.1f} %", f"{math.exp(result['loss']):.3f}"]
    cells += [f"{result['tale_perplexity']:.1f}", f"{result['divergence']:.3f}"]
    return f"| {' | '.join(cells)} |"


def collect(results: Path, place: Path, model: str) -> None:
    """Add the results in a folder to the JSON file beside `place`, and write `place` from it."""
    record = place.with_suffix(".json")
    document = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    known = {(result["method"], result["steps"], result["learning_rate"]): result for result in document}
    for file in sorted(results.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        known[result["method"], result["steps"], result["learning_rate"]] = result
    order = {name: number for number, name in enumerate(contestants())}
    everything = sorted(
        known.values(),
        key=lambda r: (r["steps"], order.get(r["method"].split(",")[0], 0), r["method"], r["learning_rate"]),
    )
    write_json(record, everything)
    write_atomically(place, lambda path: path.write_text(page(everything, model), encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--steps", type=int, default=defaults.STEPS)
    parser.add_argument("--methods", nargs="+", choices=tuple(contestants()), default=tuple(contestants()))
    parser.add_argument("--shard", type=parse_shard, default=EVERYTHING, help="tune only the methods in shard K/N")
    parser.add_argument("--results", type=Path, default=Path("runs/learning-rates"))
    options = parser.parse_args()
    fingerprint = model_fingerprint(options.model)
    results = options.results / f"{fingerprint}-{options.steps}-steps"
    for name in filter(options.shard.holds, options.methods):
        print(f"{name}: {sweep(name, results, model=options.model, steps=options.steps):.0e}", flush=True)
    collect(results, PLACE, fingerprint)


if __name__ == "__main__":
    main()
