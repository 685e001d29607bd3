"""The benchmark of a context four times as long: its texts, its sides, and its page."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import long_context, long_context_runs
from benchmarks.learning_rates import nearest_rung
from benchmarks.long_context_runs import (
    DIVERGED,
    FACTOR,
    GROUPS,
    LENGTHS,
    SEEDS,
    SIDES,
    TOKENS,
    TUNING_SEED,
    Side,
    documents,
    labels_of,
    losses,
    measured,
    prepare,
    tokenizer,
)
from benchmarks.memorising import Result, Runs
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.gpt2.model import GPT2, IGNORE_INDEX
from tests.any_models import randomise
from tests.helpers import tiny_model

LENGTH = 32 * FACTOR  # the extended context of the tiny model


def texts() -> Tensor:
    return torch.randint(5, 61, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def adapted(side: Side) -> GPT2:
    model = tiny_model()
    method = prepare(side, model)
    randomise(method.trainable(model))
    return model


@pytest.mark.parametrize("side", SIDES, ids=lambda side: side.label)
def test_every_side_begins_with_the_positions_of_the_base_a_quarter_of_a_step_apart(side: Side) -> None:
    base, model = tiny_model(), tiny_model()
    prepare(side, model)
    table = base.transformer.wpe.weight.double()
    places = torch.linspace(0, len(table) - 1, LENGTH, dtype=torch.float64)
    low = places.long().clamp(max=len(table) - 2)
    rest = (places - low)[:, None]
    expected = (1 - rest) * table[low] + rest * table[low + 1]
    assert model.config.n_positions == LENGTH
    torch.testing.assert_close(model.transformer.wpe.weight.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", SIDES, ids=lambda side: side.label)
def test_every_side_is_evaluated_with_full_attention(side: Side) -> None:
    """The loss at the end depends on the first token, which attention in groups cannot reach in two blocks."""
    model, one, other = adapted(side), texts(), texts()
    other[0, 0] += 1
    last = slice(-LENGTH // GROUPS, None)
    for as_in_training in (False, True):
        before, after = (losses(model, ids, as_in_training)[:, last] for ids in (one, other))
        assert torch.equal(before, after) == (as_in_training and side.sparse)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_text_has_tales_and_then_their_cards_in_the_reverse_order(tokens: int) -> None:
    (ids,) = documents("test", 1, tokens, seed=5)
    assert len(ids) == tokens
    lines = [line for line in tokenizer().decode(ids.tolist()).split("\n") if line]
    tales, cards = lines[: len(lines) // 2], lines[len(lines) // 2 :]
    known = {(example.ref, example.mr) for example in load_dataset("story-cards").test}
    assert len(tales) == len(cards)
    assert all(pair in known for pair in zip(tales, reversed(cards), strict=True))


def test_what_fills_up_a_text_has_no_loss() -> None:
    ids = documents("test", 2, 256, seed=5)
    for row, labels in zip(ids.tolist(), labels_of(ids).tolist(), strict=True):
        end = tokenizer().encode("\n")[0]
        kept = [token for before, token in pairwise([0, *row]) if not before == token == end]
        assert [label for label in labels if label != IGNORE_INDEX] == kept
        assert len(kept) < len(row)


def test_the_results_have_the_best_rate_and_a_stored_run_is_not_repeated(tmp_path: Path) -> None:
    ran: list[tuple[int, float]] = []

    def tune(side: Side, steps: int, rate: float) -> Result:
        ran.append((TUNING_SEED, rate))
        return {"rate": rate, "loss": DIVERGED if rate > 2e-2 else abs(math.log(rate / 3e-4))}

    def carry_out(side: Side, steps: int, seed: int, rate: float) -> Result:
        ran.append((seed, rate))
        return {"rate": rate}

    for _ in range(2):
        tried, results = measured(Runs(tmp_path / "runs.json"), SIDES[0], 10, tune, carry_out)
    assert [result["rate"] for result in tried] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert results == [{"rate": 3e-4}] * len(SEEDS)
    assert len(ran) == len(set(ran)) == len(tried) + len(SEEDS)


def test_the_page_has_the_stored_results_and_no_best_rate_is_at_the_edge() -> None:
    document = json.loads(long_context.RECORD.read_text(encoding="utf-8"))
    assert long_context.page(document) == long_context.PLACE.read_text(encoding="utf-8")
    assert [row["label"] for row in document["rows"]] == [side.label for side in SIDES]
    assert document["seeds"] == list(SEEDS)
    for row in document["rows"]:
        best = min(row["tried"], key=lambda run: run["loss"])
        rungs = [nearest_rung(run["rate"]) for run in row["tried"]]
        assert rungs == list(range(rungs[0], rungs[-1] + 1))
        assert best not in (row["tried"][0], row["tried"][-1])
        assert [result["rate"] for result in row["results"]] == [best["rate"]] * len(SEEDS)
        assert row["label"] != long_context.FULL or row["results"][0]["parameters"] == _all_parameters()


def _all_parameters() -> int:
    """Of the bundled model with the longer table."""
    model = long_context_runs.load_gpt2("bundled")[0]
    return sum(p.numel() for p in model.parameters()) + (TOKENS - TOKENS // FACTOR) * model.config.n_embd
