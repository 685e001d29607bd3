"""Pairs become batches in which only the completion is learned."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lora_from_scratch.finetune.completions import Completions, collate, completion_labels, prompt_text
from lora_from_scratch.finetune.data import Example
from lora_from_scratch.gpt2.model import next_token_loss
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from tests.helpers import tiny_model

IDS = st.lists(st.integers(1, 60), min_size=1, max_size=9)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["hero[fox], wish[a crown]\nOnce there was a fox who wanted a crown."] * 2, 300)


@given(IDS, IDS)
def test_the_prompt_has_no_label_and_the_completion_has_its_own(prompt: list[int], completion: list[int]) -> None:
    ids, labels = completion_labels(prompt, completion)
    assert ids == prompt + completion
    assert labels == [-100] * len(prompt) + completion


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=4), st.integers(0, 60))
def test_padding_does_not_change_the_loss_of_a_row(pairs: list[tuple[list[int], list[int]]], padding: int) -> None:
    model = tiny_model()
    rows = [completion_labels(*pair) for pair in pairs]
    batch = collate(rows, padding)
    with torch.no_grad():
        together = model(batch.input_ids)
        for row, (ids, labels) in enumerate(rows):
            alone = next_token_loss(model(torch.tensor([ids])), torch.tensor([labels]))
            padded = next_token_loss(together[row : row + 1], batch.labels[row : row + 1])
            assert float(padded) == pytest.approx(float(alone), abs=1e-5)


def test_the_loss_of_a_batch_is_the_mean_over_the_completions_tokens(tokenizer: Tokenizer) -> None:
    """Written out without the library: log-probabilities of each token of the completion and of the end."""
    model = tiny_model(vocab_size=tokenizer.vocab_size, n_positions=64)
    pairs = [Example("hero[fox]", "A fox."), Example("hero[fox], wish[a crown]", "Once there was a fox.")]
    batch = Completions(pairs, tokenizer, 64).batches(2)[0]
    losses: list[float] = []
    with torch.no_grad():
        for pair in pairs:
            prompt = tokenizer.encode(prompt_text(pair.mr))
            text = [*tokenizer.encode(pair.ref), tokenizer.eos_id]
            log_p = F.log_softmax(model(torch.tensor([prompt + text]))[0], dim=-1)
            losses += [-float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(text)]
        assert float(next_token_loss(model(batch.input_ids), batch.labels)) == pytest.approx(
            sum(losses) / len(losses), abs=1e-5
        )
    assert batch.predictions == len(losses)


def test_an_example_that_is_too_long_is_left_out_and_counted(tokenizer: Tokenizer) -> None:
    pairs = [Example("hero[fox]", "A fox."), Example("hero[fox]", "A fox. " * 50)]
    length = len(Completions(pairs[:1], tokenizer, 99).rows[0][0])
    assert Completions(pairs, tokenizer, length).left_out == 1
    with pytest.raises(ValueError, match=f"none of the 2 examples fits into the model's context of {length - 1}"):
        Completions(pairs, tokenizer, length - 1)


@pytest.mark.parametrize("ref", ["A fox.<|endoftext|>", "A fox.\n<|endoftext|>\n", "A fox.<|endoftext|><|endoftext|>"])
def test_an_end_of_text_token_behind_a_reference_is_learned_once(tokenizer: Tokenizer, ref: str) -> None:
    completions = Completions([Example("hero[fox]", ref), Example("hero[fox]", "A fox.")], tokenizer, 64)
    assert completions.rows[0] == completions.rows[1]
    assert completions.end_removed == 1


@pytest.mark.parametrize(("mr", "ref"), [("hero[<|endoftext|>]", "A fox."), ("hero[fox]", "A<|endoftext|> fox.")])
def test_an_end_of_text_token_within_a_text_is_refused(tokenizer: Tokenizer, mr: str, ref: str) -> None:
    with pytest.raises(ValueError, match=r"has the end-of-text token <\|endoftext\|> in the middle of a text"):
        Completions([Example(mr, ref)], tokenizer, 64)


def test_a_batch_is_a_function_of_seed_and_step_and_an_epoch_has_every_example_once(tokenizer: Tokenizer) -> None:
    pairs = [Example("hero[fox]", "x" * n) for n in range(1, 9)]
    completions = Completions(pairs, tokenizer, 64)

    def drawn(steps: range, seed: int) -> list[tuple[int, ...]]:
        batches = [completions.batch_at(step, 3, seed) for step in steps]
        return [tuple(row[row != -100].tolist()) for batch in batches for row in batch.labels]

    three_epochs = drawn(range(8), seed=0)  # 24 examples, in the 8 steps that belong together
    assert Counter(three_epochs) == Counter(3 * [tuple(ids) for ids in drawn_alone(completions)])
    assert drawn(range(8), seed=0) == three_epochs
    assert drawn(range(8), seed=1) != three_epochs
    assert drawn(range(8, 16), seed=0) != three_epochs
    assert drawn(range(3, 8), seed=0) == three_epochs[9:]  # whatever was asked before


def drawn_alone(completions: Completions) -> list[list[int]]:
    return [[label for label in labels if label != -100] for _, labels in completions.rows]


def test_all_batches_together_are_all_examples_in_their_order(tokenizer: Tokenizer) -> None:
    pairs = [Example("hero[fox]", "a" * n) for n in range(1, 6)]
    completions = Completions(pairs, tokenizer, 64)
    batches = completions.batches(2)
    assert [len(batch.input_ids) for batch in batches] == [2, 2, 1]
    rows = [row for batch in batches for row in batch.input_ids.tolist()]
    for row, (ids, _) in zip(rows, completions.rows, strict=True):
        assert row == ids + [tokenizer.eos_id] * (len(row) - len(ids))


def test_padding_stays_within_the_context(tokenizer: Tokenizer) -> None:
    pair = Example("hero[fox]", "A fox.")
    length = len(Completions([pair], tokenizer, 99).rows[0][0])
    for context in (length, length + 1):
        (batch,) = Completions([pair], tokenizer, context).batches(1)
        assert batch.input_ids.shape[1] <= context
        assert Completions([pair], tokenizer, context).batch_at(0, 2, 0).input_ids.shape[1] <= context


def test_the_fingerprint_tells_other_examples_apart(tokenizer: Tokenizer) -> None:
    pair, other = Example("hero[fox]", "A fox."), Example("hero[fox]", "a fox.")
    prints = [Completions(pairs, tokenizer, 64).fingerprint() for pairs in ([pair], [pair], [other], [pair, other])]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
