"""One style for all figures: direct labels instead of legends, readable in greyscale, reproducible byte for byte."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

P = ParamSpec("P")
R = TypeVar("R")

# Colours that also differ in lightness, each with its own line style: hues of Okabe and Ito (2008), darkened until text
# in them has a contrast of 4.5 on white, which the Web Content Accessibility Guidelines ask for (2.1, criterion 1.4.3).
COLOURS = ("#0072B2", "#C25500", "#006B4C", "#8A3A68", "#7A6A00", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

# Possible positions of a name relative to its point, in order of preference: offset in points, alignments.
NEAR = 20
AROUND = (
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    *(
        (x, sign * y, side, "center")
        for y in (11, 18, 30, 42)
        for sign in (1, -1)
        for x, side in ((0, "center"), (6, "left"), (-6, "right"))
    ),
)
LEADER: Any = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.8}

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 10,
    "svg.hashsalt": "lora-from-scratch",
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Apply the style inside `draw`: matplotlib reads it whenever an artist such as a label or title is created."""

    @functools.wraps(draw)
    def in_style(*arguments: P.args, **keywords: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*arguments, **keywords)

    return in_style


@styled
def panels(columns: int, *, width: float = 5.2, height: float = 3.6) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels side by side, each of this size in inches. No display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


@styled
def label(axes: Axes, *, x: str, y: str = "", title: str = "") -> None:
    """Set the labels of the axes, and a title that says what the figure shows."""
    axes.set(xlabel=x, ylabel=y, title=title)


@styled
def curve(axes: Axes, values: Sequence[float], *, label: str, style: int, above: bool = True) -> None:
    """Draw a line over 1, 2, 3, ... with its name at its end, above or below the line."""
    steps = range(1, len(values) + 1)
    colour = COLOURS[style % len(COLOURS)]
    axes.plot(steps, values, linestyle=LINES[style % len(LINES)], color=colour, linewidth=1.8)
    axes.annotate(
        label,
        (steps[-1], values[-1]),
        xytext=(4, 8 if above else -4),
        textcoords="offset points",
        color=colour,
        va="bottom" if above else "top",
        ha="right",
        fontweight="bold",
    )


@styled
def named_curve(
    axes: Axes,
    values: Sequence[float],
    name: str,
    *,
    at: int,
    offset: tuple[float, float],
    side: str,
    style: int,
    line: int | None = None,
) -> None:
    """Draw a line over 1, 2, 3, ... with its name beside one of its points.

    Args:
        at: the number of the point, from 1.
        offset: from the point to the name, in points, right and up.
        side: "left": the name begins there; "right": it ends there.
        style: the number of the colour.
        line: the number of the line's style; None: the same.
    """
    colour, dashes = COLOURS[style % len(COLOURS)], LINES[(style if line is None else line) % len(LINES)]
    axes.plot(range(1, len(values) + 1), values, linestyle=dashes, color=colour, linewidth=1.8)
    place: Any = {"xytext": offset, "textcoords": "offset points", "ha": side}
    axes.annotate(name, (at, values[at - 1]), color=colour, fontweight="bold", fontsize=9, **place)


@styled
def ranking(axes: Axes, values: Mapping[str, float], *, digits: int = 2, line: tuple[str, float] | None = None) -> None:
    """Draw horizontal bars from top to bottom, each with its value.

    Args:
        digits: the number of decimal places of the values.
        line: the name and the value of a dotted vertical line.
    """
    places = range(len(values))
    axes.barh(places, list(values.values()), color=COLOURS[0], height=0.6)
    axes.set_yticks(places, list(values))
    axes.set_ylim(len(values) - 0.4, -1)
    beside: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    for place, value in zip(places, values.values(), strict=True):
        axes.annotate(f"{value:.{digits}f}", (value, place), **beside)
    axes.set_xlim(0, 1.15 * max(*values.values(), line[1] if line else 0))
    if line:
        axes.axvline(line[1], color="black", linestyle=":")
        axes.annotate(line[0], (line[1], -0.75), **beside | {"xytext": (-4, 0), "ha": "right"})


@styled
def bars(axes: Axes, values: Mapping[str, float], *, unit: str) -> None:
    """Draw horizontal bars from top to bottom, each with its value, and a line at 100 %."""
    names = list(values)
    places = range(len(names))
    axes.barh(places, list(values.values()), color=COLOURS[1], height=0.6)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    highest = max(118.0, 1.18 * max(values.values()))
    for place, value in zip(places, values.values(), strict=True):
        inside = 100 - 0.15 * highest < value < 100  # beside the bar, the text would cross the line
        beside: Any = {"xytext": (-4, 0), "ha": "right", "color": "white"} if inside else {"xytext": (4, 0)}
        axes.annotate(f"{value:.1f} {unit}", (value, place), textcoords="offset points", va="center", **beside)
    axes.axvline(100, color="0.4", linewidth=1, linestyle=":")
    axes.set_xlim(0, highest)


@styled
def points(axes: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """Draw a point for each name at (x, y), with the name placed so that it covers no other name or point.

    Call this last: the free space depends on the scales and labels of the axes.
    """
    xs, ys = zip(*places.values(), strict=True)
    axes.scatter(xs, ys, s=36, color=COLOURS[0], zorder=3)
    axes.margins(x=0.12, y=0.12)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # fixes the positions of the points in pixels
    dots = [_box_around(*axes.transData.transform(place)) for place in places.values()]
    taken = list(dots)
    frame = axes.get_window_extent()
    for name, place in places.items():
        text = axes.annotate(name, place, xytext=(0, 0), textcoords="offset points", fontweight="bold")
        crowding = []
        for x, y, across, up in AROUND:
            text.set(position=(x, y), ha=across, va=up)
            box = text.get_window_extent()
            outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
            crowding.append(box.count_overlaps(taken) + 10 * outside)
        x, y, across, up = AROUND[crowding.index(min(crowding))]
        text.set(position=(x, y), ha=across, va=up)
        taken.append(text.get_window_extent())
        if abs(y) > NEAR:  # too far from its point: add a line
            axes.annotate("", place, xytext=(x, y), textcoords="offset points", arrowprops=LEADER)


def _box_around(x: float, y: float, radius: float = 6) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def smooth(values: Sequence[float], window: int = 15) -> list[float]:
    """The running mean of the last `window` values, to smooth a loss curve."""
    smoothed = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        smoothed.append(sum(part) / len(part))
    return smoothed


@styled
def save(figure: Figure, path: Path, description: str | None = None) -> None:
    """Save as PNG with a description, and without matplotlib's version, so that the bytes are reproducible."""
    figure.savefig(path, format="png", metadata={"Software": None, "Description": description})
