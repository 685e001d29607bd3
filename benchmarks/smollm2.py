"""Compare LoRA, DoRA, QLoRA, full fine-tuning and tuning the norms on SmolLM2-135M, with what each forgets.

    python -m benchmarks.smollm2 [--seeds 0 1 2] [--results FOLDER]
    python -m benchmarks.smollm2 --tune       searches the learning rates again, which takes longer than the comparison

The task is the story cards. Each run has a process of its own, so that its peak memory can be measured, and is not
repeated if its file is in the folder. Writes `smollm2.json` and `smollm2.md`. `make smollm2` installs the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import smollm2_runs
from benchmarks.smollm2_rates import START, VALIDATION_CARDS, best_rate, tune
from benchmarks.smollm2_runs import BATCH_SIZE, CARDS, MODEL, ROWS, STEPS, TOKENS
from lora_from_scratch.finetune.report import markdown
from lora_from_scratch.methods.bitfit import BitFit
from lora_from_scratch.methods.registry import method_class
from lora_from_scratch.models.checkpoint import blank_model, find_model
from lora_from_scratch.support.files import write_atomically, write_json

NUMBERS, PAGE = Path(__file__).with_suffix(".json"), Path(__file__).with_suffix(".md")
Document = dict[str, Any]  # "rates": method -> rate -> validation loss; "base"; "runs"; "precision"; "bitfit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=Path("runs") / "smollm2")
    parser.add_argument("--tune", action="store_true", help="search the learning rates again")
    options = parser.parse_args()
    find_model(MODEL)  # before anything else, whether it is installed
    document: Document = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.exists() else {}
    precision = smollm2_runs.precision()
    if options.tune or "rates" not in document:
        document["rates"] = tuned(options.results / "rates", precision)
    document |= {"precision": precision, "bitfit": refusal_of_bitfit()}
    document["base"] = run("base", options.results / "base.json")
    document["runs"] = [
        run(name, options.results / f"{name}-{seed}.json", "--rate", str(best_rate(rates)), "--seed", str(seed))
        for name, rates in document["rates"].items()
        for seed in options.seeds
    ]
    write_json(NUMBERS, document)
    write_atomically(PAGE, lambda path: path.write_text(page(document), encoding="utf-8"))
    print(f"Written to {PAGE} and {NUMBERS}")


def tuned(folder: Path, precision: str) -> dict[str, dict[str, float | None]]:
    for name in START:
        tune(
            method_class(name)(),
            folder / f"{name}.json",
            model=MODEL,
            steps=STEPS,
            batch_size=BATCH_SIZE,
            precision=precision,
        )
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in START}


def run(name: str, file: Path, *more: str) -> Document:
    """The result of a run; if it is not there yet, or had another rate, the run is carried out in a new process."""
    wanted = float(more[more.index("--rate") + 1]) if "--rate" in more else None
    if not file.exists() or json.loads(file.read_text(encoding="utf-8")).get("rate") != wanted:
        command = [sys.executable, "-m", "benchmarks.smollm2_runs", name, str(file.parent), *more]
        subprocess.run(command, check=True)
    found: Document = json.loads(file.read_text(encoding="utf-8"))
    print(f"{file.stem}: {found['scores']}", flush=True)
    return found


def refusal_of_bitfit() -> str:
    """What BitFit says to this model, or "" if it adapts it."""
    import torch

    with torch.device("meta"):
        model = blank_model(MODEL)
    try:
        BitFit().adapt(model)
    except ValueError as error:
        return str(error)
    return ""


# --- The page --------------------------------------------------------------------------------------

HEAD = """\
# SmolLM2-135M on the story cards

`python -m benchmarks.smollm2` writes this file. The model is SmolLM2-135M-Instruct, a pretrained model with
134,515,008 parameters (`make smollm2`). {steps} steps of {batch} examples, {seeds}, {precision} products and fp32
weights; each method with its own defaults and tuned learning rate. BLEU and slot errors are those of {cards} test
cards, perplexity that of their first references. What is forgotten: the perplexity of the project's own tales, and
the divergence from the base on text that the base wrote ({rows} texts of {tokens} tokens), in nats per token.

"""
BITFIT = """
BitFit is not in the table, as there is nothing for it to train: "{refusal}". `layernorm` trains the weights of the
norms instead, the only vectors that the model has.

All runs together took {minutes:.0f} minutes of processor time, evaluation included. Peak memory is that of the whole
process until the end of training. The largest process had {peak:.2f} GB, with the second copy of the model that is
loaded afterwards to measure the divergence.
"""
ONE_SEED = """
With one seed and {cards} cards, differences of a few points of BLEU mean nothing. The differences in forgetting are
larger, and depend on the rate as well: full fine-tuning reaches nearly the same validation loss at a third of its
rate.
"""
RATES = """
## Learning rates

Loss on the first reference of {cards} validation cards after {steps} steps, seed 0, in nats per token; the best in
bold.

"""
ORIGIN = """
## What the 4-bit origin of the weights costs

The package ships the {weights:,} weights of the blocks in Q4_1: each 32 weights of a row have one of 16 equally
spaced values ({mean_values:.1f} different ones on average, at most {most_values}). They are converted to fp32 when
the model is loaded. The embedding, which is also the output layer, has 8 bits (Q8_0).

**What cannot be known here** is how much better the original weights are, at predicting text or as a start for
fine-tuning: they are not in the package. All results above are those of the rounded model. What can be measured:

- Rounding Gaussian numbers to Q4_1 has an error of {q4_1_error_gaussian:.1%} (root mean square, relative to the
  numbers). If the original weights were Gaussian in each block, theirs was the same.
- Applying Q4_1 again leaves {same_again:.2%} of the weights as they are.
- QLoRA rounds a second time, to NF4 in blocks of 64. That adds an error of {nf4_error:.1%}. For Gaussian numbers it
  is {nf4_error_gaussian:.1%}, and {nf4_error_rounded:.1%} for Gaussian numbers that Q4_1 has rounded before: being
  on a grid already does not make a weight easier for NF4.
"""
AGAIN = """\
- To have the size of the original file again, a fine-tuned model must be rounded again. With {name}, the update is
  {size:.1%} of the weights of the blocks, or {in_steps:.2f} of a step of Q4_1 (root mean squares), and
  {below_half_a_step:.1%} of the weights change by less than half a step: {codes_changed:.1%} get another value. The
  error that rounding adds is {error:.2f} times the update. The perplexity of the test cards goes from {before:.2f} to
  {after:.2f} (the base: {base:.2f}), although only the blocks are rounded, and the embedding and the norms are not.
"""


def page(document: Document) -> str:
    base, runs = document["base"], document["runs"]
    names = list(dict.fromkeys(run["method"] for run in runs))
    by_name = {name: [run for run in runs if run["method"] == name] for name in names}
    seeds = len({run["seed"] for run in runs})
    text = HEAD.format(
        steps=STEPS, batch=BATCH_SIZE, cards=CARDS, rows=ROWS, tokens=TOKENS, precision=document["precision"],
        seeds="one seed" if seeds == 1 else f"{seeds} seeds (mean, smallest and largest)",
    )  # fmt: skip
    text += (
        markdown([COLUMNS, ("base", "0", "", "", "", *scores([base])), *(row(by_name[name]) for name in names)]) + "\n"
    )
    text += BITFIT.format(
        refusal=document["bitfit"],
        minutes=(base["cpu_seconds"] + sum(run["cpu_seconds"] for run in runs)) / 60,
        peak=max(run["peak_bytes"] for run in runs) / 1e9,
    )
    text += ONE_SEED.format(cards=CARDS) if seeds == 1 else ""
    text += RATES.format(cards=VALIDATION_CARDS, steps=STEPS) + rates_table(document["rates"]) + "\n"
    text += ORIGIN.format(**base["origin"])
    for one in runs:
        if one["rounded_again"] and one["seed"] == runs[0]["seed"]:
            again = one["rounded_again"]
            text += AGAIN.format(
                name=one["method"], before=one["scores"]["perplexity"], after=again["perplexity"],
                base=base["scores"]["perplexity"], **again["update"],
            )  # fmt: skip
    return text


COLUMNS = (
    "method", "trained", "rate", "processor seconds", "peak memory", "BLEU", "slot errors", "perplexity",
    "tale perplexity", "divergence",
)  # fmt: skip


def row(runs: Sequence[Document]) -> tuple[str, ...]:
    first = runs[0]
    peak = max(run["peak_bytes_training"] for run in runs)
    seconds = mean(run["training_cpu_seconds"] for run in runs)
    return (first["method"], f"{first['trained']:,}", f"{first['rate']:g}", f"{seconds:.0f}", f"{peak / 1e9:.2f} GB",
            *scores(runs))  # fmt: skip


def scores(runs: Sequence[Document]) -> tuple[str, ...]:
    shown: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("bleu", "{:.1f}".format),
        ("slot_errors", "{:.0%}".format),
        ("perplexity", "{:.2f}".format),
        ("tale_perplexity", "{:.1f}".format),
        ("divergence", "{:.3f}".format),
    )
    return tuple(spread([run["scores"][name] for run in runs], written) for name, written in shown)


def spread(values: Sequence[float], written: Callable[[float], str]) -> str:
    if len(values) == 1:
        return written(values[0])
    return f"{written(mean(values))} ({written(min(values))} to {written(max(values))})"


def rates_table(rates: dict[str, dict[str, float | None]]) -> str:
    grid = sorted({float(rate) for losses in rates.values() for rate in losses})
    lines = [("method", *(f"{rate:g}" for rate in grid))]
    for name, losses in rates.items():
        best, by_rate = best_rate(losses), {float(rate): loss for rate, loss in losses.items()}
        cells = {
            rate: "diverged" if loss is None else f"**{loss:.3f}**" if rate == best else f"{loss:.3f}"
            for rate, loss in by_rate.items()
        }
        lines.append((name, *(cells.get(rate, "") for rate in grid)))
    return markdown(lines)


if __name__ == "__main__":
    main()
