"""The story cards: what their texts say, how they read, and that they are the same everywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_from_scratch.finetune.data import Dataset, Example, format_mr, parse_mr, references_by_mr
from lora_from_scratch.finetune.metrics import MentionFinder, slot_error_rate
from lora_from_scratch.finetune.story_cards import card_shapes, distinct_cards, parse_card, references, story_cards
from lora_from_scratch.finetune.story_grammar import HEROES, LEXICON, with_article
from lora_from_scratch.finetune.tasks import load_dataset

CARD = (
    "hero[woodcutter], trait[wise], place[on an island], wish[a silver cup], helper[a white dove], price[a song], "
    "ending[happy]"
)
FINDER = MentionFinder(LEXICON)

# All that a text may hold beside the phrases of its slots: articles, pronouns, and verbs and times that say nothing.
STRUCTURE = set(
    """a an and agreed as asked but came day evening exchange for he help her him in is it lived long ago longed met
    morning no more nobody nothing of offered on once one out price promised return set she take tale than the there
    this time to told upon wanted was who wished would find""".split()  # noqa: SIM905
)

cards = st.builds(
    lambda shape, seed: {slot: Random(f"{seed}{slot}").choice(list(LEXICON[slot])) for slot in shape},
    st.sampled_from(card_shapes()),
    st.integers(0, 10**6),
)


@pytest.fixture(scope="module")
def task() -> Dataset:
    return story_cards()


def test_the_default_sizes_are_4000_cards_with_one_reference_and_200_and_300_with_eight(task: Dataset) -> None:
    counts = [Counter(len(refs) for refs in references_by_mr(split).values()) for split in splits(task)]
    assert counts == [Counter({1: 4000}), Counter({8: 200}), Counter({8: 300})]


def test_no_card_is_in_two_splits(task: Dataset) -> None:
    train, validation, test = ({frozenset(parse_mr(e.mr).items()) for e in split} for split in splits(task))
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert len(train) == 4000


def test_there_are_far_more_than_5000_cards() -> None:
    seen = {example.mr for example in story_cards(seed=3, train=6000, validation=0, test=0).train}
    assert len(seen) == 6000
    assert distinct_cards() > 10**6


def test_every_reference_says_each_slot_of_its_card_exactly_once_and_no_other(task: Dataset) -> None:
    for example in every_pair(task):
        mentions = FINDER.mentions(example.ref)
        assert all(len(meanings) == 1 for meanings in mentions), example
        assert Counter(m for meanings in mentions for m in meanings) == Counter(parse_mr(example.mr).items()), example


def test_beside_its_slots_a_reference_says_nothing(task: Dataset) -> None:
    for example in every_pair(task):
        rest = FINDER.pattern.sub(" ", example.ref.casefold().replace("-", " "))
        assert set(re.findall(r"[\w']+", rest)) <= STRUCTURE, example


def test_the_slot_error_rate_of_the_references_is_zero(task: Dataset) -> None:
    pairs = every_pair(task)
    assert slot_error_rate([e.ref for e in pairs], [e.mr for e in pairs], task.lexicon) == 0


def test_every_reference_is_one_to_three_sentences_of_proper_english(task: Dataset) -> None:
    for example in every_pair(task):
        text = example.ref
        sentences = text.removesuffix(".").split(". ")
        assert 1 <= len(sentences) <= 3
        assert text.endswith(".")
        assert all(sentence[0].isupper() for sentence in sentences), text
        assert not re.search(r"[{}]|  | ,|,,|\.\.", text), text
        assert not re.search(r"\b[Aa] (?=[aeiou])", text), text
        assert not re.search(r"\b[Aa]n (?![aeiou])", text), text
        words = re.findall(r"[\w'-]+", text)
        assert not any(a == b for a, b in pairwise(words)), text
        assert 15 <= len(words) <= 65, text


def test_most_references_have_25_to_55_words(task: Dataset) -> None:
    lengths = [len(example.ref.split()) for example in task.train]
    assert sum(25 <= length <= 55 for length in lengths) > 0.9 * len(lengths)


def test_pronouns_are_those_of_the_hero(task: Dataset) -> None:
    said: Counter[str] = Counter()
    for example in every_pair(task):
        words = set(re.findall(r"\w+", example.ref.casefold()))
        pronoun = HEROES[parse_mr(example.mr)["hero"]].pronoun
        own, other = ({"he", "him", "his"}, {"she", "her"})[:: 1 if pronoun == "he" else -1]
        assert not words & other, example
        said[pronoun] += bool(words & own)
    assert min(said["he"], said["she"]) > 1000


def test_training_texts_share_neither_their_layout_nor_their_beginning(task: Dataset) -> None:
    """What remains when the slots' phrases are taken out is a template; no template may be frequent."""
    templates = Counter(FINDER.pattern.sub("_", example.ref.casefold()) for example in task.train)
    assert len(templates) > 2000
    assert templates.most_common(1)[0][1] < 0.01 * len(task.train)


def test_every_phrase_of_the_lexicon_occurs_in_training(task: Dataset) -> None:
    plain = (example.ref.casefold().replace("-", " ") for example in task.train)
    found = Counter(match.group() for text in plain for match in FINDER.pattern.finditer(text))
    assert set(found) == set(FINDER.meanings)
    assert min(found.values()) >= 5


@given(cards)
@settings(max_examples=60, deadline=None)
def test_any_card_gets_eight_different_texts_without_slot_errors(card: dict[str, str]) -> None:
    texts = references(format_mr(card), count=8)
    assert len(set(texts)) == 8
    assert slot_error_rate(texts, [format_mr(card)] * 8, LEXICON) == 0


@given(cards, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_order_in_which_a_card_is_written_does_not_change_its_texts(card: dict[str, str], rng: Random) -> None:
    shuffled = list(card.items())
    rng.shuffle(shuffled)
    assert references(format_mr(dict(shuffled)), count=3) == references(format_mr(card), count=3)


def test_the_texts_are_the_same_in_every_process_whatever_the_hash_seed() -> None:
    code = (
        "import hashlib; from lora_from_scratch.finetune.story_cards import story_cards; "
        "d = story_cards(5, 50, 5, 5); print(hashlib.sha256(repr(d).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


def test_another_seed_gives_other_cards_and_other_texts() -> None:
    first, second = (story_cards(seed, train=50, validation=5, test=5) for seed in (0, 1))
    assert {e.mr for e in first.train} != {e.mr for e in second.train}
    assert references(CARD, 3, seed=0) != references(CARD, 3, seed=1)


def test_load_dataset_knows_the_task_by_name(task: Dataset) -> None:
    assert load_dataset("story-cards") == task


@pytest.mark.parametrize(
    ("mr", "complaint"),
    [
        ("hero[woodcutter], trait[wise]", "at least 5 slots"),
        (CARD.replace("helper[a white dove], ", ""), "a price only beside a helper"),
        (CARD.replace("hero[woodcutter]", "hero[astronaut]"), "no value 'astronaut'; it may be one of: woodcutter"),
        (CARD.replace("trait[", "mood["), "no slot 'mood'"),
        (CARD + ", hero[king]", "occurs twice"),
    ],
)
def test_a_card_that_the_grammar_cannot_tell_is_refused(mr: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        parse_card(mr)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        story_cards(train=-1)
    with pytest.raises(ValueError, match="at most"):
        story_cards(train=10**9)


@pytest.mark.parametrize(
    ("noun_phrase", "expected"),
    [
        ("king", "a king"),
        ("idle king", "an idle king"),
    ],
)
def test_the_article_goes_by_sound(noun_phrase: str, expected: str) -> None:
    assert with_article(noun_phrase) == expected


def splits(task: Dataset) -> tuple[list[Example], list[Example], list[Example]]:
    return task.train, task.validation, task.test


def every_pair(task: Dataset) -> list[Example]:
    return task.train + task.validation + task.test
