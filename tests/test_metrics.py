"""The measures, against sacrebleu's command line, against sums written out, and against laws."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.finetune.data import Lexicon, format_mr, references_by_mr
from lora_from_scratch.finetune.metrics import (
    MentionFinder,
    bleu,
    completion_loss,
    completion_perplexity,
    divergence_from_base,
    kl_divergence,
    load_tales,
    slot_error_rate,
    text_loss,
)
from lora_from_scratch.finetune.story_cards import card_shapes, references, story_cards
from lora_from_scratch.finetune.story_grammar import LEXICON
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, next_token_loss

MR = "hero[king], trait[brave], place[in a tower], helper[a bear], price[a song]"
TEXT = "In a high tower there lived a king who was never afraid. For one song, a great bear agreed to help him."


def tiny_gpt2(seed: int = 0, dropout: float = 0.1) -> GPT2:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=100,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # far from uniform
    return model


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(100, shape, generator=torch.Generator().manual_seed(seed))


def log_probabilities(model: GPT2, ids: Tensor) -> Tensor:
    """(T, V) in double precision, for one text (T,)."""
    with torch.no_grad():
        return torch.log_softmax(model.eval()(ids[None])[0].double(), dim=-1)


# --- BLEU ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged() -> tuple[list[str], list[list[str]]]:
    """Thirty texts with seven references each, from the story cards."""
    grouped = list(references_by_mr(story_cards(train=0, validation=0, test=30).test).values())
    return [refs[0] for refs in grouped], [refs[1:] for refs in grouped]


def test_bleu_is_what_sacrebleu_s_command_line_prints(
    tmp_path: Path, judged: tuple[list[str], list[list[str]]]
) -> None:
    texts, refs = judged
    (tmp_path / "texts").write_text("\n".join(texts) + "\n")
    streams = []
    for i in range(len(refs[0])):
        streams.append(str(tmp_path / f"refs{i}"))
        Path(streams[-1]).write_text("\n".join(r[i] for r in refs) + "\n")
    command = [sys.executable, "-m", "sacrebleu", *streams, "-i", str(tmp_path / "texts"), "-b", "-w", "6"]
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert bleu(texts, refs) == pytest.approx(float(printed), abs=1e-6)
    assert 40 < bleu(texts, refs) < 95


def test_a_text_may_have_fewer_references_than_another(judged: tuple[list[str], list[list[str]]]) -> None:
    """A repeated reference changes no clipped count and no closest length, so it may stand for a missing one."""
    texts, refs = judged
    ragged = [r[: 1 + i % 7] for i, r in enumerate(refs)]
    padded = [r + [r[0]] * (7 - len(r)) for r in ragged]
    assert bleu(texts, ragged) == pytest.approx(bleu(texts, padded), abs=1e-9)
    assert bleu(texts, ragged) < bleu(texts, refs)
    # A short text would escape the brevity penalty if a missing reference counted as one of no words.
    short = [" ".join(text.split()[:8]) for text in texts]
    assert bleu(short, ragged) == pytest.approx(bleu(short, padded), abs=1e-9)


def test_bleu_of_one_s_own_references_is_100(judged: tuple[list[str], list[list[str]]]) -> None:
    assert bleu(judged[0], [[text] for text in judged[0]]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("texts", "refs", "complaint"),
    [([], [], "at least one"), (["a"], [], "got 1 texts and 0"), (["a", "b"], [["a"], []], "text 1 has no reference")],
)
def test_bleu_refuses_what_cannot_be_compared(texts: list[str], refs: list[list[str]], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        bleu(texts, refs)


# --- Slot errors -----------------------------------------------------------------------------------


def test_a_right_text_has_no_slot_errors() -> None:
    assert slot_error_rate([TEXT, TEXT.upper(), TEXT + " " + TEXT], [MR] * 3, LEXICON) == 0


@pytest.mark.parametrize(
    ("change", "missing", "invented"),
    [
        (("In a high tower there lived", "There was once"), {"place"}, set()),  # dropped
        (("a great bear", "an owl"), {"helper"}, {("helper", "an owl")}),  # swapped
        (("help him", "give him a crown of gold"), set(), {("wish", "a golden crown")}),  # invented
        (("never afraid", "never sad"), {"trait"}, {("trait", "merry")}),  # another denial
        (("a king who", "a king's son who"), {"hero"}, {("hero", "prince")}),  # the longer phrase counts
        (("bear", "bears"), {"helper"}, set()),  # whole words only
    ],
)
def test_a_wrong_text_has_the_slot_errors_that_were_put_into_it(
    change: tuple[str, str], missing: set[str], invented: set[tuple[str, str]]
) -> None:
    wrong = TEXT.replace(*change)
    assert wrong != TEXT
    assert MentionFinder(LEXICON).slot_errors(wrong, MR) == (missing, invented)
    assert slot_error_rate([wrong, TEXT], [MR, MR], LEXICON) == (len(missing) + len(invented)) / 10


cards = st.builds(
    lambda shape, seed: {slot: Random(f"{seed}{slot}").choice(list(LEXICON[slot])) for slot in shape},
    st.sampled_from(card_shapes()),
    st.integers(0, 10**6),
)


@given(cards, cards, st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_the_errors_of_another_card_s_text_are_the_difference_of_the_cards(
    card: dict[str, str], other: dict[str, str], seed: int
) -> None:
    text = references(format_mr(other), 1, seed)[0]
    missing, invented = set(card.items()) - set(other.items()), set(other.items()) - set(card.items())
    expected = (len(missing) + len(invented)) / len(card)
    assert slot_error_rate([text], [format_mr(card)], LEXICON) == pytest.approx(expected)


def test_an_empty_text_misses_every_slot() -> None:
    assert slot_error_rate([""], [MR], LEXICON) == 1


def test_a_phrase_with_two_readings_counts_for_the_one_that_is_wanted() -> None:
    lexicon: Lexicon = {"price": {"cheap": ("cheap",), "under 20": ("under 20", "cheap")}, "name": {"x": ("x",)}}
    assert slot_error_rate(["cheap x"], ["price[under 20], name[x]"], lexicon) == 0
    assert slot_error_rate(["cheap x"], ["price[cheap], name[x]"], lexicon) == 0
    assert slot_error_rate(["cheap x"], ["name[x]"], lexicon) == 1  # one invention, not two


def test_a_value_without_phrases_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match=re.escape("no phrases for hero[astronaut]")):
        slot_error_rate([TEXT], ["hero[astronaut]"], LEXICON)
    with pytest.raises(ValueError, match="got 1 texts and 2 meaning"):
        slot_error_rate([TEXT], [MR, MR], LEXICON)


# --- Likelihoods -----------------------------------------------------------------------------------


def test_completion_loss_is_the_mean_over_all_labelled_tokens_of_all_batches() -> None:
    model = tiny_gpt2()
    batches, losses = [], []
    for rows, tokens in ((3, 12), (1, 30), (2, 5)):
        ids = random_ids(rows, tokens, seed=tokens)
        labels = ids.clone()
        for row in range(rows):
            labels[row, : row + 2] = -100
            labels[row, tokens - row :] = -100
            table = log_probabilities(model, ids[row])
            losses += [-table[t - 1, ids[row, t]].item() for t in range(row + 2, tokens - row)]
        batches.append((ids, labels))
    assert completion_loss(model, batches) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert completion_perplexity(model, batches) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    one = batches[:1]
    assert completion_loss(model, one) == pytest.approx(next_token_loss(model(one[0][0]), one[0][1]).item(), rel=1e-5)


def test_a_batch_may_carry_a_mask_which_is_not_read() -> None:
    ids = random_ids(2, 8)
    model = tiny_gpt2()
    assert completion_loss(model, [(ids, ids, None)]) == completion_loss(model, [(ids, ids)])


def test_a_loss_over_no_token_is_refused() -> None:
    ids = random_ids(2, 8)
    with pytest.raises(ValueError, match="no token to predict"):
        completion_loss(tiny_gpt2(), [(ids, torch.full_like(ids, -100))])
    with pytest.raises(ValueError, match="no token to predict"):
        completion_loss(tiny_gpt2(), [])


@given(st.integers(2, 100), st.integers(2, 32))
@settings(max_examples=20, deadline=None)
def test_text_loss_predicts_every_token_but_the_first_exactly_once(tokens: int, context: int) -> None:
    model, ids = tiny_gpt2(), random_ids(tokens, seed=tokens)
    total = 0.0
    for t in range(1, tokens):  # the window of token t begins at a multiple of context - 1
        start = (t - 1) // (context - 1) * (context - 1)
        if t == start + 1 or t == 1:
            table = log_probabilities(model, ids[start : start + context])
        total -= table[t - 1 - start, ids[t]].item()
    assert text_loss(model, ids, context) == pytest.approx(total / (tokens - 1), rel=1e-5)


def test_text_loss_of_a_uniform_model_is_the_logarithm_of_the_vocabulary() -> None:
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    assert text_loss(model, random_ids(200), 32) == pytest.approx(math.log(100), rel=1e-6)


@pytest.mark.parametrize(("shape", "context"), [((1,), 8), ((0,), 8), ((2, 8), 8), ((20,), 1)])
def test_text_loss_refuses_a_text_without_a_token_to_predict(shape: tuple[int, ...], context: int) -> None:
    with pytest.raises(ValueError, match="text_loss needs"):
        text_loss(tiny_gpt2(), random_ids(*shape), context)


# --- Divergence ------------------------------------------------------------------------------------


def test_the_kl_divergence_at_each_position_is_that_of_torchs_distributions() -> None:
    draw = torch.Generator().manual_seed(0)
    p, q = 3 * torch.randn(2, 3, 7, generator=draw), torch.randn(2, 3, 7, generator=draw)
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(categorical(logits=p), categorical(logits=q))
    torch.testing.assert_close(kl_divergence(p, q), expected)
    torch.testing.assert_close(kl_divergence(p + 5, q - 5), expected, atol=1e-5, rtol=1e-5)
    extreme = kl_divergence(torch.tensor([0.0, 300.0]), torch.tensor([0.0, -300.0]))
    assert float(extreme) == pytest.approx(300)


def test_a_model_does_not_diverge_from_itself() -> None:
    model, ids = tiny_gpt2(), random_ids(20, 16)
    assert divergence_from_base(model, model, ids) == 0
    assert divergence_from_base(tiny_gpt2(), model, ids) == 0


def test_divergence_is_the_mean_of_kl_base_to_adapted_over_all_tokens() -> None:
    base, adapted, ids = tiny_gpt2(0), tiny_gpt2(1), random_ids(11, 16)
    p = torch.stack([log_probabilities(base, row) for row in ids])
    q = torch.stack([log_probabilities(adapted, row) for row in ids])
    forward, backward = (p.exp() * (p - q)).sum(-1).mean().item(), (q.exp() * (q - p)).sum(-1).mean().item()
    assert divergence_from_base(adapted, base, ids) == pytest.approx(forward, rel=1e-4)
    assert divergence_from_base(base, adapted, ids) == pytest.approx(backward, rel=1e-4)
    assert divergence_from_base(adapted, base, ids[0]) == pytest.approx(
        (p[0].exp() * (p[0] - q[0])).sum(-1).mean().item(), rel=1e-4
    )


def test_divergence_grows_with_the_perturbation() -> None:
    ids = random_ids(4, 16)
    found = []
    for size in (0.0, 0.01, 0.1):
        adapted = tiny_gpt2()
        with torch.no_grad():
            weight = adapted.get_parameter("transformer.h.0.attn.c_attn.weight")
            weight.add_(size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        found.append(divergence_from_base(adapted, tiny_gpt2(), ids))
    assert 0 == found[0] < found[1] < found[2]


def test_divergence_needs_a_token() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        divergence_from_base(tiny_gpt2(), tiny_gpt2(), random_ids(0))


# --- What a measurement leaves behind --------------------------------------------------------------


def test_a_measurement_uses_no_dropout_and_leaves_every_mode_and_no_gradient() -> None:
    model, ids = tiny_gpt2(dropout=0.5), random_ids(3, 16)
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    losses = {completion_loss(model, [(ids, ids)]) for _ in range(2)}
    assert len(losses) == 1
    assert divergence_from_base(model, model, ids) == 0
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_modes_come_back_when_the_model_fails() -> None:
    model = tiny_gpt2().train()
    too_long = random_ids(1, 33)
    with pytest.raises(ValueError, match="context of 32"):
        completion_loss(model, [(too_long, too_long)])
    assert model.training
    assert torch.is_grad_enabled()


# --- The tales -------------------------------------------------------------------------------------


def test_the_tales_are_a_few_thousand_words_of_ascii_prose() -> None:
    tales = load_tales()
    assert 6 <= len(tales) <= 10
    assert 2500 <= sum(len(tale.split()) for tale in tales) <= 4000
    for tale in tales:
        assert tale.isascii()
        assert all(line == line.strip() and line for line in tale.splitlines())
        assert "  " not in tale
        assert tale.rstrip('"')[-1] in ".?!"
        assert tale.count('"') % 2 == 0


def test_the_tales_do_not_speak_the_language_of_the_story_cards() -> None:
    """Else a model that learned the cards would seem to remember the tales."""

    def five_grams(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[\w']+", text.casefold())
        return set(zip(*(words[i:] for i in range(5)), strict=False))

    cards = set().union(*(five_grams(example.ref) for example in story_cards(validation=0, test=0).train))
    shared = cards & set().union(*map(five_grams, load_tales()))
    assert len(shared) <= 3, shared
