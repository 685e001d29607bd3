"""Which part of a classifier to tune for which shift (Lee et al. 2023, arXiv:2210.11466), with five seeds.

    python -m benchmarks.surgical [--results FOLDER]

Every choice of what to tune has its own learning rate for each shift: the one with the highest accuracy on validation
pictures. Each result is stored as soon as it is there, so an interrupted benchmark can be continued. Writes
`surgical.json`, `surgical.md` and two figures in docs/.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_from_scratch.pictures.digits import Pictures, on_grey_paper, shifted, source
from lora_from_scratch.pictures.grid import picture_grid
from lora_from_scratch.pictures.surgical import STEPS, adapt, choices
from lora_from_scratch.pictures.training import accuracy, pretrained_vit
from lora_from_scratch.pictures.vit import ViT
from lora_from_scratch.support import plotting
from lora_from_scratch.support.files import write_json

DOCS = Path(__file__).parent.parent / "docs"
PAGE, RECORD = Path(__file__).with_suffix(".md"), Path(__file__).with_suffix(".json")
SHIFTS: dict[str, Callable[[str], Pictures]] = {
    "input: grey paper": on_grey_paper,
    "input: inverted": partial(shifted, "input"),
    "feature: other digits": partial(shifted, "feature"),
    "output: other labels": partial(shifted, "output"),
}
SEEDS, TUNING_SEEDS = range(5), (991, 992)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)

Result = dict[str, Any]  # "validation": the mean accuracy for each of `RATES`; "test": the accuracy for each seed


def measure(shift: str, choice: str) -> Result:
    """Choose the learning rate by validation accuracy (the smallest of equal ones), and test with other seeds."""
    data, validation, test = (SHIFTS[shift](part) for part in ("train", "validation", "test"))
    scores = [
        statistics.mean(accuracy(adapt(choice, data, rate, seed=seed), validation) for seed in TUNING_SEEDS)
        for rate in RATES
    ]
    rate = RATES[scores.index(max(scores))]
    found = [accuracy(adapt(choice, data, rate, seed=seed), test) for seed in SEEDS]
    return {"validation": scores, "rate": rate, "test": found}


def results(folder: Path) -> dict[tuple[str, str], Result]:
    """The result for each shift and choice, measured now or found in the folder."""
    found = {}
    for shift in SHIFTS:
        for choice in choices(ViT()):
            file = folder / f"{shift}-{choice}.json".replace(": ", "-").replace(" ", "-")
            if not file.exists():
                write_json(file, measure(shift, choice))
            found[shift, choice] = result = json.loads(file.read_text(encoding="utf-8"))
            print(shift, choice, result["rate"], mean_and_spread(result["test"]), flush=True)
    return found


def mean_and_spread(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


# --- The page ------------------------------------------------------------------------------------------


TEXT = """\
# Surgical fine-tuning on pictures of digits

`python -m benchmarks.surgical` writes this file.

The classifier (a ViT with 0.3 M parameters) has learned the digits 0 to 4. It is adapted to a shifted task with 100
pictures in {steps} steps of 10. The table shows the test accuracy in %: the mean and the standard deviation over five
seeds, all on the same 150 pictures, so that each mean has a standard error of up to 4 points because of the pictures.
The best parts of each column are in bold: those that are at most 4 points below its best. Chance is 20 %.

{table}

![The same numbers as bars.](../docs/pictures-surgical.png)

![Five pictures of each class, before and after each shift.](../docs/pictures-shifts.png)

- **Other labels**: the head is the best part, as in the paper, and the later blocks are nearly as good. Tuning the
  whole model with one learning rate reaches less than half of that.
- **Other digits**: the middle of the network (blocks 2 and 3) is as good as the whole model. In the paper it is best.
- **Grey paper**: in the paper the input layers are best. Here they are not: the head, Auto-RGN and LoRA are.
- **Inverted**: nothing adapts well in 60 steps. The embedding, which the paper would choose, is second to the head.
- **Auto-RGN** is among the best for one shift of four, and below the whole model for two.

## Learning rates

For each cell, the rate with the highest accuracy on 50 validation pictures, as the mean of two other seeds, was chosen
of {rates}. In brackets: at the edge of the grid. On grey paper the head may
gain from a higher rate; the other two in brackets are at chance with every rate.

{chosen}
"""


def page(found: dict[tuple[str, str], Result]) -> str:
    names = choices(ViT())
    head = f"| tuned | {' | '.join(SHIFTS)} |\n|---{'|---:' * len(SHIFTS)}|\n"
    before = [f"{100 * accuracy(pretrained_vit(), task('test')):.1f}" for task in SHIFTS.values()]
    table = head + f"| nothing | {' | '.join(before)} |\n"
    best = {shift: max(statistics.mean(found[shift, name]["test"]) for name in names) for shift in SHIFTS}
    chosen = head
    for name in names:
        cells = []
        for shift in SHIFTS:
            text = mean_and_spread(found[shift, name]["test"])
            near = statistics.mean(found[shift, name]["test"]) >= best[shift] - 0.04
            cells.append(f"**{text}**" if near else text)
        table += f"| {name} | {' | '.join(cells)} |\n"
        rates = [found[shift, name]["rate"] for shift in SHIFTS]
        chosen += f"| {name} | {' | '.join(f'({r:g})' if r in (RATES[0], RATES[-1]) else f'{r:g}' for r in rates)} |\n"
    rates_said = f"{', '.join(f'{rate:g}' for rate in RATES[:-1])} and {RATES[-1]:g}"
    return TEXT.format(steps=STEPS, table=table.rstrip(), rates=rates_said, chosen=chosen.rstrip())


def draw_accuracies(found: dict[tuple[str, str], Result]) -> None:
    names = choices(ViT())
    figure, panels = plotting.panels(len(SHIFTS), width=3.4, height=3.4)
    means = {key: 100 * statistics.mean(result["test"]) for key, result in found.items()}
    for axes, shift in zip(panels, SHIFTS, strict=True):
        plotting.bars(axes, {name: round(means[shift, name], 1) for name in names}, unit="")
        plotting.label(axes, x="test accuracy in %", title=shift)
    words = "; ".join(f"{s}: " + ", ".join(f"{n} {means[s, n]:.0f} %" for n in names) for s in SHIFTS)
    plotting.save(figure, DOCS / "pictures-surgical.png", f"Accuracy by what is tuned, for each shift. {words}.")


def draw_shifts() -> None:
    chosen = {"learned: classes 0 to 4": source("train")} | {name: task("train") for name, task in SHIFTS.items()}
    figure, panels = plotting.panels(len(chosen), width=2.4, height=2.7)
    for axes, (name, data) in zip(panels, chosen.items(), strict=True):
        first = torch.cat([(data.labels == label).nonzero()[:5, 0] for label in range(5)])
        picture_grid(axes, data.pictures[first], 5, title=name)
    said = "Five pictures of each of the five classes, before and after each shift."
    plotting.save(figure, DOCS / "pictures-shifts.png", said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs") / "surgical")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = results(options.results)
    write_json(RECORD, [[*key, result] for key, result in found.items()])
    PAGE.write_text(page(found), encoding="utf-8")
    draw_accuracies(found)
    draw_shifts()


if __name__ == "__main__":
    main()
