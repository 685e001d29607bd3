"""The grammar of the story cards: turns a meaning into the opening of a fairy tale.

It has three steps, as in classical data-to-text generation (Reiter and Dale 2000, chapter 3):

1. Planning decides the order of the slots, which of them share a clause, and where a sentence ends.
2. Lexical choice picks one phrase for every value. Many phrases deny the opposite: "was never afraid" means brave.
3. Realisation joins the clauses and adds articles, pronouns, commas and capitals.

Phrases contain {he}, {him} and {his} where the hero's pronoun belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random

# --- The words -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hero:
    pronoun: str  # he or she
    nouns: tuple[str, ...]


@dataclass(frozen=True)
class Trait:
    adjectives: tuple[str, ...]  # "a brave king"
    predicates: tuple[str, ...]  # verb phrases, mostly negations of the opposite: "was never afraid"


@dataclass(frozen=True)
class Ending:
    tales: tuple[str, ...]  # noun phrases that open the text: "a tale with a sad ending"
    clauses: tuple[str, ...]  # clauses that end it: "no good came of it"


HEROES = {
    "woodcutter": Hero("he", ("woodcutter",)),
    "fisherman": Hero("he", ("fisherman",)),
    "shepherd": Hero("he", ("shepherd",)),
    "tailor": Hero("he", ("tailor",)),
    "soldier": Hero("he", ("soldier",)),
    "miller": Hero("he", ("miller",)),
    "merchant": Hero("he", ("merchant",)),
    "king": Hero("he", ("king",)),
    "prince": Hero("he", ("prince", "king's son")),
    "boy": Hero("he", ("boy", "lad")),
    "princess": Hero("she", ("princess", "king's daughter")),
    "queen": Hero("she", ("queen",)),
    "girl": Hero("she", ("girl", "maiden")),
    "widow": Hero("she", ("widow",)),
    "goose-girl": Hero("she", ("goose-girl",)),
    "witch": Hero("she", ("witch",)),
}

TRAITS = {
    "brave": Trait(("brave",), ("was never afraid",)),
    "wise": Trait(("wise", "clever"), ("was no fool",)),
    "kind": Trait(("kind",), ("never said a cross word",)),
    "lazy": Trait(("lazy", "idle"), ("did not like to work",)),
    "proud": Trait(("proud",), ("would bow to nobody",)),
    "merry": Trait(("merry", "cheerful"), ("was never sad",)),
    "lonely": Trait(("lonely",), ("had no friend in the world",)),
    "poor": Trait(("poor",), ("had not a penny in the world",)),
}

PLACES: dict[str, tuple[str, ...]] = {
    "on an island": ("on an island", "on an island in the sea"),
    "in a forest": ("in a forest", "in a deep wood"),
    "by the sea": ("by the sea", "by the shore of the sea"),
    "on a mountain": ("on a mountain", "at the top of a mountain"),
    "in a castle": ("in a castle", "in a castle of stone"),
    "by a river": ("by a river", "on the bank of a river"),
    "in a village": ("in a village", "in a little village"),
    "in a cottage": ("in a cottage", "in a little hut"),
    "in a cave": ("in a cave", "in a dark cave"),
    "at the end of the world": ("at the end of the world", "where the world ends"),
    "in a great city": ("in a great city", "in a large town"),
    "in a valley": ("in a valley", "between two hills"),
    "in a tower": ("in a tower", "in a high tower"),
    "in a desert": ("in a desert", "in a land without water"),
}

WISHES: dict[str, tuple[str, ...]] = {
    "a silver cup": ("a silver cup", "a cup of silver"),
    "a golden crown": ("a golden crown", "a crown of gold"),
    "a swift horse": ("a swift horse", "a horse as swift as the wind"),
    "a new coat": ("a new coat", "a coat without a hole"),
    "a magic ring": ("a magic ring", "an enchanted ring"),
    "a garden of roses": ("a garden of roses", "a garden full of roses"),
    "a glass palace": ("a glass palace", "a palace of glass"),
    "a loaf of bread": ("a loaf of bread", "a whole loaf of bread"),
    "a long life": ("a long life", "a life of a hundred years"),
    "a soft bed": ("a soft bed", "a bed of feathers"),
    "a ship": ("a ship", "a ship with white sails"),
    "a red apple": ("a red apple", "an apple as red as fire"),
    "the water of life": ("the water of life", "a drop of the water of life"),
    "a bright sword": ("a bright sword", "a sword that never failed"),
    "a bag of gold": ("a bag of gold", "a bag full of gold"),
}

HELPERS: dict[str, tuple[str, ...]] = {
    "a white dove": ("a white dove", "a dove as white as snow"),
    "a grey wolf": ("a grey wolf", "an old grey wolf"),
    "a talking fox": ("a talking fox", "a fox with a human voice"),
    "a little mouse": ("a little mouse", "a tiny mouse"),
    "a black cat": ("a black cat", "a cat as black as night"),
    "a fairy": ("a fairy", "a good fairy"),
    "a dwarf": ("a dwarf", "a dwarf with a long beard"),
    "a giant": ("a giant", "a giant as tall as a tree"),
    "a green frog": ("a green frog", "a little green frog"),
    "an owl": ("an owl", "a brown owl"),
    "a golden fish": ("a golden fish", "a fish with golden scales"),
    "a bear": ("a bear", "a great bear"),
    "a raven": ("a raven", "a raven as black as coal"),
    "a swan": ("a swan", "a wild swan"),
    "an eagle": ("an eagle", "a great eagle"),
}

FREE = "nothing"  # the price when the help is free
PRICES: dict[str, tuple[str, ...]] = {
    "a song": ("a song", "one song"),
    "a kiss": ("a kiss", "one kiss"),
    "a dance": ("a dance", "one dance"),
    "three years of service": ("three years of service", "three years of hard work"),
    "a lock of hair": ("a lock of hair", "a lock of {his} hair"),
    "a promise": ("a promise", "a solemn promise"),
    "a silver penny": ("a silver penny", "a penny of silver"),
    "a drop of blood": ("a drop of blood", "a drop of {his} blood"),
    "a bowl of milk": ("a bowl of milk", "a bowl of fresh milk"),
    "the answer to a riddle": ("the answer to a riddle", "an answer to a riddle"),
    "a year of silence": ("a year of silence", "a year without a word"),
    "a basket of eggs": ("a basket of eggs", "a basket full of eggs"),
    FREE: ("no reward", "no payment"),
}

ENDINGS = {
    "happy": Ending(("a tale with a happy ending",), ("all ended well", "nobody was unhappy in the end")),
    "sad": Ending(("a tale with a sad ending",), ("it ended badly", "no good came of it")),
    "a wedding": Ending(
        ("a tale that ends with a wedding",), ("it ended with a wedding", "a wedding was the end of it")
    ),
    "a feast": Ending(("a tale that ends with a feast",), ("it ended with a feast", "a feast was the end of it")),
    "unknown": Ending(("a tale without an ending",), ("nobody knows how it ended", "the end was never told")),
}


def _both_pronouns(phrases: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(phrase.format(his=his) for phrase in phrases for his in ("his", "her")))


# Every phrase that can express a value of a slot, for the slot error rate.
LEXICON: dict[str, dict[str, tuple[str, ...]]] = {
    "hero": {value: hero.nouns for value, hero in HEROES.items()},
    "trait": {value: trait.adjectives + trait.predicates for value, trait in TRAITS.items()},
    "place": PLACES,
    "wish": WISHES,
    "helper": HELPERS,
    "price": {value: _both_pronouns(phrases) for value, phrases in PRICES.items()},
    "ending": {value: ending.tales + ending.clauses for value, ending in ENDINGS.items()},
}

# The frames around the phrases; they contain nothing that could be taken for a slot's value.
WISH_FRAMES = ("wished for {wish}", "longed for {wish}", "wanted nothing but {wish}")
HELP_FRAMES = ("offered to help {him}", "promised to help {him}", "agreed to help {him}")
GIFT_FRAMES = ("offered {him} {wish}", "promised {him} {wish}")
DAYS = ("one day", "one morning", "one evening")
PAID_PHRASES = ("in return for {price}", "in exchange for {price}")
PAID_VERBS = ("asked for {price} in return", "would take nothing but {price}")
PAID_SENTENCES = ("the price was {price}", "the price was no more than {price}")
FREE_PHRASES = ("for {price}",)
FREE_VERBS = ("asked for {price}", "would take {price}")

# --- Planning --------------------------------------------------------------------------------------

MAX_SENTENCES = 3


@dataclass(frozen=True)
class Plan:
    """The layout of a text. An empty string means that the slot is not on the card."""

    trait: str  # "adjective": a brave king; "clause": he was never afraid
    place: str  # "front": on an island there lived ...; "clause": ... who lived on an island
    wish: str  # "clause": he longed for it; "gift": the helper offered it; "search": he set out to find it
    helper: str  # "active": a dove offered ...; "met": he met a dove, who ...; "only": nobody but a dove ...
    price: (
        str  # "phrase": ... in return for it; "front": in return for it, ...; "verb": ... and asked for it; "sentence"
    )
    ending: str  # "first": a tale with a happy ending ...; "last": ... all ended well
    clauses_in_opening: int  # number of the hero's clauses in the opening sentence; a second sentence has the rest
    join_helper: bool  # whether the helper's clause continues the previous sentence: ..., and one day ...
    join_ending: bool  # whether the ending continues the previous sentence

    @property
    def hero_clauses(self) -> list[str]:
        """The slots that are expressed by a verb phrase about the hero, in order."""
        return [slot for slot in ("place", "trait", "wish") if getattr(self, slot) == "clause"]

    @property
    def left_over(self) -> int:
        """The number of the hero's clauses that are not in the opening sentence."""
        return len(self.hero_clauses) - self.clauses_in_opening

    @property
    def sentences(self) -> int:
        count = 1 + (self.left_over > 0) + (self.price == "sentence")
        count += self.helper != "" and not self.join_helper
        return count + (self.ending == "last" and not self.join_ending)

    def is_good(self) -> bool:
        """Whether this layout reads well."""
        in_opening, left_over = self.clauses_in_opening, self.left_over
        last_hero_sentence = left_over or in_opening  # its number of clauses
        helper_is_long = self.helper != "" and self.price != "sentence" and (self.join_helper or self.price == "verb")
        return (
            self.sentences <= MAX_SENTENCES
            and left_over >= 0
            # Exclude "There was once a king. He lived in a tower."
            and not (left_over and not in_opening and self.place != "front")
            and not (self.ending == "first" and self.place == "front")
            # A joined clause needs a sentence to continue, and no sentence may be too long.
            and not (self.join_helper and (not self.helper or self.price == "front" or last_hero_sentence > 1))
            and not (self.join_ending and (self.ending != "last" or not self.helper or helper_is_long))
            # The helper's frames cannot express every combination.
            and not (self.wish == "gift" and self.helper not in ("active", "met"))
            and not (self.wish == "search" and self.helper != "met")
            and not (self.helper == "met" and self.price in ("front", "verb"))
            and not (self.helper == "only" and self.price not in ("", "sentence"))
        )


LAYOUTS = {
    "trait": ("adjective", "clause"),
    "place": ("front", "clause"),
    "wish": ("clause", "gift", "search"),
    "helper": ("active", "met", "only"),
    "price": ("phrase", "front", "verb", "sentence"),
    "ending": ("first", "last"),
}


@cache
def plans(slots: frozenset[str], free: bool = False) -> tuple[Plan, ...]:
    """Every good plan for a card with these slots; `free` means the price is "nothing", which cannot come first."""
    layouts = [LAYOUTS[slot] if slot in slots else ("",) for slot in LAYOUTS]
    if free:
        layouts[list(LAYOUTS).index("price")] = ("phrase", "verb")
    found = (
        Plan(trait, place, wish, helper, price, ending, clauses_in_opening, join_helper, join_ending)
        for trait, place, wish, helper, price, ending in product(*layouts)
        for clauses_in_opening, join_helper, join_ending in product(range(3), (False, True), (False, True))
    )
    return tuple(plan for plan in found if plan.is_good())


# --- Realisation -----------------------------------------------------------------------------------


def realise(card: Mapping[str, str], plan: Plan, rng: Random) -> str:
    """Write the text of a card according to a plan; `rng` chooses among synonyms."""
    pronoun = HEROES[card["hero"]].pronoun
    words = {"he": "he", "him": "him", "his": "his"} if pronoun == "he" else {"he": "she", "him": "her", "his": "her"}
    sentences = [sentence.format_map(words) for sentence in _sentences(card, plan, rng)]
    return " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)


def _sentences(card: Mapping[str, str], plan: Plan, rng: Random) -> Iterator[str]:
    """The sentences, without capitals and full stops."""
    clauses = [_hero_clause(slot, card, rng) for slot in plan.hero_clauses]
    opening, rest = clauses[: plan.clauses_in_opening], clauses[plan.clauses_in_opening :]
    current = _opening(card, plan, opening, rng)
    if rest:
        yield current
        current = "{he} " + " and ".join(rest)
    if plan.helper:
        helper = _helper_clause(card, plan, rng)
        if plan.join_helper:
            current = f"{current}, and {helper}"
        else:
            yield current
            current = helper
    if plan.price == "sentence":
        yield current
        current = _fill(rng.choice(PAID_SENTENCES), price=rng.choice(PRICES[card["price"]]))
    if plan.ending == "last":
        ending = rng.choice(ENDINGS[card["ending"]].clauses)
        if plan.join_ending:
            current = f"{current}, and {ending}"
        else:
            yield current
            current = ending
    yield current


def _opening(card: Mapping[str, str], plan: Plan, clauses: list[str], rng: Random) -> str:
    """The clause that introduces the hero, with the first clauses about him or her."""
    hero = rng.choice(HEROES[card["hero"]].nouns)
    if plan.trait == "adjective":
        hero = f"{rng.choice(TRAITS[card['trait']].adjectives)} {hero}"
    hero = with_article(hero)
    who = f"{hero} who {' and '.join(clauses)}" if clauses else hero
    if plan.ending == "first":
        tale = rng.choice(ENDINGS[card["ending"]].tales)
        return rng.choice((f"{tale} is told of {who}", f"this is {tale}: there was once {who}"))
    if plan.place == "front":
        return f"{rng.choice(PLACES[card['place']])} {rng.choice(('there lived', 'there once lived'))} {who}"
    if clauses and plan.trait != "clause" and rng.random() < 0.5:
        return f"{rng.choice(('once upon a time', 'long ago'))} {hero} {' and '.join(clauses)}"
    return f"{rng.choice(('there was once', 'once upon a time there was'))} {who}"


def _hero_clause(slot: str, card: Mapping[str, str], rng: Random) -> str:
    """A verb phrase about the hero that expresses one slot."""
    if slot == "place":
        return f"lived {rng.choice(PLACES[card['place']])}"
    if slot == "wish":
        return _fill(rng.choice(WISH_FRAMES), wish=rng.choice(WISHES[card["wish"]]))
    trait = TRAITS[card["trait"]]
    return rng.choice((rng.choice(trait.predicates), f"was {rng.choice(trait.adjectives)}"))


def _helper_clause(card: Mapping[str, str], plan: Plan, rng: Random) -> str:
    """The clause that introduces the helper, with the wish if it is the helper's gift, and usually with the price."""
    helper = rng.choice(HELPERS[card["helper"]])
    if plan.helper == "only":
        return rng.choice((f"nobody but {helper} would help {{him}}", f"there was no one to help {{him}} but {helper}"))
    wish = rng.choice(WISHES[card["wish"]]) if plan.wish in ("gift", "search") else ""
    deed = _fill(rng.choice(GIFT_FRAMES if plan.wish == "gift" else HELP_FRAMES), wish=wish)
    if plan.price in ("phrase", "front", "verb"):
        frames = _price_frames(plan.price, free=card["price"] == FREE)
        price = _fill(rng.choice(frames), price=rng.choice(PRICES[card["price"]]))
        if plan.price == "front":
            return f"{price}, {helper} {deed}"
        deed = f"{deed} {price}" if plan.price == "phrase" else f"{deed}, but {price}"
    day = rng.choice(DAYS)
    if plan.wish == "search":
        return f"{day} {{he}} set out to find {wish} and met {helper}, who {deed}"
    if plan.helper == "met":
        return f"{day} {{he}} met {helper}, who {deed}"
    return rng.choice((f"{day} {helper} {deed}", f"{day} {helper} came to {{him}} and {deed}"))


def _price_frames(layout: str, free: bool) -> tuple[str, ...]:
    if layout == "verb":
        return FREE_VERBS if free else PAID_VERBS
    return FREE_PHRASES if free else PAID_PHRASES


def _fill(frame: str, **phrases: str) -> str:
    """Insert phrases into a frame; {he}, {him} and {his} are left for `realise` to fill in."""
    for name, phrase in phrases.items():
        frame = frame.replace(f"{{{name}}}", phrase)
    return frame


def with_article(noun_phrase: str) -> str:
    """Add "a" or "an": a king, an idle king. Spelling decides, which is right for every word of this grammar."""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"
