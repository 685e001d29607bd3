"""Cards to write texts for, and their reference texts, which are not in any notebook.

The cards are not in the task's data set. For learners at home everything is on their own computer, so "hidden" means
that they do not look; an instructor draws the cards of a class from another seed and keeps it secret.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from random import Random

from lora_from_scratch.finetune.metrics import bleu, slot_error_rate
from lora_from_scratch.finetune.story_cards import draw_cards, references, story_cards
from lora_from_scratch.finetune.story_grammar import LEXICON

CARDS = 100
HOME_SEED = 14  # for learners at home


def hidden_cards(seed: int = HOME_SEED, count: int = CARDS) -> list[str]:
    """Cards that are not in any split of the task's data."""
    fresh = (mr for mr in draw_cards(Random(f"capstone {seed}")) if mr not in _known())
    return list(itertools.islice(fresh, count))


@functools.cache
def _known() -> frozenset[str]:
    dataset = story_cards()
    return frozenset(example.mr for example in [*dataset.train, *dataset.validation, *dataset.test])


@functools.cache
def _references(mr: str, seed: int) -> list[str]:
    return references(mr, seed=seed)


def score(texts: Mapping[str, str], cards: Sequence[str], seed: int = HOME_SEED) -> tuple[float, float]:
    """BLEU (0 to 100) and slot error rate of the texts for these cards.

    Raises:
        ValueError: a card has no text, a text has no card, or a text is not a string.
    """
    missing = [mr for mr in cards if mr not in texts]
    if missing:
        raise ValueError(f"{len(missing)} of {len(cards)} cards have no text, the first is {missing[0]!r}")
    unknown = [mr for mr in texts if mr not in set(cards)]
    if unknown:
        raise ValueError(f"{len(unknown)} texts do not belong to a card of this task, the first is for {unknown[0]!r}")
    wrong = next((mr for mr in cards if not isinstance(texts[mr], str)), None)
    if wrong is not None:
        raise ValueError(f"the text for {wrong!r} is a {type(texts[wrong]).__name__}; it must be a string")
    written = [texts[mr] for mr in cards]
    truth = [_references(mr, seed) for mr in cards]
    return bleu(written, truth), slot_error_rate(written, list(cards), LEXICON)
