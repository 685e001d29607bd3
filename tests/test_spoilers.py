"""Nothing above a prediction gives its answer away: no text, picture, alternative text or docstring."""

from __future__ import annotations

import ast
import re

import pytest

from lora_from_scratch.checks.exercise import Prediction
from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.grading.building.assemble import Cell, assemble
from tests.test_first_screen import NO_STATEMENT, NUMBER, given_away, source_of, words

CITATION = re.compile(r"\b[A-Z]\w+(?: et al\.| and [A-Z]\w+)?,? \(?\d{4}[^).;]*|\(\d{4}[^)]*\)|\bsection \d[\d.]*")
IN_A_ROW = 5  # so many of the explanation's words in a row are a statement
# Read by a person: what is said before the prediction is not its answer.
LOOKED_AT = {
    "a combination of the others",  # what makes rows dependent
    "the attention to the prompt",  # a name
    "attention to the prompt which",
    "has no effect at all",  # that some bias has none, not which
    "no effect at all and",
    "is in memory at a",  # one layer's weight, not how much all of them are
    "in memory at a time",
    "127",  # the largest 8-bit integer
}


def strings(cell: Cell) -> list[str]:
    """What a learner reads in a cell: Markdown; or the strings, docstrings and comments of code."""
    if cell.kind == "markdown":
        return [cell.text]
    nodes = ast.walk(ast.parse(cell.text))
    comments = re.findall(r"#.*", cell.text)
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)] + comments


def before(unit: Unit, prediction: Prediction) -> str:
    """All text above the question."""
    cells = assemble(unit, source_of(unit))
    place = next(i for i, cell in enumerate(cells) if (cell.role, cell.name) == ("prediction", prediction.name))
    text = "\n".join(text for cell in cells[: place - 1] for text in strings(cell))
    return CITATION.sub(" ", NO_STATEMENT.sub(" ", text))


def told(prediction: Prediction, text: str) -> set[str]:
    """What of the answer the text tells: the right choice, the number to two digits, or a piece of the explanation."""
    asked = f"{prediction.question} {' '.join(prediction.choices.values())}"
    explained = CITATION.sub(" ", prediction.explanation)
    long = [n for n in re.findall(NUMBER, explained) if len(n.strip("0.,").replace(".", "").replace(",", "")) > 2]
    found = {number for number in long if number in re.findall(NUMBER, text) and number not in asked}
    if prediction.choices:
        found |= set(given_away(prediction, text))
    elif prediction.answer != 1:
        close = f"{float(prediction.answer):.2g}"
        numbers = [float(number.replace(",", "")) for number in re.findall(NUMBER, text)]
        found |= {close for number in numbers if number and f"{number:.2g}" == close}
    row = words(explained).split()
    for start in range(len(row) - IN_A_ROW + 1):
        piece = " ".join(row[start : start + IN_A_ROW])
        if f" {piece} " in f" {words(text)} " and piece not in words(asked):
            found.add(piece)
    return found - LOOKED_AT


@pytest.mark.parametrize(
    ("unit", "prediction"), [pytest.param(unit, item, id=item.name) for unit in units() for item in unit.predictions]
)
def test_nothing_above_a_prediction_tells_its_answer(unit: Unit, prediction: Prediction) -> None:
    assert told(prediction, before(unit, prediction)) == set()


def test_what_tells_an_answer_is_found() -> None:
    asked = ("size", "Which of these?", "b", "It is max(i, j) / n, so 1,536.", "an idea")
    choice = Prediction(*asked, {"a": "neither", "b": "LoRA, by far"})
    assert told(choice, "0 if orthogonal, about max(i, j) / n for two random ones") == {"max i j / n"}
    assert told(choice, "Lora, by far!") == {"lora by far"}
    assert told(choice, "one in 1,536") == {"1,536"}
    number = Prediction("bytes", "How many bytes?", 38.5, "Because.", "memory", within=1.25)
    assert told(number, "that is 38 bytes, not 40") == {"38"}
