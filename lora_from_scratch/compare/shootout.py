"""Every core method on the same task with the same number of steps: one table, one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lora_from_scratch.methods.spafit import SPAFIT

from lora_from_scratch.compare.side_by_side import carry_out, jobs_at_once, tuned_run
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.evaluation import CARDS
from lora_from_scratch.finetune.report import HEADINGS, table
from lora_from_scratch.finetune.run import Report
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.adapters import Adapter
from lora_from_scratch.methods.bitfit import BitFit
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.llama_adapter import LlamaAdapter
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.prefix_tuning import PrefixTuning
from lora_from_scratch.methods.prompt_tuning import PromptTuning
from lora_from_scratch.methods.qlora import QLoRA
from lora_from_scratch.support.files import check_writable, write_atomically, write_json

CORE = (
    "full",
    "lora",
    "qlora",
    "adapter-houlsby",
    "adapter-parallel",
    "prefix",
    "prompt",
    "llama-adapter",
    "bitfit",
    "spafit",
)
COLUMNS = (*HEADINGS, "divergence")


def contestants(seed: int = 0) -> dict[str, Method]:
    """All that can take part, by the name in the table: the core methods and a third kind of adapter."""
    return {
        "full": FullFineTuning(keep_base=False),
        "lora": LoRA(seed=seed),
        "qlora": QLoRA(seed=seed, keep_base=False),
        "adapter-houlsby": Adapter(variant="houlsby", seed=seed),
        "adapter-parallel": Adapter(variant="parallel", seed=seed),
        "adapter-pfeiffer": Adapter(variant="pfeiffer", seed=seed),
        "prefix": PrefixTuning(seed=seed),
        "prompt": PromptTuning(seed=seed),
        "llama-adapter": LlamaAdapter(seed=seed),
        "bitfit": BitFit(),
        "spafit": SPAFIT(seed=seed),
    }


def choose(names: Sequence[str], seed: int = 0) -> dict[str, Method]:
    """The methods of these names, each once, in the order given.

    Raises:
        ValueError: a name is unknown, or there is none.
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
    methods: Sequence[str] = CORE,
    steps: int = defaults.STEPS,
    cards: int = CARDS,
    seed: int = 0,
    jobs: int | None = None,
) -> list[Report]:
    """Fine-tune by each method in a process of its own, show and save.

    Writes `table.md`, `shootout.json`, `shootout.png` and a directory for each method under `output`. Killed and
    started again, it goes on where it was: a method that is finished, with the same settings, is not trained again.

    Raises:
        ValueError, OSError: whatever is wrong with the methods, the settings, the model or the place to write to.
    """
    output = Path(output)
    chosen = choose(methods, seed)
    jobs_at_once(jobs)
    check_writable(output)
    config = GPT2Config.from_json(checkpoint_directory(model) / "config.json")
    runs = [
        tuned_run(
            method, output / name, rate=learning_rate(name, method, config), model=model, steps=steps, seed=seed,
            cards=cards,
        )
        for name, method in chosen.items()
    ]  # fmt: skip
    reports = [replace(report, method=name) for name, report in zip(chosen, carry_out(runs, jobs), strict=True)]
    text = table(reports, COLUMNS)
    said = alternative_text(reports)
    page = f"{text}\n\n![{said}](shootout.png)\n"
    write_atomically(output / "table.md", lambda path: path.write_text(page, encoding="utf-8"))
    write_json(output / "shootout.json", [asdict(report) for report in reports])
    draw(reports, output / "shootout.png")
    print(f"\n{text}\n")
    print(f"Table, figure and numbers: {output / 'table.md'}, {output / 'shootout.png'}, {output / 'shootout.json'}")
    return reports


def learning_rate(name: str, method: Method, config: GPT2Config) -> float:
    """The tuned rate of this contestant; where a variant has none of its own, that of its method."""
    return defaults.learning_rate_for(name if name in defaults.LEARNING_RATES else method.name, config)


def alternative_text(reports: Sequence[Report]) -> str:
    """The figure in words, the best first."""
    judged = sorted(((r.scores.bleu, r) for r in reports if r.scores), key=lambda pair: -pair[0])
    points = "; ".join(f"{r.method} {bleu:.1f} with {r.trained_parameters:,}" for bleu, r in judged)
    return f"BLEU of each method against the number of parameters that it trains, on a logarithmic axis: {points}."


def draw(reports: Sequence[Report], path: Path) -> None:
    """Quality against trained parameters: a point for each method, with its name."""
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
