"""Tune each method by itself, on the validation cards; write what came out.

    python -m benchmarks.learning_rates [--model MODEL] [--methods full lora] [--rates 1e-3 3e-3] [--steps 500]

Writes `benchmarks/learning_rates.md`, a row as soon as a run is finished; what is in it already is not run again, and
a run that was killed goes on where it was. `--rates` tries others than the grid's: a best rate at the grid's
edge is none. The defaults (`finetune/defaults.py`, and LoRA's own alpha) are the best here.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lora_from_scratch.compare.shootout import contestants
from lora_from_scratch.compare.side_by_side import in_fresh_processes, model_fingerprint, tuned_run
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.run import Report
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.qlora import QLoRA
from lora_from_scratch.support.files import write_atomically


class Entry(NamedTuple):
    """What is tuned: its name in the shootout, its name in the table, the method, the rates to try."""

    name: str
    label: str
    method: Method
    rates: tuple[float, ...]


def _grid() -> list[Entry]:
    rates: dict[str, tuple[float, ...]] = {
        "full": (1.25e-4, 2.5e-4, 5e-4, 1e-3),
        "adapter-houlsby": (1e-3, 3e-3, 1e-2, 2e-2),
        "adapter-parallel": (1e-3, 3e-3, 1e-2, 2e-2),
        "prefix": (2e-3, 5e-3, 1e-2),
        "prompt": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        "llama-adapter": (2e-3, 5e-3, 1.5e-2, 4e-2, 8e-2, 1.6e-1),
        "bitfit": (3e-3, 1e-2, 3e-2, 6e-2, 1.2e-1),
        "spafit": (2e-3, 5e-3, 1e-2, 2e-2),
    }
    methods = contestants()
    attention, qkv = ("attn.c_attn", "attn.c_proj"), ("attn.c_attn",)
    loras = [
        Entry("lora", "lora", LoRA(), (2e-3, 3e-3, 4e-3)),
        Entry("lora", "lora, rank 16 on the attention", LoRA(16, 128, attention), (2e-3, 4e-3, 6e-3)),
        Entry("lora", "lora, rank 32 on c_attn", LoRA(rank=32, alpha=256, targets=qkv), (3e-3,)),
    ]
    qloras = [
        Entry("qlora", "qlora", methods["qlora"], (2e-3, 3e-3, 4e-3)),
        Entry(
            "qlora", "qlora, rank 16 on the attention", QLoRA(16, 128, attention, keep_base=False), (2e-3, 4e-3, 8e-3)
        ),
    ]
    others = [Entry(name, name, methods[name], tried) for name, tried in rates.items()]
    return [others[0], *loras, *qloras, *others[1:]]


GRID = _grid()
NAMES = list(dict.fromkeys(entry.name for entry in GRID))
PLACE = Path(__file__).with_suffix(".md")
HEAD = """\
# Tuning on the story cards

`python -m benchmarks.learning_rates` writes this file: {steps} steps of batch {batch}, judged on the validation cards,
seed 0, model {model}. LoRA and QLoRA have rank 8 and alpha 64 on every matrix of every
block where nothing else is said; their scaling alpha / r is 8 in every row.

| method | learning rate | BLEU | slot errors | perplexity | tale perplexity | divergence |
|---|---:|---:|---:|---:|---:|---:|
"""

Key = tuple[str, str]  # the first two cells of a row


def key(label: str, rate: float) -> Key:
    return label, f"{rate:.1e}"


def row(label: str, report: Report) -> str:
    s = report.scores
    assert s is not None
    cells = [
        *key(label, report.learning_rate),
        f"{s.bleu:.1f}",
        f"{100 * s.slot_errors:.1f} %",
        f"{s.perplexity:.3f}",
        f"{s.tale_perplexity:.1f}",
        f"{s.divergence:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def read_rows(place: Path, head: str) -> dict[Key, str]:
    """The rows that a sweep of the same kind has written.

    Raises:
        SystemExit: the file is of another sweep, which would be lost.
    """
    if not place.exists():
        return {}
    text = place.read_text(encoding="utf-8")
    if not text.startswith(head):
        raise SystemExit(f"{place} is of another sweep (steps or model); move it away, or name another --output")
    lines = text[len(head) :].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(first, second): line for (first, second, *_), line in zip(cells, lines, strict=True)}


def write_rows(place: Path, head: str, rows: dict[Key, str]) -> None:
    """Sorted as the grid, and by the rate."""
    labels = [entry.label for entry in GRID]
    order = sorted(rows, key=lambda k: (labels.index(k[0]) if k[0] in labels else len(labels), k[0], float(k[1])))
    text = head + "".join(f"{rows[k]}\n" for k in order)
    write_atomically(place, lambda path: path.write_text(text, encoding="utf-8"))


def sweep(entries: Sequence[Entry], place: Path, model: str, steps: int, jobs: int | None, scratch: Path) -> None:
    """Carry out what is not in the file yet, and write each row as it comes."""
    head = HEAD.format(steps=steps, batch=defaults.BATCH_SIZE, model=model_fingerprint(model))
    rows = read_rows(place, head)
    planned = [(e, rate) for e in entries for rate in e.rates if key(e.label, rate) not in rows]
    scratch = scratch / f"{model_fingerprint(model)}-{steps}"  # a checkpoint goes on only with the same
    runs = [
        tuned_run(
            entry.method,
            scratch / f"{entry.label.replace(', alpha ', '-')}-{rate:.1e}",
            rate=rate,
            model=model,
            steps=steps,
            split="validation",
        )
        for entry, rate in planned
    ]

    def record(number: int, report: Report) -> None:
        label = planned[number][0].label
        line = row(label, report)
        rows[key(label, report.learning_rate)] = line
        write_rows(place, head, rows)
        print(line, flush=True)
        shutil.rmtree(runs[number].output, ignore_errors=True)

    def record_divergence(number: int, error: Exception) -> None:
        entry, rate = planned[number]
        rows[key(entry.label, rate)] = f"| {' | '.join([*key(entry.label, rate), 'diverged', *[''] * 4])} |"
        write_rows(place, head, rows)
        print(error, flush=True)

    in_fresh_processes(runs, jobs, record, record_divergence)
    write_rows(place, head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--steps", type=int, default=defaults.STEPS)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--rates", nargs="+", type=float, help="instead of the grid's")
    parser.add_argument("--jobs", type=int, help="runs at a time (2)")
    parser.add_argument("--output", type=Path, default=PLACE)
    parser.add_argument("--scratch", type=Path, default=Path("runs/learning-rates"))
    options = parser.parse_args()
    entries = [entry for entry in GRID if entry.name in options.methods]
    if options.rates:
        entries = [entry._replace(rates=tuple(options.rates)) for entry in entries]
    sweep(entries, options.output, options.model, options.steps, options.jobs, options.scratch)


if __name__ == "__main__":
    main()
