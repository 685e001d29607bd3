"""The sentences of an exercise's statement, which is the docstring of the library's object.

Every sentence either promises something, and then a case quotes it and fails when the promise is broken, or it
explains, and then the exercise lists it as background. Tests hold this for every exercise; a learner whose answer
fails in a case sees the sentence that it breaks.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from lora_from_scratch.checks.exercise import Exercise

SECTIONS = ("Args:", "Attributes:", "Returns:", "Yields:", "Raises:", "Example:", "Examples:")
TEXT = ("Returns:", "Yields:")  # sections without names at the beginning of their lines
ABBREVIATIONS = ("e.g.", "i.e.", "et al.", "eq.", "eqs.", "sec.", "fig.", "figs.", "vs.", "p.", "pp.")
END = re.compile(r"(?<=[.!?;])\s+|(?<=[.!?;][)\"'`])\s+")


def sentences(exercise: Exercise) -> list[str]:
    """The sentences of the statement, in its order, each on one line.

    A semicolon ends a sentence too, so that each half needs a case of its own. The headings of sections ("Args:") and
    doctest lines are left out. For a class the docstrings of the methods that a learner writes follow its own.
    """
    texts = [inspect.getdoc(exercise.object) or ""]
    if inspect.isclass(exercise.object):
        methods = ((name, method) for name, method in vars(exercise.object).items() if inspect.isfunction(method))
        written = (method for name, method in methods if not exercise.blank or name in exercise.blank)
        texts += [inspect.getdoc(method) or "" for method in written if method.__doc__]
    return [sentence for text in texts for item in _items(text) for sentence in _split(item)]


def quoted(exercise: Exercise, quote: str) -> str:
    """The sentence of the statement that contains these words.

    Raises:
        ValueError: no sentence contains them, or several do.
    """
    found = [sentence for sentence in sentences(exercise) if _one_line(quote) in sentence]
    if len(found) != 1:
        problem = "no sentence" if not found else f"{len(found)} sentences"
        raise ValueError(f"{exercise.name}: {problem} of the docstring contain the words {quote!r}; quote exactly one")
    return found[0]


def without_a_case(exercise: Exercise, seeds: Iterable[int] = (0,)) -> list[str]:
    """The sentences that no case quotes and that are not listed as background."""
    quotes = {quote for seed in seeds for case in exercise.inputs(seed) for quote in case.sentences}
    named = {quoted(exercise, quote) for quote in quotes | set(exercise.background)}
    return [sentence for sentence in sentences(exercise) if sentence not in named]


def _items(text: str) -> list[str]:
    """Paragraphs, items of lists and arguments, each on one line."""
    items: list[str] = []
    new, indent_of_item, named = True, 0, True
    for line in text.splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if not stripped or stripped in SECTIONS or stripped.startswith((">>>", "...")):
            new, named = True, named if not stripped else stripped not in TEXT
            continue
        starts = new or stripped.startswith("- ") or (named and indent_of_item >= indent > 0)
        if starts:
            items.append(stripped.removeprefix("- "))
            indent_of_item = indent
        else:
            items[-1] += " " + stripped
        new = False
    return items


def _split(item: str) -> list[str]:
    pieces: list[str] = []
    for piece in END.split(item):
        if pieces and (pieces[-1].endswith(ABBREVIATIONS) or _is_open(pieces[-1])):
            pieces[-1] += " " + piece
        else:
            pieces.append(piece)
    return [piece for piece in pieces if piece]


def _is_open(text: str) -> bool:
    """Whether a bracket or a backtick is still open: what ends there is no sentence."""
    return text.count("(") > text.count(")") or text.count("`") % 2 == 1


def _one_line(text: str) -> str:
    return " ".join(text.split())
