"""The shootout: every method on the same task with the same number of steps, in one table and one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lora_from_scratch.compare.side_by_side import jobs_at_once, run_or_reload, tuned_run
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.distributed import find_device
from lora_from_scratch.finetune.evaluation import CARDS
from lora_from_scratch.finetune.report import HEADINGS, table
from lora_from_scratch.finetune.run import Report
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.registry import for_training, method_classes
from lora_from_scratch.support.files import check_writable, write_atomically, write_json

COLUMNS = (*HEADINGS, "divergence")


def contestants(seed: int = 0) -> dict[str, Method]:
    """Everything that can take part, by its name in the table; each method defines its own `Method.contestants`."""
    return {
        name: for_training(cls, seed, **hyperparameters)
        for cls in method_classes().values()
        for name, hyperparameters in cls.contestants().items()
    }


def default_contestants() -> tuple[str, ...]:
    """The names of those that take part by default."""
    on_request = frozenset().union(*(cls.only_on_request for cls in method_classes().values()))
    return tuple(name for name in contestants() if name not in on_request)


def choose(names: Sequence[str], seed: int = 0) -> dict[str, Method]:
    """The methods with these names, each once, in the given order.

    Raises:
        ValueError: a name is unknown, or no names are given.
    """
    known = contestants(seed)
    if not names:
        raise ValueError(f"name at least one method; there are {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown method {name!r}; the methods of the shootout are {', '.join(known)}")
    return {name: known[name] for name in names}


def shootout(
    output: str | Path,
    *,
    model: str = "bundled",
    methods: Sequence[str] = (),
    steps: int = defaults.STEPS,
    cards: int = CARDS,
    seed: int = 0,
    jobs: int | None = None,
    device: str = "cpu",
) -> list[Report]:
    """Fine-tune with each method in a separate process, print the results and save them.

    `methods` are names of `contestants`; by default, the `default_contestants`.

    Writes `table.md`, `shootout.json`, `shootout.png` and a directory for each method under `output`. If it is
    interrupted and called again, it resumes: methods that are finished with the same settings are not trained again.

    Raises:
        ValueError, OSError: something is wrong with the methods, the settings, the model or the output folder.
    """
    output = Path(output)
    chosen = choose(methods or default_contestants(), seed)
    jobs_at_once(jobs)
    check_writable(output)
    find_device(device)
    config = GPT2Config.from_json(checkpoint_directory(model) / "config.json")
    runs = [
        tuned_run(
            method, output / name, rate=method.learning_rate(config.n_embd), model=model, steps=steps, seed=seed,
            cards=cards, device=device,
        )
        for name, method in chosen.items()
    ]  # fmt: skip
    reports = [replace(report, method=name) for name, report in zip(chosen, run_or_reload(runs, jobs), strict=True)]
    text = table(reports, COLUMNS)
    said = alternative_text(reports)
    page = f"{text}\n\n![{said}](shootout.png)\n"
    write_atomically(output / "table.md", lambda path: path.write_text(page, encoding="utf-8"))
    write_json(output / "shootout.json", [asdict(report) for report in reports])
    draw(reports, output / "shootout.png")
    print(f"\n{text}\n")
    print(f"Table, figure and numbers: {output / 'table.md'}, {output / 'shootout.png'}, {output / 'shootout.json'}")
    return reports


def alternative_text(reports: Sequence[Report]) -> str:
    """The figure in words, best method first."""
    ranked = sorted(((r.scores.bleu, r) for r in reports if r.scores), key=lambda pair: -pair[0])
    points = "; ".join(f"{r.method} {bleu:.1f} with {r.trained_parameters:,}" for bleu, r in ranked)
    return f"BLEU of each method against the number of parameters that it trains, on a logarithmic axis: {points}."


def draw(reports: Sequence[Report], path: Path) -> None:
    """Plot quality against trained parameters, with a named point for each method."""
    from lora_from_scratch.support import plotting

    figure, (axes,) = plotting.panels(1, width=7.2, height=4.4)
    points = {r.method: (float(r.trained_parameters), r.scores.bleu) for r in reports if r.scores}
    axes.set_xscale("log")
    plotting.label(
        axes, x="trained parameters (logarithmic)", y="BLEU on the test cards", title="What a trained parameter buys"
    )
    plotting.points(axes, points)
    description = alternative_text(reports)
    write_atomically(path, lambda temporary: plotting.save(figure, temporary, description))
