"""Notebooks in another language: the same cells with translated prose.

Markdown is translated block by block (a paragraph, a list, a table), and so are the docstrings of the functions that
a learner writes, since they are the exercises' statements. All other code stays as it is.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import inspect
import re
import textwrap
import unicodedata
from collections.abc import Iterator
from typing import Any

from lora_from_scratch.support.translation import translate

FENCE = re.compile(r"^\s*(```|~~~)")
NOT_PROSE = re.compile(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|https?://\S+|\]\([^)]*\)", re.DOTALL)
WIDTH = 100  # columns of a docstring
# What a line is made of: code, a word, or a character, with the punctuation marks that follow it.
PIECE = re.compile(r"(?:`[^`]*`|[\x21-\x7e]+|\s+|.)[，。；：？！、）”》]*\s*")
CHOOSE = """\
from lora_from_scratch.checks import set_language

set_language("{language}")"""


def translated(notebook: dict[str, Any], language: str) -> dict[str, Any]:
    """A copy of a notebook (its JSON) in another language, whose checks speak that language too."""
    made = copy.deepcopy(notebook)
    for cell in made["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = translated_markdown(source, language)
        elif is_exercise(cell):
            source = translated_docstrings(source, language)
        else:
            continue
        cell["source"] = source.splitlines(keepends=True)
        if "checksum" in cell.get("metadata", {}).get("nbgrader", {}):
            cell["metadata"]["nbgrader"]["checksum"] = checksum(cell)
    made["cells"].insert(_place(made["cells"]), _chooses(language))
    return made


def wrapped(line: str, width: int) -> str:
    """A line of Chinese as lines of at most this many columns, where a Chinese character takes two.

    Words and code are not divided, and no line begins with a punctuation mark. The following lines of an
    argument or an item are indented further than its name.
    """
    indent = line[: len(line) - len(line.lstrip())]
    hanging = indent + " " * (2 if line.lstrip().startswith("- ") else 4 if indent else 0)
    lines, columns = [indent], len(indent)
    for piece in PIECE.findall(line.strip()):
        wide = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in piece.rstrip())
        if columns + wide > width and lines[-1].strip():
            lines.append(hanging)
            columns = len(hanging)
            piece = piece.lstrip()
        lines[-1] += piece
        columns += wide + len(piece) - len(piece.rstrip())
    return "\n".join(one.rstrip() for one in lines)


def texts_of(notebook: dict[str, Any]) -> Iterator[str]:
    """The blocks of a notebook that have a translation, in its order."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            found = blocks(source)
        elif is_exercise(cell):
            found = [block for text in docstrings(source) for block in blocks(cleaned(text))]
        else:
            continue
        yield from (block for block in found if has_prose(block))


def translated_markdown(text: str, language: str) -> str:
    """Markdown with every block translated that has an entry."""
    return "\n\n".join(translate(block, language) if has_prose(block) else block for block in blocks(text))


def translated_docstrings(code: str, language: str) -> str:
    """Python code with the blocks of its docstrings translated."""
    lines = code.splitlines()
    for node in reversed(list(docstrings(code))):
        text = translated_markdown(cleaned(node), language).replace("\\", "\\\\")
        text = "\n".join(wrapped(line, WIDTH - node.col_offset) for line in text.split("\n"))
        quoted = f'"""{text}\n"""' if "\n" in text else f'"""{text}"""'
        end = node.end_lineno or node.lineno
        lines[node.lineno - 1 : end] = textwrap.indent(quoted, " " * node.col_offset).splitlines()
    return "\n".join(lines)


def docstrings(code: str) -> Iterator[ast.Constant]:
    """The docstrings of the functions and classes of a cell, from top to bottom."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    owners = [node for node in ast.walk(ast.parse(code)) if isinstance(node, kinds) and ast.get_docstring(node)]
    yield from sorted((owner.body[0].value for owner in owners), key=lambda node: node.lineno)  # type: ignore[attr-defined]


def cleaned(docstring: ast.Constant) -> str:
    """A docstring without its indentation."""
    return inspect.cleandoc(str(docstring.value))


def blocks(text: str) -> list[str]:
    """The blocks of a Markdown text: what blank lines separate, outside fenced code."""
    found: list[list[str]] = [[]]
    fenced = False
    for line in text.strip("\n").split("\n"):
        fenced ^= bool(FENCE.match(line))
        if line.strip() or fenced:
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


def has_prose(block: str) -> bool:
    """Whether there are words outside code, formulas and addresses."""
    return bool(re.search(r"[^\W\d_]{2,}", NOT_PROSE.sub(" ", block)))


def is_exercise(cell: dict[str, Any]) -> bool:
    """Whether it is the cell in which a learner writes an answer to an exercise."""
    return cell["cell_type"] == "code" and cell.get("metadata", {}).get("nbgrader", {}).get("solution") is True


def checksum(cell: dict[str, Any]) -> str:
    """nbgrader's checksum of a cell, by which it knows whether the cell was changed after the release."""
    about = cell["metadata"]["nbgrader"]
    said = [about["grade"], about["solution"], about["locked"], about["grade_id"]]
    said += [float(about["points"])] if about["grade"] else []
    text = "".join(cell["source"]) + cell["cell_type"] + "".join(map(str, said))
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _place(cells: list[dict[str, Any]]) -> int:
    """Before the first code cell that needs the library, which on Google Colab the cell before it installs."""
    needs = (index for index, cell in enumerate(cells) if "import check" in "".join(cell["source"]))
    return next(needs, 1)


def _chooses(language: str) -> dict[str, Any]:
    """The cell that chooses the language of the checks."""
    source = CHOOSE.format(language=language).splitlines(keepends=True)
    cell: dict[str, Any] = {
        "cell_type": "code",
        "execution_count": None,
        "id": "language",
        "metadata": {},
        "outputs": [],
    }
    return cell | {"source": source}
