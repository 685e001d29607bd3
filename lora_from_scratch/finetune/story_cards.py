"""The bundled task: from a story card to the opening of a fairy tale.

A card is a meaning such as `hero[woodcutter], trait[wise], place[on an island], wish[a silver cup],
helper[a white dove], price[a song], ending[happy]`. Every reference mentions each slot of its card exactly once, and
nothing that is not on the card, so that slot errors can be counted. `story_grammar` generates the text. Everything is
determined by (seed, card) and reproducible on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import prod
from random import Random

from lora_from_scratch.finetune.data import STORY_CARDS, Dataset, Example, format_mr, parse_mr
from lora_from_scratch.finetune.story_grammar import FREE, LEXICON, plans, realise

SLOTS = tuple(LEXICON)  # in the order in which a card is written
MIN_SLOTS = 5  # of the seven, including the hero
EVALUATION_REFERENCES = 8  # per card of the validation and test splits


def story_cards(seed: int = 0, train: int = 4000, validation: int = 200, test: int = 300) -> Dataset:
    """Generate the story cards.

    Args:
        seed: determines the cards and the texts.
        train: the number of training cards, with one reference each.
        validation, test: the number of cards, with eight references each.

    Raises:
        ValueError: a size is negative, or there are not enough different cards.
    """
    sizes = (train, validation, test)
    if min(sizes) < 0 or sum(sizes) > distinct_cards():
        raise ValueError(f"the sizes must be at least 0 and sum to at most {distinct_cards()}, got {sizes}")
    cards = draw_cards(Random(f"cards {seed}"))
    splits = []
    for size, count in zip(sizes, (1, EVALUATION_REFERENCES, EVALUATION_REFERENCES), strict=True):
        mrs = [next(cards) for _ in range(size)]
        splits.append([Example(mr, ref) for mr in mrs for ref in references(mr, count, seed)])
    training, validating, testing = splits
    return Dataset(STORY_CARDS, training, validating, testing, LEXICON)


def references(mr: str, count: int = EVALUATION_REFERENCES, seed: int = 0) -> list[str]:
    """Generate `count` different texts for one card, with layouts and words drawn from (seed, card).

    Raises:
        ValueError: the grammar does not know a slot or a value of the card, the card has too few slots, or it has fewer
            than `count` different texts.
    """
    card = parse_card(mr)
    rng = Random(f"text {seed} {format_mr(card)}")
    layouts = plans(frozenset(card), free=card.get("price") == FREE)
    texts: dict[str, None] = {}  # an ordered set
    for _ in range(100 * count):
        if len(texts) == count:
            break
        texts[realise(card, rng.choice(layouts), rng)] = None
    if len(texts) < count:
        raise ValueError(f"the grammar has only about {len(texts)} texts for {mr!r}, but {count} were requested")
    return list(texts)


def parse_card(mr: str) -> dict[str, str]:
    """Parse a card into a dictionary with its slots in the standard order.

    Raises:
        ValueError: it is not a meaning representation, or not a card of this grammar.
    """
    given = parse_mr(mr)
    for slot, value in given.items():
        if slot not in LEXICON:
            raise ValueError(f"a story card has no slot {slot!r} (in {mr!r}); it may have {', '.join(SLOTS)}")
        if value not in LEXICON[slot]:
            raise ValueError(f"slot {slot!r} has no value {value!r}; it may be one of: {', '.join(LEXICON[slot])}")
    if frozenset(given) not in map(frozenset, card_shapes()):
        raise ValueError(
            f"{mr!r} is not a story card: it needs a hero, at least {MIN_SLOTS} slots, and a helper if it has a price"
        )
    return {slot: given[slot] for slot in SLOTS if slot in given}


def card_shapes() -> list[tuple[str, ...]]:
    """The valid combinations of slots: a hero and four or more others, and a price only together with a helper."""
    others = SLOTS[1:]
    shapes = [(SLOTS[0], *more) for n in range(MIN_SLOTS - 1, len(SLOTS)) for more in combinations(others, n)]
    return [shape for shape in shapes if "price" not in shape or "helper" in shape]


def distinct_cards() -> int:
    """The number of different cards."""
    return sum(prod(len(LEXICON[slot]) for slot in shape) for shape in card_shapes())


def draw_cards(rng: Random) -> Iterator[str]:
    """Yield different random cards, endlessly."""
    seen = set()
    shapes = card_shapes()
    while True:
        card = {slot: rng.choice(list(LEXICON[slot])) for slot in rng.choice(shapes)}
        mr = format_mr(card)
        if mr not in seen:
            seen.add(mr)
            yield mr
