"""The demo: two runs of `finetune` side by side, as a table, a figure and texts."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lora_from_scratch.methods.registry import load_adapter

from lora_from_scratch.cli import main
from lora_from_scratch.compare import demo as demonstration
from lora_from_scratch.finetune import side_by_side
from lora_from_scratch.finetune.evaluation import Scores
from lora_from_scratch.finetune.report import describe, table
from lora_from_scratch.finetune.run import Report, Run, finetune
from lora_from_scratch.finetune.training import TrainingSettings
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.methods.full_finetuning import FullFineTuning


@pytest.fixture
def here(quiet_run: Path, short_evaluation: None) -> Path:
    return quiet_run


def report(name: str, **changes: Any) -> Report:
    scores = Scores(bleu=40.0, slot_errors=0.1, perplexity=3.0, tale_perplexity=50.0, divergence=0.2)
    sample = {"mr": "hero[fox]", "before": "A tree.", "after": f"A fox, says {name}."}
    given = Report(
        method=name,
        trained_parameters=100,
        total_parameters=1000,
        learning_rate=1e-3,
        seconds=60.0,
        peak_memory_bytes=500_000_000,
        saved_bytes=2_000_000,
        final_loss=1.0,
        output="out",
        scores=scores,
        tale_perplexity_before=30.0,
        samples=[sample],
        losses=[2.0, 1.0],
    )
    return replace(given, **changes)


def test_the_table_is_markdown_with_a_row_for_each_report() -> None:
    lines = table([report("full"), report("lora", trained_parameters=10)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) == set("|-:")
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["10.00 %", "1.00 %"]


def test_the_description_shows_each_card_before_and_by_each_method() -> None:
    said = describe([report("full"), report("lora")])
    assert said.splitlines() == [
        "Card    hero[fox]",
        "before  A tree.",
        "full    A fox, says full.",
        "lora    A fox, says lora.",
    ]


def test_the_demo_writes_table_numbers_figure_and_both_results(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(runs: list[Run], jobs: int | None) -> list[Report]:
        short = [replace(run, data=str(here / "data.csv"), batch_size=2, cards=1) for run in runs]
        return [finetune(run, progress=False) for run in short]

    monkeypatch.setattr(demonstration, "in_fresh_processes", in_this_process)
    assert main(["demo", "--model", str(here / "model"), "--output", str(tmp_path), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().strip() in said
    both = json.loads((tmp_path / "demo.json").read_text())
    assert [each["method"] for each in both] == ["full", "lora"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    load_gpt2(tmp_path / "full")
    model, _ = load_gpt2(here / "model")
    load_adapter(model, tmp_path / "lora")
    for place in ("table.md", "demo.png", "demo.json", "lora", "full"):
        assert str(tmp_path / place) in said


def test_the_demo_compares_what_can_be_compared() -> None:
    nothing = replace(report("full").scores, bleu=0.0)  # type: ignore[type-var]
    assert "BLEU" not in demonstration.relative(report("lora"), report("full", scores=nothing))
    ratios = demonstration.relative(report("lora", trained_parameters=5, seconds=30.0), report("full"))
    assert ratios["trained parameters"] == pytest.approx(5)
    assert ratios["seconds"] == pytest.approx(50)
    assert ratios["BLEU"] == pytest.approx(100)


def _die(run: Run) -> Report:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_training_process_that_is_killed_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "finetune", _die)
    run = Run(FullFineTuning(), TrainingSettings(steps=1, learning_rate=1.0), Path("nowhere"))
    with pytest.raises(ChildProcessError, match="a training process was killed, perhaps because memory ran out"):
        side_by_side.in_fresh_processes([run])
