"""Generation against transformers.generate, with and without a cache, alone and in a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.gpt2.generation import (
    _Beams,
    _BeamSearch,
    filter_top_k,
    filter_top_p,
    generate,
    repeated_ngram_tokens,
    sample_next_token,
)
from lora_from_scratch.gpt2.model import GPT2, KVCache
from tests.helpers import real_checkpoint, tiny_model, transformers_twin

PROMPTS = [[5, 17, 3, 44, 8], [23], [9, 9, 31, 2, 50, 12, 7, 60], [1, 2]]
SENTENCES = ["Once upon a time", "The king said to his three sons that", "\u201cAlas!\u201d"]


@cache
def real() -> tuple[GPT2, Any, Any, list[list[int]]]:
    """The bundled model, its tokenizer, transformers' twin and some prompts."""
    model, tokenizer = load_gpt2(real_checkpoint())
    return model, tokenizer, transformers_twin(model), tokenizer.encode_batch(SENTENCES)


def by_transformers(twin: Any, prompt: list[int], eos_id: int | None, **options: Any) -> list[int]:
    """What `transformers.generate` puts after the prompt, up to the end token."""
    twin.generation_config.eos_token_id = eos_id
    twin.generation_config.pad_token_id = 0
    ids = torch.tensor([prompt])
    out = twin.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    new = out[0, len(prompt) :].tolist()
    return new[: new.index(eos_id)] if eos_id in new else new


# --- One step --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 3, 20, 50])
def test_top_k_keeps_what_transformers_keeps(k: int, seed: int) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed))
    logits[0, 3:9] = logits[0].max()  # ties
    assert torch.equal(filter_top_k(logits, k), process.TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_top_p_keeps_what_transformers_keeps(p: float, seed: int) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(filter_top_p(logits, p), process.TopPLogitsWarper(p)(None, logits))


@given(p=st.floats(0.01, 0.99), seed=st.integers(0, 10_000))
@settings(deadline=None)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(p: float, seed: int) -> None:
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = logits.softmax(dim=-1)[filter_top_p(logits, p) > -math.inf]
    assert kept.sum() >= p - 1e-12
    assert kept.sum() - kept.min() < p + 1e-12


def test_top_p_stops_where_the_sum_is_p_exactly() -> None:
    kept = filter_top_p(torch.tensor([0.0, -math.inf, 0.0, -math.inf]), 0.5)  # two tokens of 1/2
    assert kept.isfinite().tolist() == [True, False, False, False]


def test_the_filters_leave_their_input_alone_and_work_on_any_number_of_axes() -> None:
    logits = torch.randn(2, 3, 8)
    before = logits.clone()
    assert torch.equal(filter_top_k(logits, 3)[1, 2], filter_top_k(logits[1, 2], 3))
    assert torch.equal(filter_top_p(logits, 0.4)[1, 2], filter_top_p(logits[1, 2], 0.4))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (2.0, 3, None), (1.5, None, 0.7), (1, 4, 0.8)],
)
def test_tokens_are_drawn_as_often_as_the_filtered_softmax_says(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0, 1.5])
    expected = logits / temperature
    if top_k:
        expected = filter_top_k(expected, top_k)
    if top_p:
        expected = filter_top_p(expected, top_p)
    probability = expected.softmax(dim=-1)
    generator, draws = torch.Generator().manual_seed(0), 4000
    drawn = [sample_next_token(logits, temperature, top_k, top_p, generator) for _ in range(draws)]
    counts = torch.bincount(torch.tensor(drawn), minlength=6)
    deviation = (draws * probability * (1 - probability)).sqrt()
    assert ((counts - draws * probability).abs() <= 4 * deviation).all(), counts


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-6])
def test_without_temperature_or_with_hardly_any_the_most_likely_token_is_taken(temperature: float) -> None:
    logits = torch.tensor([1.0, 90.0, 89.9, -math.inf])
    assert sample_next_token(logits, temperature) == 1


@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=12), size=st.integers(1, 4))
@settings(deadline=None)
def test_repeated_ngrams_are_those_of_transformers(tokens: list[int], size: int) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    scores = process.NoRepeatNGramLogitsProcessor(size)(torch.tensor([tokens]), torch.zeros(1, 3))
    assert set(repeated_ngram_tokens(tokens, size)) == set((scores[0] == -math.inf).nonzero().flatten().tolist())


# --- Against transformers.generate -----------------------------------------------------------------

GREEDY: list[dict[str, Any]] = [{}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 3}]
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 5, "length_penalty": 0.0},
    {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4},
    {"num_beams": 4, "no_repeat_ngram_size": 2},
]


def an_early_end(model: GPT2, prompts: list[list[int]]) -> int:
    """A token that the first greedy text holds: as the end token it makes that text end early."""
    return generate(model, prompts[:1], max_new_tokens=6)[0][-1]


@pytest.mark.parametrize("options", [{}, {"no_repeat_ngram_size": 2}, BEAMS[0], BEAMS[4]], ids=str)
def test_the_bundled_model_writes_what_transformers_writes(options: dict[str, Any]) -> None:
    model, _, twin, prompts = real()
    eos_id = an_early_end(model, prompts)
    ours = generate(model, prompts, max_new_tokens=12, eos_id=eos_id, **options)
    assert ours == [by_transformers(twin, prompt, eos_id, max_new_tokens=12, **options) for prompt in prompts]
    assert len(ours[0]) < 6 or options


@pytest.mark.parametrize("options", GREEDY + BEAMS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_random_models_write_what_transformers_writes(seed: int, options: dict[str, Any]) -> None:
    model = tiny_model(seed, vocab_size=12, std=0.15)
    twin = transformers_twin(model)
    prompts = [[token % 12 for token in prompt] for prompt in PROMPTS]
    new = 15
    if options.get("no_repeat_ngram_size") == 1:
        prompts, new = prompts[1:2] + prompts[3:], 5  # there are only 12 tokens to use up
    for eos_id in (None, an_early_end(model, prompts), 7):
        ours = generate(model, prompts, max_new_tokens=new, eos_id=eos_id, **options)
        assert ours == [by_transformers(twin, prompt, eos_id, max_new_tokens=new, **options) for prompt in prompts]


def test_of_the_continuations_that_end_only_those_among_the_best_num_beams_count() -> None:
    """transformers' rule (`top_num_beam_mask`); it rarely changes a text, so the comparisons above miss it."""
    beams = _Beams(_BeamSearch(2, 1.0, 0, eos_id=0, max_new_tokens=9), [1])
    assert beams.step(torch.tensor([[0.02, 0.58, 0.4]]).log()) == [(0, 1), (0, 2)]
    # Joint probabilities: beam 0 ends 0.29, beam 0 goes on 0.232, beam 1 ends 0.2, beam 1 goes on 0.16.
    assert beams.step(torch.tensor([[0.5, 0.4, 0.1], [0.5, 0.1, 0.4]]).log()) == [(0, 1), (1, 2)]
    assert [text for _, text in beams.finished] == [[1]]
    assert beams.finished[0][0] == pytest.approx(math.log(0.29) / 2)


def test_more_beams_find_a_text_that_is_at_least_as_likely_as_the_greedy_one() -> None:
    model, _, _, prompts = real()
    greedy = generate(model, prompts, max_new_tokens=12)
    beams = generate(model, prompts, max_new_tokens=12, num_beams=8)
    for prompt, one, other in zip(prompts, greedy, beams, strict=True):
        assert log_probability(model, prompt, other) >= log_probability(model, prompt, one) - 1e-4


def log_probability(model: GPT2, prompt: list[int], new: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    return float(logits.gather(1, torch.tensor(new)[:, None]).sum())


# --- Cache, batches, seeds -------------------------------------------------------------------------

WAYS: list[dict[str, Any]] = [
    {},
    {"no_repeat_ngram_size": 2},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "no_repeat_ngram_size": 3},
    {"num_beams": 4, "length_penalty": 0.9, "no_repeat_ngram_size": 3},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_cache_changes_nothing(options: dict[str, Any]) -> None:
    model = tiny_model()
    options = {"max_new_tokens": 16, "eos_id": 4, **options}
    assert generate(model, PROMPTS, use_cache=False, **options) == generate(model, PROMPTS, **options)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_prompt_is_continued_in_the_same_way_alone_and_in_a_batch(options: dict[str, Any]) -> None:
    for model, prompts in ((tiny_model(), PROMPTS), (real()[0], real()[3])):
        options = {"max_new_tokens": 10, "eos_id": 4, **options}
        alone = [generate(model, [prompt], **options)[0] for prompt in prompts]
        assert generate(model, prompts, **options) == alone
        assert generate(model, prompts[::-1], **options) == alone[::-1]


def test_sampling_repeats_with_its_seed_and_differs_with_another() -> None:
    model = tiny_model(std=0.1)
    first, again, other = (generate(model, PROMPTS, max_new_tokens=16, temperature=1.0, seed=s) for s in (3, 3, 4))
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_a_prompt_that_is_given_several_times_is_continued_in_several_ways() -> None:
    model = tiny_model(std=0.1)
    texts = generate(model, [[5, 6]] * 4, max_new_tokens=16, temperature=1.0)
    assert len({tuple(text) for text in texts}) == 4
    assert texts[:1] == generate(model, [[5, 6]], max_new_tokens=16, temperature=1.0)
    assert generate(model, [[5, 6]] * 4, max_new_tokens=16) == [generate(model, [[5, 6]], max_new_tokens=16)[0]] * 4


def test_sampling_does_not_touch_the_global_random_state() -> None:
    model = tiny_model()
    before = torch.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=4, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), before)


class WithPrefix(nn.Module):
    """What prefix tuning does to generation: two learned entries stand in the cache before the first token."""

    def __init__(self, model: GPT2) -> None:
        super().__init__()
        self.model = model
        config = model.config
        shape = (config.n_layer, 2, 1, config.n_head, 2, config.n_embd // config.n_head)
        self.prefix = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))

    def forward(self, ids: Tensor, *, attention_mask: Tensor, cache: KVCache | None) -> Tensor:
        cache = KVCache() if cache is None else cache
        if not cache.layers:
            cache.layers = [(k.expand(len(ids), -1, -1, -1), v.expand(len(ids), -1, -1, -1)) for k, v in self.prefix]
        mask = torch.cat([attention_mask.new_ones(len(ids), 2), attention_mask], dim=1)
        return self.model(ids, attention_mask=mask, cache=cache)


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_model_that_puts_entries_into_the_cache_is_continued_like_any_other(options: dict[str, Any]) -> None:
    model = WithPrefix(tiny_model())
    options = {"max_new_tokens": 12, "eos_id": 4, **options}
    texts = generate(model, PROMPTS, **options)
    assert texts == generate(model, PROMPTS, use_cache=False, **options)
    assert texts == [generate(model, [prompt], **options)[0] for prompt in PROMPTS]
    assert texts != generate(model.model, PROMPTS, **options)


def test_in_bf16_every_greedy_token_is_nearly_the_likeliest_in_fp32() -> None:
    model, _, _, prompts = real()
    rounded = load_gpt2(real_checkpoint(), dtype=torch.bfloat16)[0]
    for prompt, new in zip(prompts, generate(rounded, prompts, max_new_tokens=20), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
        taken = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert (logits.max(dim=-1).values - taken).max() < 0.5
    assert all(len(text) == 8 for text in generate(rounded, prompts, max_new_tokens=8, num_beams=3))
    assert all(len(text) == 8 for text in generate(rounded, prompts, max_new_tokens=8, temperature=1.0))


# --- Ends and edges --------------------------------------------------------------------------------


def test_a_text_stops_before_its_end_token_and_the_others_go_on() -> None:
    model = tiny_model(std=0.1)
    free = generate(model, PROMPTS, max_new_tokens=16)
    end = free[0][3]
    expected = [text[: text.index(end)] if end in text else text for text in free]
    assert generate(model, PROMPTS, max_new_tokens=16, eos_id=end) == expected
    assert any(end not in text for text in free)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"num_beams": 3}], ids=str)
def test_a_text_ends_where_no_token_may_follow(options: dict[str, Any]) -> None:
    model = tiny_model(vocab_size=6)
    (text,) = generate(model, [[0, 1]], max_new_tokens=20, no_repeat_ngram_size=1, **options)
    assert sorted(text) == [2, 3, 4, 5]


def test_the_context_can_be_filled_to_the_last_token() -> None:
    model = tiny_model()
    assert [len(text) for text in generate(model, PROMPTS, max_new_tokens=24)] == [24] * 4  # 8 + 24 = 32


def test_modules_come_back_in_the_mode_in_which_they_were_and_dropout_stays_off_meanwhile() -> None:
    model = tiny_model(embd_pdrop=0.5, resid_pdrop=0.5)
    calm = generate(model, PROMPTS, max_new_tokens=8)
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert generate(model, PROMPTS, max_new_tokens=8) == calm
    assert [module.training for module in model.modules()] == before


def test_no_prompts_give_no_texts() -> None:
    assert generate(tiny_model(), [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 61]], {}, "outside 0 to 60"),
        ([[-1]], {}, "outside 0 to 60"),
        ([[1] * 30], {"max_new_tokens": 3}, "30 tokens; with max_new_tokens=3 that is 33, more than .* context of 32"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([[1]], {"temperature": -1.0}, "temperature must be a number of at least 0, got -1.0"),
        ([[1]], {"temperature": math.nan}, "temperature"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, "top_k must be at least 1, got 0"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ([[1]], {"temperature": 1.0, "top_p": 1.5}, "got 1.5"),
        ([[1]], {"top_k": 5}, "need a temperature above 0"),
        ([[1]], {"num_beams": 0}, "num_beams must be at least 1"),
        ([[1]], {"no_repeat_ngram_size": -1}, "no_repeat_ngram_size at least 0"),
        ([[1]], {"num_beams": 2, "temperature": 0.5}, "num_beams=2 needs temperature 0, got 0.5"),
    ],
)
def test_what_makes_no_sense_is_a_value_error(
    prompts: Sequence[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), prompts, **({"max_new_tokens": 3} | options))


def test_a_model_whose_logits_are_not_numbers_is_a_value_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(ValueError, match="not numbers"):
        generate(model, PROMPTS, max_new_tokens=3, temperature=1.0)
