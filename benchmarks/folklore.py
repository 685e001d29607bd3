"""The advice that circulates about LoRA, tried on the bundled model: three seeds, tuned rates, and a verdict for each.

    python -m benchmarks.folklore [--claims alpha forgets] [--table]

Each training run is an entry of `folklore.json` and is not repeated (see `folklore_runs.py`): if the command is
interrupted and called again, it goes on. It writes `folklore.md`, and `lora_from_scratch/assets/folklore.json`, from
which unit 23 draws its figure. `--table` only writes these two again. The claims are in `folklore_claims.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.folklore_claims import CLAIMS, Claim
from benchmarks.folklore_runs import BATCH, CARDS, SEEDS, STEPS, NotRunError, Runs
from lora_from_scratch.compare.folklore import verdict
from lora_from_scratch.support.files import write_atomically, write_json

PLACE = Path(__file__).with_suffix(".md")
RECORD = PLACE.with_suffix(".json")
ASSET = Path(__file__).parents[1] / "lora_from_scratch" / "assets" / "folklore.json"
NOT_RUN = "not run yet"


def entry(claim: Claim, runs: Runs) -> dict[str, Any]:
    """The claim's row of the table; see `read_claims`."""
    columns = ("key", "claim", "source", "compared", "unit", "margin")
    row: dict[str, Any] = {name: getattr(claim, name) for name in columns}
    try:
        outcome = claim.measure(runs)
    except NotRunError:
        return {**row, "sides": {}, "differences": [], "verdict": NOT_RUN}
    differences = [round(d, 5) for d in outcome.differences]
    sides = {name: [round(value, 5) for value in values] for name, values in outcome.sides.items()}
    return {**row, "sides": sides, "differences": differences, "verdict": verdict(differences, claim.margin)}


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    counts = {kind: sum(row["verdict"] == kind for row in rows) for kind in dict.fromkeys(r["verdict"] for r in rows)}
    lines = [
        "# The folklore, tested",
        "",
        "`python -m benchmarks.folklore` writes this file: advice about LoRA, tried on the bundled model.",
        f"{STEPS} steps of batch {BATCH} on short story cards unless stated otherwise, seeds",
        f"{', '.join(map(str, SEEDS))}, loss on {CARDS} held-out cards, each setting at its own tuned learning rate (a",
        "factor of 2 between neighbouring rates, 4 for SGD). Cells: mean (smallest to largest). A difference is",
        "positive where it is in favour of the claim; for a claim that something makes no difference, the margin is",
        "given. Verdicts by `lora_from_scratch.compare.folklore.verdict`. Advice that fails here may be right for",
        "larger models.",
        "",
        "; ".join(f"{kind}: {count}" for kind, count in counts.items()) + ".",
        "",
        "| claim | who says it | compared | values | difference | verdict |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_row, rows)]) + "\n"


def _row(row: Mapping[str, Any]) -> str:
    values = "<br>".join(f"{name}: {spread(numbers)}" for name, numbers in row["sides"].items())
    difference = spread(row["differences"]) if row["differences"] else ""
    margin = "" if row["margin"] is None else f"; margin {row['margin']:g}"
    difference += f" ({row['unit']}{margin})"
    cells = [row["claim"], row["source"], row["compared"], values, difference.strip(), row["verdict"]]
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    """The mean, with the smallest and the largest in brackets."""
    digits = 3 if max(map(abs, values)) < 20 else 1
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def write() -> None:
    """Write the table and the package's copy of it from the results that are there."""
    rows = [entry(claim, Runs(RECORD, run=False)) for claim in CLAIMS]
    write_json(ASSET, {"claims": rows, "sweeps": sweeps()})
    write_atomically(PLACE, lambda path: path.write_text(page(rows), encoding="utf-8"))


def sweeps() -> dict[str, list[dict[str, float | None]]]:
    """The losses by learning rate of the two default settings, for each seed; see `rate_sweeps`."""
    found: dict[str, list[dict[str, float | None]]] = {"lora": [], "full": []}
    results = Runs(RECORD, run=False).results.values()
    for name, seeds in found.items():
        for seed in SEEDS:
            tried = {r["rate"]: r["loss"] for r in results if (r["setting"], r["seed"]) == (name, seed)}
            seeds.append({f"{rate:g}": tried[rate] for rate in sorted(tried)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    keys = [claim.key for claim in CLAIMS]
    parser.add_argument("--claims", nargs="+", choices=keys, default=keys, help="the claims to test (default: all)")
    parser.add_argument("--table", action="store_true", help="only write the table from the results that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for claim in CLAIMS if not options.table else ():
        if claim.key in options.claims:
            row = entry(claim, Runs(RECORD))
            print(f"{claim.key}: {spread(row['differences'])}, {row['verdict']}", flush=True)
            write()
    write()


if __name__ == "__main__":
    main()
