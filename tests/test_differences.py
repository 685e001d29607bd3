"""Two executions of a notebook are compared: text to the letter, pictures by what is seen."""

from __future__ import annotations

import base64
from typing import Any

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest

from lora_from_scratch.grading.building.assemble import Cell
from lora_from_scratch.grading.building.differences import differences, same_picture
from lora_from_scratch.support.figures import _png
from lora_from_scratch.support.plotting import panels


def curve(bend: float = 1.0, noise: float = 0.0) -> str:
    figure, (axes,) = panels(1)
    x = np.linspace(0, 1, 200)
    axes.plot(x, x**bend + noise * np.sin(1e6 * x))
    made = base64.b64encode(_png(figure)).decode()
    plt.close(figure)
    return made


def shown(*outputs: Any, volatile: bool = False) -> tuple[list[Cell], Any]:
    made = nbformat.v4.new_code_cell("x", outputs=list(outputs))
    return [Cell("code", "x", "cell 1", volatile=volatile)], nbformat.v4.new_notebook(cells=[made])


def stream(text: str) -> Any:
    return nbformat.v4.new_output("stream", text=text)


def result(**data: str) -> Any:
    return nbformat.v4.new_output("execute_result", {kind.replace("_", "/"): text for kind, text in data.items()})


def display(picture: str, alt: str = "a line") -> Any:
    html = f'<img src="data:image/png;base64,{picture}" alt="{alt}">'
    return nbformat.v4.new_output("display_data", {"text/html": html, "image/png": picture})


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ([stream("loss 1.23\n")], [stream("loss 1.23\n")], None),
        ([stream("one\nloss 1.23\n")], [stream("one\nloss 1.24\n")], "before: 'loss 1.23'; now: 'loss 1.24'"),
        ([stream("one\n")], [stream("one\ntwo\n")], "before: None; now: 'two'"),
        ([stream("one")], [], "it has other outputs: 1 before, 0 now"),
        ([result(text_plain="1.0")], [result(text_plain="2.0")], "before: '1.0'; now: '2.0'"),
        ([result(text_html="<b>1</b>")], [result(text_html="<i>1</i>")], "before: '<b>1</b>'; now: '<i>1</i>'"),
    ],
)
def test_text_is_compared_to_the_letter(one: list[Any], other: list[Any], said: str | None) -> None:
    cells, before = shown(*one)
    assert differences(cells, before, shown(*other)[1]) == ([f"cell 1: {said}"] if said else [])


def test_what_a_volatile_cell_puts_out_is_not_compared() -> None:
    cells, before = shown(stream("12 ms"), volatile=True)
    assert differences(cells, before, shown(stream("13 ms"))[1]) == []


def test_a_picture_may_differ_by_what_rounding_does_and_by_no_more() -> None:
    line = curve()
    assert same_picture(line, curve())
    assert same_picture(line, curve(noise=1e-6))
    assert not same_picture(line, curve(bend=1.05))
    cells, before = shown(display(line))
    assert differences(cells, before, shown(display(curve(noise=1e-6)))[1]) == []
    assert differences(cells, before, shown(display(curve(bend=1.05)))[1]) == ["cell 1: the picture has changed"]
    assert len(differences(cells, before, shown(display(line, alt="another"))[1])) == 1


LINES = "".join(f"line {letter}: loss 1.25, {letter}\n" for letter in "abcdefghijklmnopqrst")


@pytest.mark.parametrize(
    ("now", "same"),
    [
        (LINES, True),
        (LINES.replace("1.25", "1.3e-02"), True),
        (LINES.replace(", a", ", another story"), True),
        (LINES.replace(", a", ", another").replace(", b", ", story").replace(", c", ", altogether"), False),
        (LINES.replace("loss", "gain"), False),
        (LINES[:100], False),
    ],
)
def test_on_another_processor_numbers_may_differ_and_one_line_in_ten(now: str, same: bool) -> None:
    cells, before = shown(stream(LINES), display(curve()))
    after = shown(stream(now), display(curve(bend=2)))[1]
    assert (differences(cells, before, after, same_processor=False) == []) == same
    assert differences(cells, before, after) != []  # the picture at least


def test_on_another_processor_every_output_has_to_be_there() -> None:
    cells, before = shown(stream(LINES), display(curve()))
    assert differences(cells, before, shown(stream(LINES))[1], same_processor=False) != []
