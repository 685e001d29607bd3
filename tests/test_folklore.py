"""The folklore: fair comparisons, verdicts, and the benchmark whose results ship with the package."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import folklore, folklore_runs
from benchmarks.folklore_claims import ATTENTION, ATTENTION_ONLY, CLAIMS, MLP, MLP_ONLY, sweep_of_seed
from benchmarks.folklore_runs import NotRunError, Runs, Setting, in_cipher, training_examples
from lora_from_scratch.compare.folklore import (
    FAILS,
    HOLDS,
    UNDECIDED,
    best_rate_ratio,
    matched_rank,
    rate_sweeps,
    read_claims,
    relative_change_by_block,
    steps_per_epoch,
    verdict,
)
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.methods.lora import LoRA

OPPOSITE = {HOLDS: FAILS, FAILS: HOLDS, UNDECIDED: UNDECIDED}


def random_differences(seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(rng.choice([-2, 0, 2]), 1) for _ in range(rng.randint(2, 5))]


# --- Verdicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_without_a_margin_the_opposite_claim_gets_the_opposite_verdict_at_any_scale(seed: int) -> None:
    differences = random_differences(seed)
    found = verdict(differences)
    assert verdict([-d for d in differences]) == OPPOSITE[found]
    assert verdict([1024 * d for d in differences]) == found
    assert verdict(differences[::-1]) == found


@pytest.mark.parametrize("seed", range(40))
def test_with_a_margin_the_sign_plays_no_part_and_a_larger_margin_never_speaks_against_the_claim(seed: int) -> None:
    differences = random_differences(seed)
    found = [verdict(differences, margin) for margin in (0.0, 0.5, 1.0, 2.0, 4.0, 100.0)]
    assert found == [verdict([-d for d in differences], margin) for margin in (0.0, 0.5, 1.0, 2.0, 4.0, 100.0)]
    order = [FAILS, UNDECIDED, HOLDS]
    assert [order.index(one) for one in found] == sorted(order.index(one) for one in found)
    assert found[-1] == HOLDS


def test_a_verdict_in_favour_means_that_all_seeds_agree() -> None:
    verdicts = {seed: verdict(random_differences(seed)) for seed in range(300)}
    assert set(verdicts.values()) == {HOLDS, FAILS, UNDECIDED}
    for seed, found in verdicts.items():
        if found != UNDECIDED:
            assert len({d > 0 for d in random_differences(seed)}) == 1


@pytest.mark.parametrize("differences", [[], [0.3], [0.1, math.nan], [0.1, math.inf]])
def test_what_cannot_be_judged_is_refused(differences: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two differences"):
        verdict(differences)
    with pytest.raises(ValueError, match="margin"):
        verdict([0.1, 0.2], -0.1)


# --- Fair comparisons --------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [ATTENTION_ONLY, MLP_ONLY])
def test_a_matched_rank_has_the_parameters_of_the_other_lora_on_a_real_model(setting: Setting) -> None:
    def parameters(method: LoRA) -> int:
        model, _ = load_gpt2("bundled")
        method.adapt(model)
        return sum(p.numel() for p in method.trainable(model).values())

    wanted = parameters(LoRA())
    near = [abs(parameters(LoRA(rank=setting.rank + more, targets=setting.targets)) - wanted) for more in (-1, 0, 1)]
    assert near[1] < min(near[0], near[2])


def test_the_shapes_of_the_claims_are_those_of_the_bundled_model() -> None:
    model, _ = load_gpt2("bundled")
    block: Any = model.transformer.h[0]
    assert [tuple(layer.weight.T.shape) for layer in (block.attn.c_attn, block.attn.c_proj)] == ATTENTION
    assert [tuple(layer.weight.T.shape) for layer in (block.mlp.c_fc, block.mlp.c_proj)] == MLP
    assert matched_rank(5, MLP, MLP) == 5


def test_steps_of_an_epoch_use_every_example_and_no_step_is_empty() -> None:
    for examples in range(1, 40):
        steps = steps_per_epoch(examples, 2, accumulation=3, processes=2)
        assert (steps - 1) * 12 < examples <= steps * 12


def test_the_ratio_of_the_best_rates_needs_a_best_rate_inside_of_both_sweeps() -> None:
    inside, edge = {1e-3: 2.0, 2e-3: 1.0, 4e-3: math.nan}, {1e-4: 1.0, 2e-4: 2.0}
    assert best_rate_ratio(inside, {rate / 8: loss for rate, loss in inside.items()}) == pytest.approx(8)
    for pair in ((inside, edge), (edge, inside)):
        with pytest.raises(ValueError, match="at the edge"):
            best_rate_ratio(*pair)


def test_a_change_of_the_same_share_of_every_weight_is_that_share_in_every_block() -> None:
    model, _ = load_gpt2("bundled")
    weights = {name: p.detach() for name, p in model.named_parameters() if ".h." in name}
    changes = relative_change_by_block(weights, {name: -0.25 * weight for name, weight in weights.items()})
    assert list(changes) == list(range(6))
    assert all(change == pytest.approx(0.25) for change in changes.values())


# --- The benchmark -----------------------------------------------------------------------------------


def fake_results(monkeypatch: pytest.MonkeyPatch, loss: object) -> list[tuple[float, int]]:
    """Replace the training by a function of rate and seed; returns the list of what is run."""
    ran: list[tuple[float, int]] = []

    def carry_out(setting: Setting, rate: float, seed: int) -> dict[str, object]:
        ran.append((rate, seed))
        return {"setting": setting.name, "rate": rate, "seed": seed, "loss": loss(rate, seed)}  # type: ignore[operator]

    monkeypatch.setattr(folklore_runs, "carry_out", carry_out)
    return ran


def test_the_search_ends_at_the_best_rate_with_all_seeds_and_nothing_is_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = fake_results(monkeypatch, lambda rate, seed: abs(math.log2(rate / 1.2e-2)) + 0.1 * seed)
    found = Runs(tmp_path / "runs.json").tuned(Setting())
    assert [(r["rate"], r["seed"]) for r in found] == [(1.2e-2, 0), (1.2e-2, 1), (1.2e-2, 2)]
    assert {3e-3, 6e-3, 2.4e-2} <= {rate for rate, _ in ran}
    assert len(ran) == len(set(ran))
    before = list(ran)
    assert Runs(tmp_path / "runs.json").tuned(Setting()) == found
    assert ran == before


def test_a_rate_that_fails_on_another_seed_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(rate: float, seed: int) -> float | None:
        return {1.5e-3: 1.3, 3e-3: 1.1, 6e-3: 1.0 if seed == 0 else None, 1.2e-2: 3.0}.get(rate, 5.0)

    fake_results(monkeypatch, loss)
    found = Runs(tmp_path / "runs.json").tuned(Setting())
    assert [r["rate"] for r in found] == [3e-3] * 3


def test_a_sweep_of_one_seed_goes_on_until_its_best_rate_is_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_results(monkeypatch, lambda rate, seed: abs(math.log2(rate / (1.2e-2 if seed == 1 else 3e-3))))
    tried = sweep_of_seed(Runs(tmp_path / "runs.json"), Setting(), 1)
    assert min(tried, key=lambda rate: tried[rate]) == 1.2e-2
    assert min(tried) < 1.2e-2 < max(tried)


def test_nothing_is_run_for_a_table(tmp_path: Path) -> None:
    with pytest.raises(NotRunError):
        Runs(tmp_path / "none.json", run=False).tuned(Setting())
    claim = next(one for one in CLAIMS if one.key == "mlp")
    row = folklore.entry(claim, Runs(tmp_path / "none.json", run=False))
    assert (row["verdict"], row["sides"]) == (folklore.NOT_RUN, {})


def test_the_package_and_the_table_have_the_results_of_the_record() -> None:
    rows = [folklore.entry(claim, Runs(folklore.RECORD, run=False)) for claim in CLAIMS]
    assert read_claims() == json.loads(json.dumps(rows))
    assert folklore.PLACE.read_text(encoding="utf-8") == folklore.page(rows)
    for name, seeds in rate_sweeps().items():
        recorded = [r for r in json.loads(folklore.RECORD.read_text(encoding="utf-8")) if r["setting"] == name]
        assert sum(map(len, seeds)) == len(recorded)


def test_two_claims_have_different_keys_and_each_says_who_makes_it() -> None:
    assert len({claim.key for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.claim and claim.source and claim.compared for claim in CLAIMS)


def test_the_other_language_has_another_letter_for_each_letter() -> None:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    translated = in_cipher(letters)
    assert len(set(translated)) == len(letters)
    assert all(one != other for one, other in zip(letters, translated, strict=True))
    assert in_cipher("A wise queen, 7.") == "E xoti raiip, 7."


def test_wrong_examples_are_a_quarter_and_a_subset_differs_from_seed_to_seed() -> None:
    right, wrong = training_examples(Setting(), 0), training_examples(Setting(wrong=0.25), 0)
    assert [e.mr for e in right] == [e.mr for e in wrong]
    assert sum(e != other for e, other in zip(right, wrong, strict=True)) == pytest.approx(len(right) / 4, abs=3)
    few = [training_examples(Setting(examples=80), seed) for seed in (0, 1, 0)]
    assert few[0] == few[2] != few[1]
    assert len(few[0]) == 80


def test_the_reverse_start_leaves_the_model_unchanged_and_lets_A_learn() -> None:
    model, _ = load_gpt2("bundled")
    ids = torch.tensor([[0, 5, 9]])
    before = model(ids)
    LoRA().adapt(model)
    folklore_runs.reverse_start(model, seed=0)
    after = model(ids)
    assert torch.equal(before, after)
    after.sum().backward()
    gradients = {name: float(p.grad.abs().sum()) for name, p in model.named_parameters() if p.grad is not None}
    assert all((total > 0) == name.endswith("lora_A") for name, total in gradients.items())
