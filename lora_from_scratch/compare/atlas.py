"""The atlas: what every method reaches, costs and forgets, each at its own learning rate and with several seeds.

Each run is a folder, `NAME-SEED`, with a small `report.json`. To use several machines, give each a shard, collect the
folders in one, and call `atlas` on it without a shard.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_from_scratch.compare.shootout import choose, contestants
from lora_from_scratch.compare.side_by_side import cores, jobs_at_once, reload, run_or_reload, tuned_run
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.distributed import find_device
from lora_from_scratch.finetune.evaluation import CARDS
from lora_from_scratch.finetune.report import markdown, size
from lora_from_scratch.finetune.run import Report, Run
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.method import Method
from lora_from_scratch.support.files import check_writable, write_atomically, write_json
from lora_from_scratch.support.shard import EVERYTHING, Shard

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEEDS = (0, 1, 2)
TOKENS = 128  # in the text on which the work is counted
Document = dict[str, Any]  # what `atlas.json` holds: settings, and "methods" with the results of each


@dataclass(frozen=True)
class Contestant:
    """One run of the atlas."""

    name: str
    seed: int
    run: Run


def atlas(
    output: str | Path,
    *,
    model: str = "bundled",
    methods: Sequence[str] = (),
    steps: int = defaults.STEPS,
    cards: int = CARDS,
    seeds: Sequence[int] = SEEDS,
    shard: Shard = EVERYTHING,
    train: bool = True,
    jobs: int | None = None,
    device: str = "cpu",
) -> None:
    """Carry out the runs that are missing, all methods with the first seed before the second, and write the results.

    Writes `atlas.json`, `table.md` and `atlas.png` under `output`, unless `shard` is a part of the whole. If it is
    interrupted and called again, it resumes.

    Args:
        methods: names of `contestants`; by default all of them.
        shard: carry out only the runs in it.
        train: False to write the results of the runs that are finished, and train nothing.

    Raises:
        ValueError, OSError: something is wrong with the methods, the settings, the model or the output folder, or there
            are no results to write.
    """
    output = Path(output)
    jobs_at_once(jobs)
    check_writable(output)
    find_device(device)
    config = GPT2Config.from_json(checkpoint_directory(model) / "config.json")
    planned = [
        Contestant(name, seed, tuned_run(
            method, output / f"{name}-{seed}", rate=method.learning_rate(config.n_embd), model=model, steps=steps,
            seed=seed, cards=cards, device=device,
        ))
        for seed in dict.fromkeys(seeds)
        for name, method in choose(methods or tuple(contestants()), seed).items()
    ]  # fmt: skip
    if train:
        run_or_reload([each.run for each in planned if shard.holds(each.run.output.name)], jobs)
    if shard != EVERYTHING:
        print(f"Shard {shard} is finished. Collect the folders of all shards in one, and run without --shard there.")
        return
    reports = reload([each.run for each in planned])
    finished = [(each, report) for each, report in zip(planned, reports, strict=True) if report]
    if not finished:
        raise ValueError(f"no run with these settings is finished in {output}")
    write(document(finished, config, steps=steps, cards=cards), output)
    print(f"{len(finished)} of {len(planned)} runs: {output / 'table.md'}, {output / 'atlas.png'}")


# --- The results -------------------------------------------------------------------------------------


def document(finished: Sequence[tuple[Contestant, Report]], config: GPT2Config, *, steps: int, cards: int) -> Document:
    """All results as JSON: for each method what does not depend on the seed, and the scores of each seed."""
    base = multiply_adds(GPT2(config))
    by_name: dict[str, Document] = {}
    for each, report in finished:
        if each.name not in by_name:
            print(f"Counting the multiply-adds of {each.name}", file=sys.stderr)
            by_name[each.name] = costs(each.run.method, report, config, base)
        by_name[each.name]["runs"].append({
            "seed": each.seed,
            "seconds": report.seconds,
            "peak_memory_bytes": report.peak_memory_bytes,
            "final_loss": report.final_loss,
            **(asdict(report.scores) if report.scores else {}),
        })  # fmt: skip
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {cores()} cores, Python {platform.python_version()}, torch "
        + torch.__version__,
        "steps": steps,
        "batch_size": defaults.BATCH_SIZE,
        "cards": cards,
        "tale_perplexity_before": finished[0][1].tale_perplexity_before,
        "methods": [{"name": name, **values} for name, values in by_name.items()],
    }


def costs(method: Method, report: Report, config: GPT2Config, base: tuple[int, int]) -> Document:
    """What does not depend on the seed. The work is relative to that of the base model, trained in full."""
    with torch.random.fork_rng():
        model = GPT2(config)
        method.adapt(model)
        forward, step = multiply_adds(model)
    return {
        "learning_rate": report.learning_rate,
        "trained_parameters": report.trained_parameters,
        "saved_parameters": report.saved_parameters,
        "saved_bytes": report.saved_bytes,
        "can_merge": method.can_merge,
        "forward_work": forward / base[0],
        "step_work": step / base[1],
        "runs": [],
    }


def multiply_adds(model: GPT2) -> tuple[int, int]:
    """The multiply-adds of the matrix products in a forward pass, and in a training step, for a text of 128 tokens.

    Elementwise operations and the optimiser are not counted, nor is converting a quantised weight.
    """
    ids = torch.zeros(1, min(TOKENS, model.config.n_positions), dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH):  # of the kernels for attention the one whose products are counted
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model.eval()(ids)
        with FlopCounterMode(display=False) as step:
            model.train()(ids).sum().backward()
    return forward.get_total_flops() // 2, step.get_total_flops() // 2


# --- Table and figure --------------------------------------------------------------------------------

HEADINGS = (
    "method", "learning rate", "trained", "saved", "peak memory", "forward work", "step work", "seeds", "BLEU",
    "slot errors", "perplexity", "tales", "divergence",
)  # fmt: skip


def write(results: Mapping[str, Any], output: Path) -> None:
    """Write the JSON file, the page with the table, and the figure."""
    write_json(output / "atlas.json", results)
    write_atomically(output / "table.md", lambda path: path.write_text(page(results), encoding="utf-8"))
    draw(results, output / "atlas.png")


def page(results: Mapping[str, Any]) -> str:
    """How it was measured, the table, and the figure with its alternative text."""
    return (
        f"{len(results['methods'])} methods, {results['steps']} steps of batch {results['batch_size']}, "
        f"{results['cards']} test cards; {results['date']}; {results['machine']}. Perplexity of the tales before "
        f"fine-tuning: {results['tale_perplexity_before']:.1f}.\n\n{table(results)}\n\n"
        f"![{alternative_text(results)}](atlas.png)\n"
    )


def table(results: Mapping[str, Any]) -> str:
    return markdown([HEADINGS, *(_cells(method) for method in results["methods"])])


def _cells(method: Mapping[str, Any]) -> tuple[str, ...]:
    kept, trained = method["saved_parameters"], method["trained_parameters"]
    return (
        method["name"],
        f"{method['learning_rate']:.2g}",
        f"{trained:,}" + (f" ({kept:,} kept)" if 0 < kept < trained else ""),
        size(method["saved_bytes"]),
        size(max(run["peak_memory_bytes"] for run in method["runs"])),
        f"{100 * method['forward_work']:.1f} %" + (" (100 % merged)" if method["can_merge"] else ""),
        f"{100 * method['step_work']:.1f} %",
        str(len(method["runs"])),
        spread(values(method, "bleu"), 1),
        spread([100 * value for value in values(method, "slot_errors")], 1) + " %",
        spread(values(method, "perplexity"), 2),
        spread(values(method, "tale_perplexity"), 0),
        spread(values(method, "divergence"), 2),
    )


def values(method: Mapping[str, Any], what: str) -> list[float]:
    """One number for each seed."""
    return [run[what] for run in method["runs"]]


def spread(numbers: Sequence[float], digits: int) -> str:
    """The mean, with the smallest and the largest in brackets if there are several."""
    text = f"{mean(numbers):,.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ({min(numbers):,.{digits}f} to {max(numbers):,.{digits}f})"


def ranked(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The methods, the best BLEU first."""
    return sorted(results["methods"], key=lambda method: -mean(values(method, "bleu")))


def alternative_text(results: Mapping[str, Any]) -> str:
    """The figure in words."""
    names = "; ".join(f"{m['name']} {mean(values(m, 'bleu')):.1f}" for m in ranked(results))
    return (
        "A row of dots for each method, with its BLEU, slot errors, trained parameters, bytes kept on disk, peak "
        f"memory, work of a training step and perplexity of the tales. By BLEU: {names}."
    )


def draw(results: Mapping[str, Any], path: Path) -> None:
    """A row for each method, the best at the top, and a panel for each quantity; lines from the lowest to the highest
    seed."""
    from lora_from_scratch.support import plotting

    order = ranked(results)
    columns: list[tuple[str, bool, list[list[float]]]] = [
        ("BLEU", False, [values(m, "bleu") for m in order]),
        ("slot errors, %", False, [[100 * v for v in values(m, "slot_errors")] for m in order]),
        ("trained parameters", True, [[m["trained_parameters"]] for m in order]),
        ("kept on disk, kB", True, [[m["saved_bytes"] / 1e3] for m in order]),
        ("peak memory, MB", False, [[v / 1e6 for v in values(m, "peak_memory_bytes")] for m in order]),
        ("work of a step, %\nof full fine-tuning", False, [[100 * m["step_work"]] for m in order]),
        ("perplexity of tales\n(forgetting)", True, [values(m, "tale_perplexity") for m in order]),
    ]
    figure, panels = plotting.panels(len(columns), width=1.75, height=1.1 + 0.24 * len(order))
    names = [m["name"] for m in order]
    for place, (axes, (title, logarithmic, numbers)) in enumerate(zip(panels, columns, strict=True)):
        plotting.styled(_draw_rows)(axes, numbers, names if place == 0 else None, logarithmic)
        plotting.label(axes, x=title)
    description = alternative_text(results)
    write_atomically(path, lambda temporary: plotting.save(figure, temporary, description))


def _draw_rows(axes: Axes, rows: Sequence[Sequence[float]], names: Sequence[str] | None, logarithmic: bool) -> None:
    """For each row, from top to bottom, a dot at the mean and a line from the smallest number to the largest."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        every = [number for numbers in rows for number in numbers]
        if max(every) < 30 * min(every):  # powers of ten alone would be too few
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for place, numbers in enumerate(rows):
        axes.plot([min(numbers), max(numbers)], [place, place], color="0.4", linewidth=1.8)
        axes.plot(mean(numbers), place, "o", color="0.1", markersize=5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), names or [""] * len(rows))
    axes.tick_params(axis="y", length=0)
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
