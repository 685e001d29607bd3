"""The first screen of a unit gives no prediction away; exercises are numbered in the order of the notebook."""

from __future__ import annotations

import ast
import re

import pytest

from lora_from_scratch.checks.exercise import Prediction
from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.grading.building.assemble import assemble
from lora_from_scratch.grading.building.source import SourceCell, read_source
from tests.tiny_course import ROOT

NO_STATEMENT = re.compile(  # times, formulas, and names with numbers in them
    r"\*\*Time\*\*[^\n]*|\$\$.*?\$\$|\$[^$]*\$|\b[Uu]nits? \d\d(?:(?:,| and| to) \d\d)*"
    r"|unit_\d\d\.png|arXiv:[\d.]+|https?://\S+|GPT-\d|\b\d+[- ]bits?\b",
    re.DOTALL,
)
NUMBER = r"(?<![\w.])\d(?:[\d,]*\d)?(?:\.\d+)?(?![\w.]*\d)"


def source_of(unit: Unit) -> list[SourceCell]:
    return read_source(ROOT / "course" / "units" / f"unit_{unit.number}.py")


def first_screen(unit: Unit, source: list[SourceCell]) -> str:
    """All Markdown before the first exercise or prediction, and the text in the picture that it shows."""
    first = next(i for i, cell in enumerate(source) if cell.get("exercise") or cell.get("prediction"))
    prose = [cell.text for cell in source[:first] if cell.kind == "markdown"]
    picture = next(cell.text for cell in source if cell.get("figure") == f"unit_{unit.number}.png")
    drawn = [
        node.value
        for node in ast.walk(ast.parse(picture))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return "\n".join([NO_STATEMENT.sub(" ", text) for text in [*prose, *drawn]])


def given_away(prediction: Prediction, text: str) -> list[str]:
    """What in the text answers the prediction: a number within the accepted ratio, or a phrase of the right choice.

    Single digits do not count, since they are mostly numbers of sections, steps and layers.
    """
    if not prediction.choices:
        numbers = [number for number in re.findall(NUMBER, text) if len(number) > 1]
        return [number for number in numbers if prediction.right(float(number.replace(",", "")))]
    right = prediction.choices[str(prediction.answer)]
    phrases = [re.sub(r"^(the|a|an|it) ", "", words(phrase)) for phrase in re.split(r"[:;]", right)]
    return [phrase for phrase in phrases if " " in phrase and f" {phrase} " in f" {words(text)} "]


def words(text: str) -> str:
    return " ".join(re.findall(r"[\w/'%-]+", text.lower()))


@pytest.mark.parametrize("unit", units(), ids=lambda unit: unit.number)
def test_the_first_screen_gives_no_prediction_away(unit: Unit) -> None:
    text = first_screen(unit, source_of(unit))
    told = {item.name: given_away(item, text) for item in unit.predictions}
    assert {name: found for name, found in told.items() if found} == {}


@pytest.mark.parametrize("unit", units(), ids=lambda unit: unit.number)
def test_exercises_are_numbered_in_the_order_of_the_notebook(unit: Unit) -> None:
    text = "\n".join(cell.text for cell in assemble(unit, source_of(unit)))
    numbers = [int(number) for number in re.findall(rf"^### Exercise {int(unit.number)}\.(\d+): ", text, re.MULTILINE)]
    assert numbers == list(range(1, len(unit.exercises) + 1))


def test_an_answer_on_the_first_screen_is_found() -> None:
    number = Prediction("bytes", "How many bytes?", 38.5, "Because.", "memory", within=1.25)
    assert given_away(number, "LoRA saves 40 megabytes; the model has 1,234 parameters.") == ["40"]
    choice = Prediction("size", "Which?", "b", "Because.", "size", {"a": "neither", "b": "LoRA, by far: it is narrow"})
    assert given_away(choice, "A picture: *LoRA*, by far, has the larger change.") == ["lora by far"]
    assert given_away(choice, "Which is larger?") == []
