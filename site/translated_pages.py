"""The site's own pages in another language: which parts of them are text, and the pages with these parts translated."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from lora_from_scratch.support.translated_notebook import has_prose
from lora_from_scratch.support.translation import translate

VERBATIM = re.compile(r"```(?!\{glossary\})\w*(\{toctree\})?")  # the beginning of a block whose lines are no text
TITLED = re.compile(r"(:{3,}\{grid-item-card\} |:caption: )(.+)")
MARKUP = re.compile(r"^(:|```|@|\s*$)")
TOCTREE = re.compile(r"```\{toctree\}\n.*?\n```\n*", re.DOTALL)
CARD = re.compile(r":link: ([\w/]+)\n:link-type: doc")


def texts_in(page: str) -> Iterator[str]:
    """What is translated of a page: headings, paragraphs, titles of cards, entries of the glossary, rows of tables."""
    return (piece for is_text, piece in _pieces(page) if is_text)


def translated_page(page: str, language: str) -> str:
    """A page in another language."""
    return "".join(translate(piece, language) if is_text else piece for is_text, piece in _pieces(page))


def with_pages(page: str, there: Collection[str]) -> str:
    """The page without the tables of contents that list nothing of this language's site; cards lead to English pages.

    Args:
        there: the pages of this language ("units").
    """

    def kept(tree: re.Match[str]) -> str:
        lines = tree[0].rstrip().splitlines()
        entries = [line for line in lines[1:-1] if line and not line.startswith(":")]
        if not any(entry in there or "*" in entry for entry in entries):
            return ""
        return "\n".join(line for line in lines if line not in entries or line in there or "*" in line) + "\n\n"

    def linked(card: re.Match[str]) -> str:
        return card[0] if card[1] in there else f":link: ../{card[1]}.html\n:link-type: url"

    return CARD.sub(linked, TOCTREE.sub(kept, page))


def _pieces(page: str) -> Iterator[tuple[bool, str]]:
    """The page in pieces, each with whether it is text."""
    text: list[str] = []
    verbatim = False
    for line in page.splitlines():
        titled = TITLED.fullmatch(line)
        fence = VERBATIM.fullmatch(line)
        single = bool(titled or fence or verbatim or MARKUP.match(line) or line.startswith(("#", "|")))
        if text and single:
            yield from ((True, "\n".join(text)), (False, "\n"))
            text = []
        if titled:
            yield from ((False, titled[1]), (True, titled[2]), (False, "\n"))
        elif single:
            yield (not verbatim and not MARKUP.match(line) and has_prose(line), line)
            yield (False, "\n")
        else:
            text.append(line)
        verbatim = not verbatim if fence else verbatim
    if text:
        yield from ((True, "\n".join(text)), (False, "\n"))
