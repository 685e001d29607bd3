"""The sweep of learning rates: it goes on until the best rate is inside, and no run is carried out twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import learning_rates
from benchmarks.learning_rates import RUNGS, best_rung, nearest_rung, next_rung, rate_at, sweep
from lora_from_scratch.compare.shootout import contestants
from lora_from_scratch.compare.side_by_side import tuned_run
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune import run as finetune_run
from lora_from_scratch.finetune.run import Run, finetune
from lora_from_scratch.finetune.story_cards import story_cards
from lora_from_scratch.methods.bitfit import BitFit
from lora_from_scratch.support.shard import Shard
from tests.tiny_runs import files_in, make_model, shorten_evaluation


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("sweep") / "model"))


def search(losses: dict[int, float], start: int) -> dict[int, float]:
    """The rungs that the search tries, with their losses."""
    tried: dict[int, float] = {}
    while (rung := next_rung(tried, start)) is not None:
        tried[rung] = losses[rung]
    return tried


def test_the_rates_are_one_and_three_times_powers_of_ten() -> None:
    assert [rate_at(rung) for rung in range(-7, -2)] == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
    assert all(nearest_rung(rate_at(rung)) == rung for rung in RUNGS)
    assert rate_at(nearest_rung(2.5e-3)) == 3e-3


@pytest.mark.parametrize("start", [-10, -5, 0, 4])
@pytest.mark.parametrize("optimum", [-9, -5, -2, 3])
def test_the_search_goes_on_until_the_best_rate_is_between_two_worse_ones(start: int, optimum: int) -> None:
    tried = search({rung: abs(rung - optimum) + 0.1 * (rung > optimum) for rung in RUNGS}, start)
    assert best_rung(tried, start) == optimum
    assert min(tried) < optimum < max(tried)
    assert len(tried) <= abs(start - optimum) + 4


def test_a_rate_that_diverges_is_worse_than_any_and_equal_losses_end_the_search() -> None:
    tried = search({rung: math.inf if rung > -6 else 1.0 - rung for rung in RUNGS}, -4)
    assert best_rung(tried, -4) == -6
    assert search(dict.fromkeys(RUNGS, 2.0), -4) == {-4: 2.0, -3: 2.0, -5: 2.0}


def test_an_interrupted_sweep_resumes_and_leaves_the_same_files(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[float] = []

    def loss(run: Run) -> float | None:
        tried.append(run.settings.learning_rate)
        return None if run.settings.learning_rate > 1 else abs(math.log(run.settings.learning_rate / 0.3))

    def interrupted(run: Run) -> float | None:
        if len(tried) == 2:
            raise KeyboardInterrupt
        return loss(run)

    monkeypatch.setattr(learning_rates, "validation_loss", loss)
    assert sweep("bitfit", tmp_path / "whole", model=model, steps=7) == 0.3
    whole, order = files_in(tmp_path / "whole"), tuple(tried)
    tried.clear()
    monkeypatch.setattr(learning_rates, "validation_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep("bitfit", tmp_path / "again", model=model, steps=7)
    monkeypatch.setattr(learning_rates, "validation_loss", loss)
    assert sweep("bitfit", tmp_path / "again", model=model, steps=7) == 0.3
    assert tuple(tried) == order
    assert files_in(tmp_path / "again") == whole
    assert sweep("bitfit", tmp_path / "again", model=model, steps=7) == 0.3
    assert tuple(tried) == order


def test_the_loss_is_that_of_the_first_references_of_the_validation_cards(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_evaluation(monkeypatch)
    cards = story_cards(train=20, validation=3, test=1)
    for module in (learning_rates, finetune_run):
        monkeypatch.setattr(module, "load_dataset", lambda name: cards)
    monkeypatch.setattr(learning_rates, "CARDS", 3)
    run = tuned_run(BitFit(), tmp_path / "a", rate=1e-2, model=model, steps=2, split="", cards=3)
    scores = finetune(replace(run, split="validation", output=tmp_path / "b"), progress=False).scores
    assert scores
    loss = learning_rates.validation_loss(run)
    assert loss == pytest.approx(math.log(scores.perplexity), rel=1e-5)
    assert learning_rates.validation_loss(replace(run, settings=replace(run.settings, learning_rate=1e38))) is None


def test_shards_give_every_method_to_one_machine() -> None:
    names = [f"method {number}" for number in range(40)]
    for name in names:
        assert sum(Shard(number, 3).holds(name) for number in (1, 2, 3)) == 1


def test_the_results_of_several_machines_are_collected_in_one_table(tmp_path: Path) -> None:
    place = tmp_path / "sweep.md"
    for folder, name, losses in (("one", "bitfit", (3.0, 2.0, None)), ("two", "lora", (4.0, 1.5, 2.5))):
        for rate, loss in zip((1e-3, 3e-3, 1e-2), losses, strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            result = {"method": name, "steps": 50, "learning_rate": rate, "loss": loss}
            (tmp_path / folder / f"{name}-{rate}.json").write_text(json.dumps(result))
        learning_rates.collect(tmp_path / folder, place, "abc")
    rows = [line for line in place.read_text().splitlines() if line.startswith("| ")]
    assert rows == [
        "| method | 1e-03 | 3e-03 | 1e-02 |",
        "| --- | ---: | ---: | ---: |",
        "| lora | 4.000 | **1.500** | 2.500 |",
        "| bitfit | 3.000 | **2.000** | diverged |",
    ]


def test_the_committed_table_is_written_from_the_committed_results() -> None:
    results = json.loads(learning_rates.PLACE.with_suffix(".json").read_text(encoding="utf-8"))
    written = learning_rates.PLACE.read_text(encoding="utf-8")
    fingerprint = learning_rates.model_fingerprint("bundled")
    assert learning_rates.page(results, fingerprint) == written


def test_the_committed_sweep_has_the_best_rate_inside_and_every_method_uses_it() -> None:
    results = json.loads(learning_rates.PLACE.with_suffix(".json").read_text(encoding="utf-8"))
    methods = contestants()
    by_scores = {r["method"] for r in results if r["method"] in methods and "bleu" in r}  # chosen by BLEU
    swept: dict[tuple[str, int], dict[float, float]] = {}
    for result in results:
        if "bleu" not in result:
            loss = math.inf if result["loss"] is None else result["loss"]
            swept.setdefault((result["method"], result["steps"]), {})[result["learning_rate"]] = loss
    for (name, steps), losses in swept.items():
        best = min(losses, key=lambda rate: losses[rate])
        assert min(losses) < best < max(losses), (name, steps)
        if steps == defaults.STEPS:  # as many as `finetune` carries out by default
            assert methods[name].learning_rate(256) == best, name
    assert by_scores | {name for name, steps in swept if steps == defaults.STEPS} == set(methods)
