"""Translations of what people read: the notebooks, the messages of the checks, and the help of the commands.

English is the source. Verdicts and grades are computed and recorded in English, so that they do not depend on the
language; only what is displayed is translated. A message is therefore translated after it has been formatted: the
entry "There should be {0} pairs, but you return {1}." stands for every sentence of this form, and what stands in the
place of {0} and {1} is translated by itself if there is an entry for it.

The entries are gettext catalogues, `translations/LANGUAGE/*.po`; `make translations` collects them from the sources.
They are read by Babel, which JupyterLab installs. A text without an entry stays in English.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

VARIABLE = "LORA_FROM_SCRATCH_LANGUAGE"
FOLDER = Path(__file__).resolve().parents[1] / "translations"
ENGLISH = "en"
LANGUAGES = {ENGLISH: "English", "zh": "简体中文"}
PLACE = re.compile(r"\{(\d+)\}")
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+")
LISTS = (re.compile(r"; "), re.compile(r" or "), re.compile(r", (?:and )?| and "))
LISTED = {"zh": ("；", " 或 ", "、")}  # what separates the items of such lists
ITEM = re.compile(r"\n(?=- | {4}\S)")  # begins an item of a list, or an argument
SENTENCE = re.compile(r"(?<=[.?!])\s+(?=[A-Z`\"(])")
CHINESE_SENTENCE = re.compile(r"(?<=[。？！])(?![）”])")
SEPARATED = re.compile(r"(, | )?\{(\d+)\}")
HAN, FULL_WIDTH = "\u4e00-\u9fff", "，。；：？！（）、“”"
WORD = re.compile(r"(?<![\w`])[A-Za-z]{2,}(?![\w`(])")
QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"|'[^']*'")
MOST_SENTENCES = 12  # of a message that is translated sentence by sentence
FEWEST_LETTERS = 4  # outside the places of an entry; with fewer it would match almost anything
LONGEST_SPLIT = 200  # characters that several places in a row can share
LONGEST_LIST = 500  # characters of a list that is translated item by item

_of_notebook: list[str] = []  # the language that the notebook chose


class Place(NamedTuple):
    """A place in an entry: its number, and what separates it from the place before ("", " " or ", ")."""

    number: str
    after: str


class Form(NamedTuple):
    """An entry with places.

    Attributes:
        start: what stands before the first place.
        pattern: matches a whole text, with a group for each run of places that hardly anything separates.
        groups: the places of each group.
        quoted: the numbers of the places in quotes or backticks, whose values are not translated.
        translation: with the same places.
    """

    start: str
    pattern: re.Pattern[str]
    groups: tuple[tuple[Place, ...], ...]
    quoted: frozenset[str]
    translation: str


class Catalogue(NamedTuple):
    """The entries of a language.

    Attributes:
        texts: the translations by the text on one line.
        sources: the texts as they are written, by the text on one line.
        forms: the entries with places, most specific first.
    """

    texts: dict[str, str]
    sources: dict[str, str]
    forms: tuple[Form, ...]


def language() -> str:
    """The language to display: that of the environment variable, that of the notebook, or English."""
    asked = os.environ.get(VARIABLE, "").strip().lower().replace("_", "-").partition("-")[0]
    return asked if asked in LANGUAGES else _of_notebook[-1] if _of_notebook else ENGLISH


def set_language(code: str) -> None:
    """Choose the language of this notebook's messages: "en" or "zh".

    The environment variable LORA_FROM_SCRATCH_LANGUAGE takes precedence.

    Raises:
        ValueError: there is no translation into this language.
    """
    if code not in LANGUAGES:
        known = ", ".join(f'"{key}" ({name})' for key, name in LANGUAGES.items())
        raise ValueError(f"there is no language {code!r}; there are {known}")
    _of_notebook[:] = [code]


def translate(text: str, into: str | None = None) -> str:
    """The text in the language to display, or unchanged if there is no entry for it.

    Args:
        into: the language; by default `language()`.
    """
    into = into or language()
    if into == ENGLISH or not WORD.search(text):
        return text
    return translated_line(" ".join(text.split()), into) or text


def translate_sentence(sentence: str) -> str:
    """A sentence of a longer text, in the language to display: its paragraph, if the sentence has no entry itself."""
    if language() == ENGLISH:
        return sentence
    entries = catalogue(language())
    around = [text for text in entries.texts if sentence in text]
    if sentence in entries.texts or not around:
        return translate(sentence)
    text = min(around, key=len)
    return _part(entries.sources[text], entries.texts[text], sentence)


def _part(text: str, translation: str, sentence: str) -> str:
    """What corresponds to a sentence in the translation of its paragraph: an item or a sentence, if they match up."""
    for ours, theirs in ((ITEM, ITEM), (SENTENCE, CHINESE_SENTENCE)):
        pieces, translated = ours.split(text), [piece for piece in theirs.split(translation) if piece.strip()]
        places = [place for place, piece in enumerate(pieces) if sentence in one_line(piece)]
        if places and len(pieces) == len(translated):
            text, translation = one_line(pieces[places[0]]), translated[places[0]].strip().removeprefix("- ")
    return translation


def translated_units(code: str) -> list[str]:
    """The units that have been translated into a language: "unit_00", "unit_01", ..."""
    return sorted(file.stem for file in (FOLDER / code).glob("unit_*.po"))


@functools.cache
def catalogue(code: str) -> Catalogue:
    """All entries of a language that have a translation; none if Babel is not installed."""
    found = [entry for file in sorted((FOLDER / code).glob("*.po")) for entry in read_entries(file) if entry[1]]
    texts = {one_line(text): translation for text, translation in found}
    forms = [form_of(text, translation) for text, translation in texts.items() if is_form(text)]
    forms.sort(key=lambda form: -len(form.pattern.pattern))
    return Catalogue(texts, {one_line(text): text for text, _ in found}, tuple(forms))


def read_entries(file: Path) -> Iterator[tuple[str, str]]:
    """The entries of a .po file, each with its translation, which is empty if there is none."""
    try:
        from babel.messages.pofile import read_po
    except ImportError:
        return
    with file.open("rb") as opened:
        for message in read_po(opened):
            if message.id:
                yield str(message.id), str(message.string)


def one_line(text: str) -> str:
    return " ".join(text.split())


def is_form(text: str) -> bool:
    """Whether the text has places and enough letters around them to be recognised."""
    rest = PLACE.sub("", text)
    return rest != text and ("`" in rest or len(re.findall(r"[^\W\d_]", rest)) >= FEWEST_LETTERS)


def form_of(text: str, translation: str = "") -> Form:
    """The entry with places that a text is."""
    line = one_line(text)
    pieces = re.split(r"((?:\{\d+\}(?:, | )?)*\{\d+\})", line)  # literal, places, literal, ...
    groups = tuple(tuple(Place(*found[::-1]) for found in SEPARATED.findall(piece)) for piece in pieces[1::2])
    pattern = "".join("(.*?)" if index % 2 else re.escape(piece) for index, piece in enumerate(pieces))
    quoted = {number for text in (line, translation) for code in QUOTED.findall(text) for number in PLACE.findall(code)}
    return Form(pieces[0], re.compile(pattern, re.DOTALL), groups, frozenset(quoted), translation)


# --- Finding a translation -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def translated_line(line: str, into: str) -> str | None:
    """The translation that leaves least of a text in English; None if there is no entry for any part of it."""
    entries = catalogue(into)
    for one in (line, _lower(line)):
        if one in entries.texts and not PLACE.search(one):
            return entries.texts[one]
    found = [*_by_forms(line, entries, into), *_by_sentences(line, into), *_by_items(line, into)]
    return min(found, key=english_words) if found else None


def english_words(text: str) -> int:
    """How many English words there are outside code and quotes."""
    return len(WORD.findall(QUOTED.sub(" ", text)))


def _by_forms(line: str, entries: Catalogue, into: str) -> Iterator[str]:
    lower = _lower(line)
    for form in entries.forms:
        for one in dict.fromkeys((line, lower)):
            match = form.pattern.fullmatch(one) if one.startswith(form.start) else None
            if match and all(map(_fits, form.groups, match.groups())):
                values: dict[str, str] = {}
                for places, text in zip(form.groups, match.groups(), strict=True):
                    values |= _values(places, text, form.quoted, into)
                filled = PLACE.sub(lambda place, values=values: values.get(place[1], place[0]), form.translation)  # type: ignore[misc]
                yield _spaced(filled)
                break


def _fits(places: tuple[Place, ...], text: str) -> bool:
    """Whether a text can be divided between places: brackets stay whole, and there is what separates the places."""
    pieces = [""]
    for piece in re.split(r"(, | )", text):
        pieces = [*pieces[:-1], pieces[-1] + piece] if not _is_closed(pieces[-1]) else [*pieces, piece]
    return _is_closed(text) and all(not place.after or place.after in pieces for place in places[1:])


def _is_closed(text: str) -> bool:
    """Whether every bracket that is opened in a text is closed in it."""
    return all(text.count(left) == text.count(right) for left, right in ("()", "[]"))


def _values(places: tuple[Place, ...], text: str, quoted: frozenset[str], into: str) -> dict[str, str]:
    """The translated values of places that share a text, divided as it leaves least in English."""
    first, rest = places[0].number, places[1:]
    if not rest:
        return {first: text if first in quoted else translate(text, into)}
    between = rest[0].after
    ends = [found.start() for found in re.finditer(re.escape(between) or r"^|[ ,;(.]|$", text[:LONGEST_SPLIT])]
    ends = [end for end in ends if _is_closed(text[:end])] or [len(text)]
    shared = [
        {first: text[:end] if first in quoted else translate(text[:end], into)}
        | _values(rest, text[end + len(between) :], quoted, into)
        for end in ends
    ]
    return min(shared, key=lambda values: english_words(" ".join(values.values())))


def _lower(line: str) -> str:
    """The text with a small first letter, unless it begins with a constant of Python."""
    return line if line.startswith(("None", "True", "False")) else line[:1].lower() + line[1:]


def _spaced(text: str) -> str:
    """A space between Chinese and other letters, and none between Chinese and Chinese."""
    text = re.sub(rf"(?<=[{HAN}{FULL_WIDTH}]) (?=[{HAN}{FULL_WIDTH}])", "", text)
    return re.sub(rf"(?<=[{HAN}])(?=[A-Za-z0-9`\[(])|(?<=[A-Za-z0-9`\])])(?=[{HAN}])", " ", text)


def _by_sentences(line: str, into: str) -> Iterator[str]:
    """The text with its first sentences and the rest translated by themselves, if there is an entry for the first."""
    sentences = SENTENCE_END.split(line)
    for length in range(min(len(sentences) - 1, MOST_SENTENCES), 0, -1):
        first, rest = " ".join(sentences[:length]), " ".join(sentences[length:])
        found, after = (
            (translated_line(first, into) if length == 1 else _whole(first, into)),
            translated_line(rest, into),
        )
        if found is not None or after is not None:
            yield f"{found or first}{'' if found and found[-1] in '。？！：；' else ' '}{after or rest}"


def _whole(line: str, into: str) -> str | None:
    entries = catalogue(into)
    return entries.texts.get(line) or next(_by_forms(line, entries, into), None)


def _by_items(line: str, into: str) -> Iterator[str]:
    """A list ("a number and a vector") whose items have entries."""
    for separator, joined in zip(LISTS, LISTED[into], strict=True):
        items = separator.split(line)
        if len(items) > 1 and len(line) <= LONGEST_LIST and all(map(_is_closed, items)):
            found = [translated_line(item, into) if english_words(item) else item for item in items]
            if all(found):
                yield joined.join(filter(None, found))
