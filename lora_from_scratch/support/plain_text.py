"""Text that came from somebody else, as it may be shown to a person.

Names, error messages and values come from learners. A terminal obeys control characters, a spreadsheet runs a cell that
begins like a formula, HTML and Markdown have tags and links. Every such text passes `plain` before it is shown, or one
of the functions below, which use it.
"""

from __future__ import annotations

import html
import re

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NOT_SHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters: all but tab and newline
    "\u2028\u2029"  # other ends of a line
    "\u202a-\u202e\u2066-\u2069"  # what turns the direction of the text after it
    "\ufdd0-\ufdef\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f"  # no characters, and invisible ones
    "\ud800-\udfff]"  # halves of characters, which cannot be written as UTF-8
)
FORMULA = re.compile(r"(^|;)(\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])")  # ";" parts cells where "," is the decimal point
CODE = re.compile(r"`([^`]+)`")
MARKUP = re.compile(r"[\\`\[\]$]")  # what Markdown or a renderer of mathematics reads as more than a character


def plain(text: str) -> str:
    """The text with `\N{REPLACEMENT CHARACTER}` in the place of every character that is obeyed rather than shown."""
    return NOT_SHOWN.sub(REPLACEMENT, text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """`plain`, on one line."""
    return " ".join(plain(text).split())


def table_cell(text: str) -> str:
    """`one_line`, for a cell of a CSV file: text that a spreadsheet would take for a formula gets an apostrophe."""
    return FORMULA.sub(r"\1\2'", one_line(text))


def in_html(text: str) -> str:
    """`one_line`, for HTML. What stands in backticks becomes code."""
    return CODE.sub(r"<code>\1</code>", html.escape(one_line(text)))


def in_markdown(text: str) -> str:
    """`one_line`, for Markdown: nothing of it is HTML, mathematics or a link with another text. `a` stays code."""
    made = ""
    for place, part in enumerate(CODE.split(one_line(text))):
        if place % 2:  # what CODE has matched
            made += f"{' ' * made.endswith('`')}`{part}`"
        else:
            made += MARKUP.sub(r"\\\g<0>", part.replace("&", "&amp;").replace("<", "&lt;"))
    return made
