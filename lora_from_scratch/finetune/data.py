"""Pairs of a meaning and a text that expresses it, in the schema of the E2E data set.

E2E (Novikova, Dusek and Rieser 2017) calls the meaning `mr` (meaning representation) and the text `ref`
(reference). A meaning is a list of slots with values, such as `hero[woodcutter], place[on an island]`. A meaning may
have several references.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

STORY_CARDS = "story-cards"  # the name of the bundled task

# slot -> value -> the phrases that express it, as searched for by the slot error rate
Lexicon = Mapping[str, Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class Example:
    """A meaning representation and one text that expresses it."""

    mr: str
    ref: str


@dataclass(frozen=True)
class Dataset:
    """Three splits that share no meaning. Each example is one pair, so a meaning may occur several times in a row."""

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    lexicon: Lexicon = field(default_factory=dict)  # the task's phrases, for `metrics.slot_error_rate`


def references_by_mr(examples: Iterable[Example]) -> dict[str, list[str]]:
    """All references of each meaning, in the order of `examples`."""
    references: dict[str, list[str]] = {}
    for example in examples:
        references.setdefault(example.mr, []).append(example.ref)
    return references


def parse_mr(mr: str) -> dict[str, str]:
    """Parse `slot[value], slot[value]` into a dictionary, keeping the order of the slots.

    Raises:
        ValueError: the string is empty, a bracket is not closed, there is text outside the brackets, a slot or a
            value is empty, or a slot occurs twice.
    """
    slots: dict[str, str] = {}
    rest = mr.strip()
    if not rest:
        raise ValueError("the meaning representation is empty: write slot[value], slot[value]")
    while rest:
        name, value, rest = _split_off_slot(rest, mr)
        if name in slots:
            raise ValueError(f"slot {name!r} occurs twice in {mr!r}: keep one of them")
        slots[name] = value
        if rest and not (rest.startswith(",") and rest[1:].strip()):
            raise ValueError(f"expected ', slot[value]' after {name}[{value}] in {mr!r}, found {rest!r}")
        rest = rest[1:].strip()
    return slots


def _split_off_slot(text: str, mr: str) -> tuple[str, str, str]:
    """The name and the value of the first slot, and the text after it."""
    name, opened, behind = text.partition("[")
    name = name.strip()
    if not opened or "]" in name:
        raise ValueError(f"expected slot[value] in {mr!r}, found {text!r}")
    if not name or "," in name:
        raise ValueError(f"text outside the brackets in {mr!r}: {name!r} before '[' is not the name of a slot")
    value, closed, behind = behind.partition("]")
    if not closed or "[" in value:
        raise ValueError(f"the bracket of slot {name!r} is not closed in {mr!r}: add ']'")
    if not value.strip():
        raise ValueError(f"slot {name!r} has no value in {mr!r}: write one between the brackets or drop the slot")
    return name, value.strip(), behind.strip()


def format_mr(slots: Mapping[str, str]) -> str:
    """The inverse of `parse_mr`."""
    return ", ".join(f"{name}[{value}]" for name, value in slots.items())
