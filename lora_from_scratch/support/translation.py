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
MOST_SENTENCES = 12  # of a message that is translated sentence by sentence
FEWEST_LETTERS = 6  # outside the places of an entry; with fewer it would match almost anything

_of_notebook: list[str] = []  # the language that the notebook chose


class Form(NamedTuple):
    """An entry with places: what stands before the first, the pattern of the whole, and the translation."""

    start: str
    pattern: re.Pattern[str]
    translation: str


class Catalogue(NamedTuple):
    """The entries of a language: texts by their form on one line, and the entries with places, most specific first."""

    texts: dict[str, str]
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
    if into == ENGLISH or not text.strip():
        return text
    entries = catalogue(into)
    found = _whole(text, entries, into)
    return found if found is not None else _by_sentences(text, entries, into)


def translate_sentence(sentence: str) -> str:
    """A sentence of a longer text, in the language to display: its paragraph, if the sentence has no entry itself."""
    alone = translate(sentence)
    if alone != sentence or language() == ENGLISH:
        return alone
    texts = catalogue(language()).texts
    around = [text for text in texts if sentence in text]
    return texts[min(around, key=len)] if around else sentence


def translated_units(code: str) -> list[str]:
    """The units that have been translated into a language: "unit_00", "unit_01", ..."""
    return sorted(file.stem for file in (FOLDER / code).glob("unit_*.po"))


def has_entry(text: str, into: str) -> bool:
    """Whether the whole text is an entry, or has the form of one."""
    return _whole(text, catalogue(into), into) is not None


@functools.cache
def catalogue(code: str) -> Catalogue:
    """All entries of a language that have a translation; none if Babel is not installed."""
    texts: dict[str, str] = {}
    for file in sorted((FOLDER / code).glob("*.po")):
        texts |= {one_line(text): translation for text, translation in read_entries(file) if translation}
    forms = [form_of(text, translation) for text, translation in texts.items() if is_form(text)]
    forms.sort(key=lambda form: -len(PLACE.sub("", form.pattern.pattern)))
    return Catalogue(texts, tuple(forms))


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
    return bool(PLACE.search(text)) and len(re.findall(r"[^\W\d_]", PLACE.sub("", text))) >= FEWEST_LETTERS


def form_of(text: str, translation: str = "") -> Form:
    """The entry with places that a text is."""
    pieces = PLACE.split(one_line(text))  # literal, number, literal, ...
    named: set[str] = set()
    pattern = ""
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            pattern += re.escape(piece)
        elif piece in named:
            pattern += f"(?P=p{piece})"
        else:
            named.add(piece)
            pattern += f"(?P<p{piece}>.*?)"
    return Form(pieces[0], re.compile(pattern, re.DOTALL), translation)


def _whole(text: str, entries: Catalogue, into: str) -> str | None:
    line = one_line(text)
    if (found := entries.texts.get(line)) is not None and not PLACE.search(line):
        return found
    for form in entries.forms:
        if line.startswith(form.start) and (match := form.pattern.fullmatch(line)):
            return PLACE.sub(lambda place, found=match: _value(place, found, into), form.translation)  # type: ignore[misc]
    return None


def _value(place: re.Match[str], found: re.Match[str], into: str) -> str:
    """What stands in a place, translated; a place that the English text lacks stays as it is."""
    values = found.groupdict()
    return translate(values[f"p{place[1]}"], into) if f"p{place[1]}" in values else place[0]


def _by_sentences(text: str, entries: Catalogue, into: str) -> str:
    """Translate runs of sentences for which there is an entry, the longest first; the others stay as they are."""
    sentences = SENTENCE_END.split(text)
    if not 1 < len(sentences) <= MOST_SENTENCES:
        return text
    done: list[str] = []
    while sentences:
        for length in range(len(sentences), 0, -1):
            if length == len(sentences) and not done:
                continue  # the whole text, which has no entry
            found = _whole(" ".join(sentences[:length]), entries, into)
            if found is not None:
                done.append(found)
                break
        else:
            length = 1
            done.append(sentences[0])
        sentences = sentences[length:]
    return " ".join(done)
