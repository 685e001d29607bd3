"""Docstrings, which are written as plain text with Markdown's backticks, as the reStructuredText that autodoc reads."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

BEFORE_NAPOLEON = 400  # which reads "Args:" and "Returns:" and has the priority 500
CODE = re.compile(r"``.+?``|`[^`]+`", re.DOTALL)
NAMED = re.compile(r"    \w+: ")
MARKUP = re.compile(r"([*|\\]|(?<=\w)_(?!\w))")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=BEFORE_NAPOLEON)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def process(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = restructured(with_returns(lines))


def with_returns(lines: list[str]) -> list[str]:
    """The section "Returns:" as a field, in which several named values are a list; Napoleon takes names for types."""
    if "Returns:" not in lines:
        return lines
    start = lines.index("Returns:")
    end = next((i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith("    ")), len(lines))
    section = [line for line in lines[start + 1 : end] if line]
    several = sum(bool(NAMED.match(line)) for line in section) > 1
    field = []
    for line in section:
        marker = "" if not several else "- " if NAMED.match(line) else "  "
        field.append(f"    {marker}{line.strip()}")
    return [*lines[:start], ":returns:", *field, "", *lines[end:]]


def restructured(lines: list[str]) -> list[str]:
    """Indented blocks become literal blocks; backticks are doubled; lists get blank lines; the rest is escaped."""
    made: list[str] = []
    text: list[str] = []  # of the current paragraph
    base = 0  # the indentation of the last line of text
    literal = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            made += [*escaped(text), ""]
            text = []
            continue
        if not text and made and not made[-1] and indent >= base + 4 and not literal:
            made += [" " * base + "::", ""]
            literal = True
        elif indent <= base:
            literal = False
        if literal:
            made.append(line)
            continue
        item = line.lstrip().startswith("- ")
        if item and text and not text[-1].lstrip().startswith("- ") and indent <= base:
            made += [*escaped(text), ""]
            text = []
        base = indent + 2 if item else indent
        text.append(line)
    return made + escaped(text)


def escaped(lines: list[str]) -> list[str]:
    """A paragraph with its code in double backticks, and no other markup."""
    text, made, end = "\n".join(lines), "", 0
    for code in CODE.finditer(text):
        made += MARKUP.sub(r"\\\1", text[end : code.start()]) + f"``{code[0].strip('`')}``"
        end = code.end()
    made += MARKUP.sub(r"\\\1", text[end:])
    return made.splitlines()
