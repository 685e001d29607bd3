"""Several tasks at once: does MultiLoRA learn them better than LoRA with the same number of trained parameters?

    python -m benchmarks.several_tasks [--steps 300] [--output several_tasks.md] [--scratch runs/several_tasks]

Wang et al. 2023 (arXiv:2311.11501) say that the update of LoRA is dominated by a few singular directions, that the
update of MultiLoRA is spread over more of them, and that this helps if one adapter learns several tasks. Here one
adapter learns five short symbolic tasks, each announced by its own token. The base is a small GPT-2 that was fully
trained on four other tasks of the same kind. The learning rate of each method is tuned on the tasks of seed 0, with a
grid that is extended as long as the best rate is at its edge; the results are those of seeds 1, 2 and 3. Some methods
also learn each task alone, from exactly the same examples of that task, with a rate tuned for that.

Writes `several_tasks.md`, and the results from which it is made to `several_tasks.json`. Finished runs are kept in the
scratch folder and not repeated. It takes about five minutes of one core.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.forgetting import spread
from benchmarks.memorising import Result, Runs, write_page
from benchmarks.several_tasks_runs import (
    ALONE,
    CONFIG,
    DIVERGED,
    LENGTH,
    PAIRS,
    ROWS,
    SETTINGS,
    SYMBOLS,
    TASKS,
    TEST_ROWS,
    TOGETHER,
    Found,
    all_results,
    carry_out,
    untrained_accuracy,
)
from lora_from_scratch.support.files import write_json

PLACE = Path(__file__).with_suffix(".md")
RECORD = Path(__file__).with_suffix(".json")  # the results on the page
STEPS = 300
LORA, MULTILORA, FULL = "lora, r = 8", "multilora, 3 of r = 2", "full"
HIGHEST_RANK = {setting.label: setting.most for setting in SETTINGS}

PAGE = """\
# Several tasks at once

{summary}

## All tasks together

{together}

## One task alone

{why_alone}

{alone}

## The update

{why_spectrum}

{spectrum}

## What it shows

{findings}

## Learning rates

Those that were tried on the tasks of seed 0, with the resulting bits per token (a mean over the tasks):

{rates}
"""
SUMMARY = f"""
This file is written by `python -m benchmarks.several_tasks`. One model learns five tasks at once, in {{steps}} steps of
{ROWS} examples of each. An example consists of a token for the task, {LENGTH} input symbols of {SYMBOLS}, and
{LENGTH} output symbols, the only ones with a loss. The tasks: *reverse* the input; *reorder* it in a random but fixed
order; *substitute* each symbol by a random but fixed table; *sort* it; *recall* the random output of one of {PAIRS}
random inputs. The base is a GPT-2 of width {CONFIG.n_embd} with {CONFIG.n_layer} blocks that has learned four other
tasks: copy, rotate by one place, exchange neighbours, and the next symbol. The methods adapt every matrix of every
block, and full fine-tuning the embeddings and norms too. The tables have the percentage of right output symbols for
{TEST_ROWS} random inputs of each task (guessing gives {100 / SYMBOLS:.0f} %; *recall* has only its own inputs, and of
the others about 5 % were also seen in training): the mean over three seeds, with other rules, tables and examples
(lowest to highest). LoRA has rank 8, and 7 on mlp.c_proj, and so exactly as many trained parameters as MultiLoRA with
three LoRAs of rank 2; its alpha is 64.
"""
WHY_ALONE = """
The same number of steps, on the same examples of one task, without those of the other four: five models for each
method, and a learning rate that is tuned for this. The gain is that of the mean over the tasks.
"""
WHY_SPECTRUM = """
What training has added to each matrix in the blocks, as means over the eight matrices. *Effective rank* is the
exponential of the entropy of the singular values (unit 11), *largest* the share of the largest singular value in the
sum of the squares, and the last column the number of directions that have 90 % of that sum. With one task alone they
are means over the five models. *Highest rank* is what the method could have at most.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table whose first `texts` columns are texts, and the others numbers."""
    lines = [head, [*["---"] * texts, *["---:"] * (len(head) - texts)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percentages(results: Sequence[Result]) -> list[str]:
    """A cell for each task, and one for all of them."""
    cells = [spread([100 * result[task] for result in results], 0) for task in TASKS]
    return [*cells, spread([100 * result["accuracy"] for result in results], 1)]


def spectrum_cells(results: Sequence[Result]) -> list[str]:
    columns = (("effective rank", 1, 2), ("largest", 100, 0), ("directions", 1, 1))
    return [spread([factor * result[key] for result in results], digits) for key, factor, digits in columns]


def together_row(label: str, results: Sequence[Result]) -> list[str]:
    bits = spread([result["bits"] for result in results], 2)
    return [label, f"{results[0]['parameters']:,.0f}", rate_of(results), *percentages(results), bits]


def alone_row(label: str, results: Sequence[Result], together: Sequence[Result]) -> list[str]:
    pairs = zip(results, together, strict=True)
    gains = [100 * (alone["accuracy"] - with_others["accuracy"]) for alone, with_others in pairs]
    return [label, rate_of(results), *percentages(results), spread(gains, 1)]


def rate_of(results: Sequence[Result]) -> str:
    return f"{results[0]['rate']:.1e}"


def findings(results: Mapping[tuple[str, str], Sequence[Result]]) -> list[str]:
    """What the numbers say about the paper's two claims, as items of a list."""
    right = {key: f"{100 * mean(one['accuracy'] for one in runs):.1f} %" for key, runs in results.items()}
    gaps, items = {}, []
    for company, start in ((TOGETHER, "All tasks together"), (ALONE, "One task alone")):
        multi, lora = results[MULTILORA, company], results[LORA, company]
        gaps[company] = [100 * difference for difference in differences(multi, lora, "accuracy")]
        full = f", and full fine-tuning {right[FULL, company]}" if (FULL, company) in right else ""
        items.append(
            f"- {start}: MultiLoRA with three LoRAs has {right[MULTILORA, company]} of the symbols right, LoRA with as "
            f"many trained parameters {right[LORA, company]}{full}. MultiLoRA's share is {said(gaps[company])}; "
            f"the difference is {spread(gaps[company], 1)} points."
        )
        rank, largest = (said(differences(multi, lora, key)) for key in ("effective rank", "largest"))
        shares = [
            f"{mean(one['effective rank'] for one in runs) / HIGHEST_RANK[label]:.2f}"
            for label, runs in ((MULTILORA, multi), (LORA, lora))
        ]
        items.append(
            f"- The update, {company}: MultiLoRA's effective rank is {rank}, and the share of its largest singular "
            f"value is {largest}. Divided by the highest rank that each could have, the effective rank is "
            f"{shares[0]} with MultiLoRA and {shares[1]} with LoRA."
        )
    items.append(
        "- These are short runs of a very small model, with learning rates a factor of about three apart. The paper "
        "has far larger models, ranks and tasks, and reports the opposite of both."
    )
    return [filled(item).replace("\n", "\n  ") for item in items]


def differences(one: Sequence[Result], other: Sequence[Result], key: str) -> list[float]:
    """One minus the other, seed by seed."""
    return [a[key] - b[key] for a, b in zip(one, other, strict=True)]


def said(differences: Sequence[float]) -> str:
    above = sum(d > 0 for d in differences)
    if above in (0, len(differences)):
        return f"{'higher' if above else 'lower'} than LoRA's with every seed"
    return f"higher than LoRA's with {above} of {len(differences)} seeds"


def record(found: Found, untrained: Result, steps: int) -> dict[str, Any]:
    """What the page is made from; of the runs of seed 0 only rate and loss."""
    rows = [
        {
            "label": label,
            "tasks": company,
            "tried": [{key: one[key] for key in ("rate", "bits")} for one in tried],
            "results": results,
        }
        for (label, company), (tried, results) in found.items()
    ]
    return {"steps": steps, "untrained": untrained, "rows": rows}


def page(document: dict[str, Any]) -> str:
    """The page from what `record` returns."""
    results = {(row["label"], row["tasks"]): row["results"] for row in document["rows"]}
    labels = [setting.label for setting in SETTINGS]
    rows = {company: [label for label in labels if (label, company) in results] for company in (TOGETHER, ALONE)}
    untrained, with_tasks = document["untrained"], ["method", "tasks"]
    nothing = ["nothing", "", "", *(f"{100 * untrained[task]:.0f}" for task in TASKS)]
    together = [together_row(label, results[label, TOGETHER]) for label in rows[TOGETHER]]
    alone = [alone_row(label, results[label, ALONE], results[label, TOGETHER]) for label in rows[ALONE]]
    spectra = [
        [label, company, str(HIGHEST_RANK[label]), *spectrum_cells(results[label, company])]
        for company in rows
        for label in rows[company]
    ]
    return PAGE.format(
        summary=filled(SUMMARY.format(steps=document["steps"])),
        together=table(
            ["method", "trained parameters", "learning rate", *TASKS, "all", "bits per token"],
            [[*nothing, f"{100 * untrained['accuracy']:.1f}", ""], *together],
        ),
        why_alone=filled(WHY_ALONE),
        alone=table(["method", "learning rate", *TASKS, "all", "gain over together, points"], alone),
        why_spectrum=filled(WHY_SPECTRUM),
        spectrum=table(
            [*with_tasks, "highest rank", "effective rank", "largest, %", "directions for 90 %"], spectra, texts=2
        ),
        findings="\n".join(findings(results)),
        rates=table([*with_tasks, "learning rate: bits"], [sweep_row(row) for row in document["rows"]], texts=3),
    )


def sweep_row(row: dict[str, Any]) -> list[str]:
    losses = [f"{r['rate']:.1e}: " + (f"{r['bits']:.2f}" if r["bits"] < DIVERGED else "diverged") for r in row["tried"]]
    return [row["label"], row["tasks"], ", ".join(losses)]


def filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
    parser.add_argument("--output", type=Path, default=PLACE, help="the page; its results are stored beside it as JSON")
    parser.add_argument("--scratch", type=Path, default=Path("runs/several_tasks"), help="folder of the finished runs")
    options = parser.parse_args()
    runs = Runs(options.scratch / "runs.json")
    untrained = runs.result("nothing", untrained_accuracy)
    found = all_results(runs, options.steps, partial(carry_out, options.steps))
    document = record(found, untrained, options.steps)
    write_json(options.output.with_suffix(".json"), document)
    write_page(options.output, page(document))


if __name__ == "__main__":
    main()
