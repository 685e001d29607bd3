"""Make untrusted text safe to show.

Names, error messages and values come from learners. A terminal obeys control characters, a spreadsheet runs a cell that
starts like a formula, and HTML and Markdown have tags and links. All such text goes through `plain` before it is shown,
or through one of the functions below, which use `plain`.
"""

from __future__ import annotations

import html
import re

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
NOT_SHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters except tab and newline
    "\u2028\u2029"  # line and paragraph separators
    "\u202a-\u202e\u2066-\u2069"  # controls for the direction of text
    "\ufdd0-\ufdef\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f"  # noncharacters and invisible characters
    "\ud800-\udfff]"  # surrogates, which UTF-8 cannot encode
)
FORMULA = re.compile(r"(^|;)(\s*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])")  # ";" separates cells where "," is decimal
CODE = re.compile(r"`([^`]+)`")
MARKUP = re.compile(r"[\\`\[\]$]")  # special characters of Markdown and mathematics renderers


def plain(text: str) -> str:
    """The text with `\N{REPLACEMENT CHARACTER}` for every character that would be obeyed rather than shown."""
    return NOT_SHOWN.sub(REPLACEMENT, text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """`plain`, on one line."""
    return " ".join(plain(text).split())


def table_cell(text: str) -> str:
    """`one_line` for a cell of a CSV file: text that a spreadsheet would read as a formula gets an apostrophe."""
    return FORMULA.sub(r"\1\2'", one_line(text))


def in_html(text: str) -> str:
    """`one_line` for HTML. Text in backticks becomes code."""
    return CODE.sub(r"<code>\1</code>", html.escape(one_line(text)))


def in_markdown(text: str) -> str:
    """`one_line` for Markdown, escaped so that HTML, mathematics and links stay plain text. `a` stays code."""
    made = ""
    for place, part in enumerate(CODE.split(one_line(text))):
        if place % 2:  # the text that CODE matched
            made += f"{' ' * made.endswith('`')}`{part}`"
        else:
            made += MARKUP.sub(r"\\\g<0>", part.replace("&", "&amp;").replace("<", "&lt;"))
    return made
