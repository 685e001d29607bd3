"""What a translation must keep of its text: placeholders, code, formulas, links, structure, and the terminology."""

from __future__ import annotations

import functools
import re

from lora_from_scratch.support.translation import FOLDER, PLACE

CODE = re.compile(r"`[^`\n]+(?:\n[^`\n]+)?`")
# Backticks around places only are up to the translation: they say that the value is not translated.
VERBATIM = re.compile(r"`[{}\d=]+`")
FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]+(?:\n[^$\n]+)?\$", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PAPER = re.compile(r"arXiv:\d{4}\.\d{4,5}")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
CHINESE = re.compile(r"[\u4e00-\u9fff]")
WORD = re.compile(r"[A-Za-z]{2,}")
LONG_ENGLISH = re.compile(r"(?:\b[a-z][a-z'-]*\b[ ,]+){6,}[a-z]+")
BARE = re.compile(r"[\u4e00-\u9fff][,;?!](?=[\s\u4e00-\u9fff]|$)|[\u4e00-\u9fff]\.(?=\s|$)")


def wrong(text: str, translation: str, language: str = "zh") -> list[str]:
    """What is wrong with a translation, in words; empty if nothing is."""
    found = [_differs("places", PLACE, text, translation)]
    found += [_differs("code", CODE, text, translation), _differs("formulas", FORMULA, text, translation)]
    found += [_differs("links", LINK, text, translation), _differs("papers", PAPER, text, translation)]
    found += [_structure(text, translation), *_terms(text, translation, language)]
    plain = _prose(translation)
    if LONG_ENGLISH.search(plain):
        found.append(f"English is left: {LONG_ENGLISH.search(plain)[0]!r}")  # type: ignore[index]
    if BARE.search(plain):
        found.append(f"a Chinese sentence has an English punctuation mark: {BARE.search(plain)[0]!r}")  # type: ignore[index]
    return [problem for problem in found if problem]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _prose(text: str) -> str:
    return FORMULA.sub(" ", CODE.sub(" ", text))


def _differs(what: str, pattern: re.Pattern[str], text: str, translation: str) -> str:
    """What one of the two lacks; how often something occurs does not matter."""
    ours, theirs = (
        dict.fromkeys(found for found in map(_one_line, pattern.findall(one)) if not VERBATIM.fullmatch(found))
        for one in (text, translation)
    )
    lacking, extra = [one for one in ours if one not in theirs], [one for one in theirs if one not in ours]
    said = [f"without {', '.join(map(repr, lacking))}"] if lacking else []
    said += [f"with {', '.join(map(repr, extra))}"] if extra else []
    return f"other {what}: {' and '.join(said)}" if said else ""


def _structure(text: str, translation: str) -> str:
    for mark in (r"^#+ ", r"^\s*- ", r"^\s*\d+\. ", r"^\s*\|", r"^> ", r"^(?:Args|Returns|Raises|Attributes|Yields):$"):
        counts = [len(re.findall(mark, one, re.MULTILINE)) for one in (text, translation)]
        if counts[0] != counts[1]:
            return f"{counts[1]} lines begin with {mark!r} instead of {counts[0]}"
    return ""


def _terms(text: str, translation: str, language: str) -> list[str]:
    plain = " ".join(_prose(text).split())
    missing = []
    for term, pattern, allowed in terminology(language):
        if pattern.search(plain) and not any(one in translation for one in allowed):
            missing.append(f"{term!r} should be {' or '.join(allowed)}")
    return missing


@functools.cache
def terminology(language: str) -> tuple[tuple[str, re.Pattern[str], tuple[str, ...]], ...]:
    """The terms that have one translation, each with a pattern that finds it and what it is called."""
    lines = (FOLDER / language / "terminology.tsv").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if line]
    return tuple(
        (term, re.compile(rf"(?<![-\w]){re.escape(term)}s?(?![-\w])", re.IGNORECASE), tuple(called.split(" / ")))
        for term, called in pairs
    )
