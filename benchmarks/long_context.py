"""A context four times as long: how does LongLoRA compare with LoRA and full fine-tuning under full attention?

    python -m benchmarks.long_context [--steps 36] [--output long_context.md] [--scratch runs/long_context]

Chen et al. 2023 (arXiv:2309.12307) extend the context of LLaMA-2 with attention in shifted groups, and say that LoRA
alone is not sufficient for this, whatever its rank, unless embeddings and norms are trained as well. Here the positions
of the bundled model are interpolated from 256 to 1,024, and it is trained on texts of that length. Every side is
evaluated with full attention on held-out texts. Its learning rate is tuned with seed 0 on validation texts, and the
search goes on until the best rate lies between two that are worse; the results are those of seeds 1, 2 and 3 on test
texts.

Writes `long_context.md`, and the results from which it is made to `long_context.json`. Finished runs are kept in the
scratch folder and not repeated. It takes about twelve minutes of one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.forgetting import spread
from benchmarks.long_context_runs import (
    DIVERGED,
    FACTOR,
    FULL,
    GROUPS,
    LAST,
    LENGTHS,
    LONG,
    LORA,
    LORA_PLUS,
    PRECISIONS,
    QUARTER,
    ROUNDS,
    SEEDS,
    SIDES,
    TEST_TEXTS,
    TOKENS,
    Measured,
    cost,
    measured,
    untrained,
)
from benchmarks.lora_vs_peft import MiB
from benchmarks.memorising import Result, Runs, write_page
from benchmarks.several_tasks import differences, filled, table
from lora_from_scratch.support.files import write_json

PLACE = Path(__file__).with_suffix(".md")
RECORD = Path(__file__).with_suffix(".json")  # the results on the page
STEPS = 36
LONGEST, FAR, NEAR = str(TOKENS), "last quarter", "last quarter alone"

PAGE = """\
# A context four times as long

{summary}

## Held-out perplexity with full attention

{perplexities}

{why_quarter}

## The attention of training

{why_training}

{training}

## What a step costs

{why_cost}

{cost}

## What it shows

{findings}

## Learning rates

Those that were tried with seed 0, with the resulting loss on validation texts of {tokens:,} tokens, in nats per token:

{rates}
"""
SUMMARY = f"""
This file is written by `python -m benchmarks.long_context`. The bundled model has a context of {TOKENS // FACTOR}
tokens. Its positions are interpolated to {FACTOR} times as many, and it is trained for {{steps}} steps on one text of
{TOKENS:,} tokens each, in bf16. A text consists of tales and then their cards in the reverse order, as in unit 20, so
that the card of the first tale is a whole text away from it; the line breaks in between that fill up the text have no
loss. The LoRAs have rank 8 on every matrix of every block. *{LORA_PLUS}* are trained in LongLoRA too, which attends
within {GROUPS} groups of tokens in training, shifted by half a group in half of the heads; all others train with full
attention. All are evaluated with full attention. The results are means over three seeds (lowest to highest), with other
training texts and first values of LoRA; the texts of the test are the same: {TEST_TEXTS} of {TOKENS:,} tokens, and as
many tokens in shorter texts that are made in the same way.
"""
WHY_QUARTER = f"""
The two columns on the right are of the same tokens: the last {QUARTER} of the longest texts, without the first of them,
after all tokens before them, or after those of the last quarter only. Before training, the original positions have a
perplexity of {{original}} at {LENGTHS[0]} tokens.
"""
WHY_TRAINING = f"""
Perplexities at {TOKENS:,} tokens: of the last {LAST} training steps, of the texts of the test with the attention of
training, and with full attention as above.
"""
WHY_COST = f"""
A step with one text of {TOKENS:,} tokens: the processor time on one core (the least of {ROUNDS}), and the activations
that the forward pass keeps for the backward pass. In bf16 on a CPU, our full attention is explicit and keeps its
scores; in fp32 it is PyTorch's fused kernel, which keeps none. The attention in groups is explicit in both.
"""


def perplexity(results: Sequence[Result], key: str) -> str:
    return spread([math.exp(one[key]) for one in results], 2)


def row(label: str, results: Sequence[Result]) -> list[str]:
    cells = [perplexity(results, key) for key in (*map(str, LENGTHS), FAR, NEAR)]
    return [label, f"{results[0]['parameters']:,.0f}", f"{results[0]['rate']:.0e}", *cells]


def cost_row(label: str, found: Result) -> list[str]:
    cells = []
    for precision in PRECISIONS:
        cells.append(f"{found[f'{label}, {precision}, seconds']:.2f} s")
        cells.append(f"{found[f'{label}, {precision}, bytes'] / MiB:.0f} MiB")
    return [label, *cells]


# --- What the numbers say ----------------------------------------------------------------------------

Results = Mapping[str, Sequence[Result]]  # by label


def findings(results: Results, before: Result, costs: Result) -> list[str]:
    """Items of a list."""
    items = [
        embeddings(results),
        groups(results),
        change_of_attention(results),
        context(results),
        full(results),
        step(costs),
    ]
    items.append(
        f"These are short runs of a very small model on texts of one kind, with learning rates a factor of about three "
        f"apart. Interpolation alone has a perplexity of {math.exp(before[LONGEST]):.0f} at {TOKENS:,} tokens, so most "
        "of what is learned is what such texts look like. The paper has models more than a thousand times as large."
    )
    return [filled(f"- {item}").replace("\n", "\n  ") for item in items]


def gap(results: Results, one: str, other: str, key: str) -> list[float]:
    """The loss of one side minus that of the other, seed by seed, in nats per token."""
    return differences(results[one], results[other], key)


def said(gaps: Sequence[float]) -> str:
    """Whether a loss is lower or higher, and in how many of the seeds."""
    above = sum(g > 0 for g in gaps)
    if above in (0, len(gaps)):
        return f"{'higher' if above else 'lower'} with every seed"
    return f"higher with {above} of {len(gaps)} seeds"


def at(results: Results, label: str, key: str) -> str:
    return perplexity(results[label], key)


def embeddings(results: Results) -> str:
    gaps = {key: gap(results, LORA_PLUS, LORA, key) for key in (LONGEST, str(LENGTHS[0]))}
    return (
        f"Embeddings and norms: at {TOKENS:,} tokens, LoRA alone has a perplexity of {at(results, LORA, LONGEST)}, and "
        f"with embeddings and norms {at(results, LORA_PLUS, LONGEST)}: {said(gaps[LONGEST])}. The difference in loss "
        f"is {spread(gaps[LONGEST], 2)} nats per token at {TOKENS:,} tokens and {spread(gaps[str(LENGTHS[0])], 2)} at "
        f"{LENGTHS[0]}, so it is not one of length alone."
    )


def groups(results: Results) -> str:
    gaps, far = gap(results, LONG, LORA_PLUS, LONGEST), gap(results, LONG, LORA_PLUS, FAR)
    return (
        f"Attention in shifted groups: LongLoRA has {at(results, LONG, LONGEST)} at {TOKENS:,} tokens and "
        f"{at(results, LONG, FAR)} in the last quarter; the same with full attention in training has "
        f"{at(results, LORA_PLUS, LONGEST)} and {at(results, LORA_PLUS, FAR)}. LongLoRA's loss is {said(gaps)}, by "
        f"{spread(gaps, 2)} nats per token, and in the last quarter by {spread(far, 2)}. Relative to LoRA alone, its "
        f"loss at {TOKENS:,} tokens is {said(gap(results, LONG, LORA, LONGEST))}."
    )


def context(results: Results) -> str:
    gains = {label: [one[NEAR] - one[FAR] for one in results[label]] for label in results}
    listed = ", ".join(f"{label} {mean(gain):.2f}" for label, gain in gains.items())
    return (
        "What the far context is worth: the loss of the last quarter after the whole text is lower than after the "
        f"quarter alone by these nats per token: {listed}."
    )


def change_of_attention(results: Results) -> str:
    """The difference between LongLoRA and full attention, in two parts that add up to it."""
    before = gap(results, LONG, LORA_PLUS, "as in training")
    change = [one[LONGEST] - one["as in training"] for one in results[LONG]]
    return (
        f"The change of attention: with that of its training, LongLoRA has {at(results, LONG, 'as in training')} on "
        f"the same texts. Of the difference in loss from full attention in training, {mean(before):.2f} nats per token "
        f"are there already, and {spread(change, 2)} come with the change to full attention."
    )


def full(results: Results) -> str:
    gaps = gap(results, FULL, LORA_PLUS, LONGEST)
    return (
        f"Full fine-tuning has {at(results, FULL, LONGEST)} at {TOKENS:,} tokens; relative to LoRA with embeddings and "
        f"norms its loss is {said(gaps)}. The difference is {spread(gaps, 2)} nats per token."
    )


def step(costs: Result) -> str:
    ratios = {
        (precision, what): costs[f"{LONG}, {precision}, {what}"] / costs[f"{LORA_PLUS}, {precision}, {what}"]
        for precision in PRECISIONS
        for what in ("seconds", "bytes")
    }
    said = " and in ".join(
        f"{precision} {ratios[precision, 'seconds']:.2f} of the time and {ratios[precision, 'bytes']:.2f} of the bytes"
        for precision in PRECISIONS
    )
    return (
        f"Cost: a step of LongLoRA takes, relative to the same with full attention, in {said}. What groups save "
        "depends on the attention that they replace."
    )


# --- The page ----------------------------------------------------------------------------------------


def record(found: Mapping[str, Measured], before: Result, costs: Result, steps: int) -> dict[str, Any]:
    """What the page is made from."""
    rows = [{"label": label, "tried": tried, "results": results} for label, (tried, results) in found.items()]
    return {"steps": steps, "seeds": SEEDS, "untrained": before, "cost": costs, "rows": rows}


def page(document: dict[str, Any]) -> str:
    """The page from what `record` returns."""
    results = {row["label"]: row["results"] for row in document["rows"]}
    before, costs = document["untrained"], document["cost"]
    nothing = ["nothing", "", "", *(f"{math.exp(before[key]):.0f}" for key in (*map(str, LENGTHS), FAR, NEAR))]
    lengths = [f"{n:,} tokens" for n in LENGTHS]
    training = [
        [label, *(perplexity(results[label], key) for key in ("training", "as in training", LONGEST))]
        for label in (LORA_PLUS, LONG)
    ]
    return PAGE.format(
        tokens=TOKENS,
        summary=filled(SUMMARY.format(steps=document["steps"])),
        perplexities=table(
            ["side", "trained parameters", "learning rate", *lengths, FAR, NEAR],
            [nothing, *(row(label, results[label]) for label in results)],
        ),
        why_quarter=filled(WHY_QUARTER.format(original=f"{math.exp(before['original']):.0f}")),
        why_training=filled(WHY_TRAINING),
        training=table(["side", "training", "test, as in training", "test, full attention"], training),
        why_cost=filled(WHY_COST),
        cost=table(
            ["side", *(f"{precision}, {what}" for precision in PRECISIONS for what in ("time", "activations"))],
            [cost_row(label, costs) for label in results],
        ),
        findings="\n".join(findings(results, before, costs)),
        rates=table(["side", "learning rate: loss"], [sweep_row(row) for row in document["rows"]], texts=2),
    )


def sweep_row(row: dict[str, Any]) -> list[str]:
    losses = [f"{r['rate']:.0e}: " + (f"{r['loss']:.2f}" if r["loss"] < DIVERGED else "diverged") for r in row["tried"]]
    return [row["label"], ", ".join(losses)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
    parser.add_argument("--output", type=Path, default=PLACE, help="the page; its results are stored beside it as JSON")
    parser.add_argument("--scratch", type=Path, default=Path("runs/long_context"), help="folder of the finished runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(options.scratch / "runs.json")
    before = runs.result("untrained", untrained)
    found = {side.label: measured(runs, side, options.steps) for side in SIDES}
    document = record(found, before, runs.result("cost", cost), options.steps)
    write_json(options.output.with_suffix(".json"), document)
    write_page(options.output, page(document))


if __name__ == "__main__":
    main()
