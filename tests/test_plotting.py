"""Figures: the same bytes every time, every line and bar labelled where it is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from matplotlib.colors import to_rgb

from lora_from_scratch.pictures.grid import picture_grid
from lora_from_scratch.support import figures, plotting
from tests.helpers import REPOSITORY


def draw(path: Path) -> None:
    figure, (left, right) = plotting.panels(2)
    plotting.curve(left, [3.0, 2.0, 1.5], label="full", style=0)
    plotting.curve(left, [3.0, 2.5, 2.0], label="lora", style=1)
    plotting.label(left, x="training step", y="loss (nats per token)", title="Both learn")
    plotting.bars(right, {"seconds": 80.0, "BLEU": 101.0}, unit="%")
    plotting.save(figure, path, "Two curves fall.")


def test_the_same_figure_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        draw(tmp_path / name)
    first = (tmp_path / "one.png").read_bytes()
    assert first == (tmp_path / "two.png").read_bytes()
    assert first.startswith(b"\x89PNG\r\n")
    assert b"Matplotlib" not in first  # no version that changes the bytes
    assert b"Description\0Two curves fall." in first  # for those who cannot see it


def test_a_title_is_bold_and_on_the_left_whenever_it_is_written() -> None:
    axes: Any
    _, (axes,) = plotting.panels(1)
    plotting.label(axes, x="step", title="What there is to see")
    assert axes.get_title(loc="left") == "What there is to see"
    assert axes.get_title(loc="center") == ""
    assert axes._left_title.get_fontweight() == "bold"


@pytest.mark.parametrize("seed", range(3))
def test_names_beside_points_hide_neither_each_other_nor_a_point(seed: int) -> None:
    axes: Any
    figure, (axes,) = plotting.panels(1, width=7, height=4.4)
    rng = Random(seed)
    places = {f"method-{i}": (10 ** rng.uniform(3, 7), rng.uniform(20, 80)) for i in range(7)}
    places |= {"twin-one": (2e5, 80.0), "twin-two": (2e5, 79.8), "third": (1.5e5, 78.0)}
    axes.set_xscale("log")
    plotting.points(axes, places)
    figure.draw_without_rendering()
    names = [text for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in names] == list(places)
    boxes = [text.get_window_extent() for text in names]
    frame = figure.bbox
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes[:i]) == 0
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert not any(box.contains(*axes.transData.transform(place)) for place in places.values())


def test_a_curve_runs_over_the_steps_from_1_and_carries_its_name() -> None:
    axes: Any
    _, (axes,) = plotting.panels(1)
    plotting.curve(axes, [3.0, 2.0, 1.5], label="lora", style=0)
    (line,) = axes.get_lines()
    assert line.get_xydata().tolist() == [[1, 3.0], [2, 2.0], [3, 1.5]]
    assert [text.get_text() for text in axes.texts] == ["lora"]
    for style in range(len(plotting.LINES)):
        plotting.curve(axes, [1.0, 2.0], label="another", style=style)


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (Web Content Accessibility Guidelines 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return math.fsum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def as_shown(colour: Sequence[float], kind: str) -> list[float]:
    """The colour after the filter that a dark theme puts on a figure (CSS Filter Effects, "invert", "hue-rotate")."""
    if kind == "light":
        return list(colour)
    if kind == "picture":
        share = float(figures.DARK[kind].removeprefix("brightness(").rstrip(")"))
        return [share * c for c in colour]
    share = float(figures.DARK[kind].removeprefix("invert(").partition(")")[0])
    red, green, blue = (c * (1 - 2 * share) + share for c in colour)
    turned = (
        -0.574 * red + 1.43 * green + 0.144 * blue,
        0.426 * red + 0.43 * green + 0.144 * blue,
        0.426 * red + 1.43 * green - 0.856 * blue,
    )
    return [min(1.0, max(0.0, c)) for c in turned]


def test_curves_differ_in_lightness_and_in_line_so_that_they_are_readable_in_grey() -> None:
    grey = sorted(luminance(to_rgb(colour)) for colour in plotting.COLOURS)
    assert all(dark < light for dark, light in pairwise(grey))
    assert len({str(line) for line in plotting.LINES}) == len(plotting.COLOURS)


@pytest.mark.parametrize("kind", ["light", *figures.DARK])
def test_text_has_a_contrast_of_four_and_a_half_and_marks_of_three_in_every_theme(kind: str) -> None:
    ground = as_shown((1.0, 1.0, 1.0), kind)
    for colour in (*plotting.COLOURS, "0.4"):
        least = 4.5 if kind != "picture" else 4.0  # a picture's text is black
        assert contrast(as_shown(to_rgb(colour), kind), ground) >= least, colour
    assert contrast(as_shown(to_rgb("0.5"), kind), ground) >= 3
    assert contrast(as_shown(to_rgb("black"), kind), ground) >= 7


def test_a_drawing_is_inverted_in_a_dark_theme_and_a_picture_is_not() -> None:
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.display.display", lambda bundle, **_: shown.append(bundle["text/html"]))
        for draw_on in (lambda a: a.plot([1, 2]), lambda a: a.imshow([[1, 2]]), lambda a: a.pcolormesh([[1, 2]])):
            figure, (axes,) = plotting.panels(1)
            draw_on(axes)
            figures.show(figure, "What it shows.")
    assert ["figure-drawing" in page.split("<img")[1] for page in shown] == [True, False, False]
    assert all('[data-jp-theme-light="false"]' in page for page in shown)


@pytest.mark.parametrize("page", sorted((REPOSITORY / "course" / "units").glob("*.py")), ids=lambda page: page.stem)
def test_no_text_in_a_figure_of_a_unit_is_paler_than_that(page: Path) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():
        if re.search(r"\.(text|annotate)\(", line):
            assert all(float(grey) <= 0.45 for grey in re.findall(r'color="(0\.\d+)"', line)), line


def test_every_bar_carries_its_number_and_its_unit_and_stays_inside() -> None:
    axes: Any
    _, (axes,) = plotting.panels(1)
    plotting.bars(axes, {"seconds": 80.0, "memory": 250.0}, unit="%")
    assert [text.get_text() for text in axes.texts] == ["80.0 %", "250.0 %"]
    assert [bar.get_width() for bar in axes.patches] == [80.0, 250.0]
    assert axes.get_xlim()[1] > 250


@pytest.mark.parametrize("other", [1.0, 250.0])
@pytest.mark.parametrize("value", [0.0, 3.4, 50.0, 60.0, 82.0, 83.0, 95.2, 99.9, 100.0, 101.0])
def test_the_number_of_a_bar_does_not_cross_the_line_at_100(value: float, other: float) -> None:
    axes: Any
    figure, (axes,) = plotting.panels(1)
    plotting.bars(axes, {"seconds": value, "memory": other}, unit="%")
    figure.draw_without_rendering()
    box = axes.texts[0].get_window_extent()
    line = axes.transData.transform((100, 0))[0]
    assert not box.x0 < line < box.x1


def test_a_named_curve_carries_its_name_beside_the_point_that_is_asked_for() -> None:
    axes: Any
    _, (axes,) = plotting.panels(1)
    plotting.named_curve(axes, [4.0, 3.0, 2.5], "noise", at=2, offset=(8, 5), side="right", style=1, line=0)
    (line,), (name,) = axes.lines, axes.texts
    assert line.get_xydata().tolist() == [[1, 4], [2, 3], [3, 2.5]]
    assert line.get_linestyle() == plotting.LINES[0]
    assert (name.get_text(), name.xy, name.xyann) == ("noise", (2, 3.0), (8, 5))
    assert name.get_color() == line.get_color() == plotting.COLOURS[1]


def test_a_ranking_runs_from_top_to_bottom_with_a_value_beside_each_bar() -> None:
    axes: Any
    figure, (axes,) = plotting.panels(1)
    plotting.ranking(axes, {"right": 3.257, "wrong": 12.0}, digits=1, line=("guessing", 8.3))
    figure.draw_without_rendering()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["right", "wrong"]
    assert axes.yaxis.get_inverted()
    assert [text.get_text() for text in axes.texts] == ["3.3", "12.0", "guessing"]
    assert axes.lines[0].get_xdata()[0] == 8.3
    frame = axes.get_window_extent()
    for text in axes.texts:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0
        assert box.x1 <= frame.x1


@pytest.mark.parametrize("window", [1, 3, 100])
def test_smoothing_is_the_mean_of_the_last_values(window: int) -> None:
    values = [4.0, 2.0, 6.0, 0.0]
    expected = [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(4)]
    assert plotting.smooth(values, window) == pytest.approx(expected)
    assert plotting.smooth([]) == []


def test_a_grid_of_pictures_has_them_in_the_order_of_reading_with_frames() -> None:
    axes: Any
    _, (axes,) = plotting.panels(1)
    pictures = torch.arange(5.0)[:, None, None].expand(5, 2, 3) / 5
    picture_grid(axes, pictures, 2, title="five")
    drawn = torch.as_tensor(axes.images[0].get_array())
    assert drawn.shape == (3 * 4, 2 * 5)
    assert (drawn[5, 6:9] == 3 / 5).all()  # the second row, the second column
    assert (drawn[0] == 0.5).all()
    assert (drawn[9, 6:9] == 0).all()  # what is left of the last row
