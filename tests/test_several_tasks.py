"""The benchmark on several tasks at once: its tasks, its parameter counts, and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import several_tasks
from benchmarks.memorising import Result, Runs
from benchmarks.several_tasks_runs import (
    ALONE,
    BASE_TASKS,
    CONFIG,
    DIVERGED,
    LENGTH,
    PAIRS,
    ROWS,
    SEEDS,
    SETTINGS,
    SYMBOLS,
    TASKS,
    TOGETHER,
    TOKENS,
    Rules,
    Setting,
    answers,
    batch_of,
    block_changes,
    examples,
    measured,
    rules,
    spectrum,
)
from lora_from_scratch.gpt2.model import GPT2, IGNORE_INDEX
from lora_from_scratch.methods.lora import LoRA

ROOT = Path(__file__).parent.parent


def in_plain_python(task: str, x: list[int], r: Rules) -> list[int]:
    """The right output, one symbol after the other."""
    places = range(LENGTH)
    if task == "recall":
        return next(v.tolist() for k, v in zip(r.keys, r.values, strict=True) if k.tolist() == x)
    if task == "sort":
        return [symbol for symbol in range(SYMBOLS) for _ in range(x.count(symbol))]
    return [
        {
            "reverse": lambda i: x[LENGTH - 1 - i],
            "reorder": lambda i: x[int(r.order[i])],
            "substitute": lambda i: int(r.table[x[i]]),
            "copy": lambda i: x[i],
            "rotate": lambda i: x[(i + 1) % LENGTH],
            "swap": lambda i: x[i + 1 if i % 2 == 0 else i - 1],
            "next": lambda i: 0 if x[i] == SYMBOLS - 1 else x[i] + 1,
        }[task](i)
        for i in places
    ]


@pytest.mark.parametrize("task", [*TASKS, *BASE_TASKS])
@pytest.mark.parametrize("seed", [*SEEDS, 0])
def test_the_outputs_are_those_of_an_independent_formula(task: str, seed: int) -> None:
    mine = rules(seed)
    for row in examples(task, 20, seed, 5, mine).tolist():
        token, x, y = row[0], row[1 : 1 + LENGTH], row[1 + LENGTH :]
        assert token == TOKENS[task] >= SYMBOLS
        assert y == in_plain_python(task, x, mine)


@pytest.mark.parametrize("seed", [*SEEDS, 0])
def test_the_random_order_is_not_one_that_the_base_or_another_task_has(seed: int) -> None:
    mine = rules(seed)
    x = torch.arange(LENGTH)[None]
    assert sorted(mine.order.tolist()) == list(range(LENGTH))
    assert sorted(mine.table.tolist()) == list(range(SYMBOLS))
    assert len(mine.keys.unique(dim=0)) == PAIRS
    for other in ("reverse", "sort", "copy", "rotate", "swap"):
        assert not torch.equal(answers("reorder", x, mine), answers(other, x, mine))


def test_a_task_has_the_same_examples_alone_as_with_the_others_and_the_loss_is_on_the_outputs() -> None:
    mine = rules(1)
    together = batch_of(TASKS, ROWS, 1, mine, 3)
    for place, task in enumerate(TASKS):
        alone = batch_of([task], ROWS, 1, mine, 3)
        assert torch.equal(alone.input_ids, together.input_ids[place * ROWS : (place + 1) * ROWS])
    assert (together.labels[:, : 1 + LENGTH] == IGNORE_INDEX).all()
    assert torch.equal(together.labels[:, 1 + LENGTH :], together.input_ids[:, 1 + LENGTH :])
    assert not torch.equal(batch_of(TASKS, ROWS, 1, mine, 4).input_ids, together.input_ids)


def parameters(setting: Setting) -> int:
    model = GPT2(CONFIG)
    setting.method.adapt(model)
    return sum(p.numel() for p in setting.method.trainable(model).values())


def test_lora_and_multilora_train_equally_many_parameters() -> None:
    counts = {setting.label: parameters(setting) for setting in SETTINGS}
    assert counts["lora, r = 8"] == counts["rslora, r = 8"] == counts["multilora, 3 of r = 2"]
    for label, count in counts.items():
        assert label == "full" or count == pytest.approx(counts["lora, r = 8"], rel=0.08)


def test_the_spectrum_of_equal_singular_values_and_of_rank_one() -> None:
    assert spectrum([torch.eye(8)[:5]]) == pytest.approx({"effective rank": 5, "largest": 0.2, "directions": 5})
    assert spectrum([torch.ones(4, 6)]) == pytest.approx({"effective rank": 1, "largest": 1, "directions": 1}, abs=1e-3)


def test_the_changes_of_the_blocks_are_those_of_the_adapted_matrices() -> None:
    torch.manual_seed(0)
    before, model = GPT2(CONFIG), GPT2(CONFIG)
    model.load_state_dict(before.state_dict())
    method = LoRA(rank=2)
    method.adapt(model)
    with torch.no_grad():
        for name, parameter in method.trainable(model).items():
            if name.endswith("lora_B"):
                parameter.normal_()
    changes = block_changes(before, method.merged_copy(model))
    assert len(changes) == 4 * CONFIG.n_layer
    assert all(torch.linalg.matrix_rank(change, rtol=1e-4) == 2 for change in changes)


def test_the_results_have_the_best_rate_and_a_stored_run_is_not_repeated(tmp_path: Path) -> None:
    ran: list[tuple[int, float]] = []

    def carry_out(setting: Setting, company: str, seed: int, rate: float) -> Result:
        ran.append((seed, rate))
        return {"rate": rate, "bits": DIVERGED if rate > 5e-2 else abs(rate - 1e-3)}

    for _ in range(2):
        tried, results = measured(Runs(tmp_path / "runs.json"), SETTINGS[0], TOGETHER, 10, carry_out)
        rates = [result["rate"] for result in tried]
        assert rates == sorted(rates)
        assert {result["rate"] for result in results} == {rates[1]}
        assert rates[0] < 9.9e-4 < 1e-3
    assert len(ran) == len(set(ran)) == len(tried) + len(SEEDS)


def test_the_page_has_the_stored_results_and_no_best_rate_is_at_the_edge() -> None:
    document = json.loads(several_tasks.RECORD.read_text(encoding="utf-8"))
    assert several_tasks.page(document) == several_tasks.PLACE.read_text(encoding="utf-8")
    rows = {(row["label"], row["tasks"]): row for row in document["rows"]}
    assert rows.keys() == {(s.label, TOGETHER) for s in SETTINGS} | {(s.label, ALONE) for s in SETTINGS if s.alone}
    for row in rows.values():
        best = min(row["tried"], key=lambda run: run["bits"])
        assert best not in (row["tried"][0], row["tried"][-1])
        assert [result["rate"] for result in row["results"]] == [best["rate"]] * len(SEEDS)


# --- The section of the atlas that quotes other experiments ----------------------------------------------


def section_items() -> dict[str, str]:
    """The text of each item of the section, by the file that it links to."""
    atlas = (ROOT / "docs" / "atlas.md").read_text(encoding="utf-8")
    section = atlas.partition("## Where the story cards cannot show")[2].partition("\n## ")[0]
    items = [" ".join(item.split()) for item in section.split("\n- ")[1:]]
    return {re.findall(r"\]\(\.\./([^)]*)\)", item)[0]: item for item in items}


def measured_in(file: str) -> str:
    """The text of a page, or the outputs and texts of a unit's solution."""
    if not file.endswith(".ipynb"):
        return (ROOT / file).read_text(encoding="utf-8")
    notebook = json.loads((ROOT / file.replace("notebooks/", "solutions/")).read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    texts = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return "\n".join("".join(lines) for lines in [*texts, *(output.get("text", "") for output in outputs)])


@pytest.mark.parametrize("file", section_items())
def test_every_number_that_the_atlas_quotes_is_in_the_experiment(file: str) -> None:
    quoted, there = re.findall(r"\d+[.,]\d+", section_items()[file]), measured_in(file)
    assert quoted
    assert [number for number in quoted if not re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d)", there)] == []
