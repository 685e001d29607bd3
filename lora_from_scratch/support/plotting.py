"""One style for all figures: labels on the lines instead of legends, readable in grey, the same bytes every time."""

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

# Colours that differ in lightness as well (a subset of Okabe and Ito 2008), each with a line of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

# Where a name may stand beside its point, the best first: offset in points, horizontal and vertical alignment.
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
    """Whatever `draw` makes has the style: matplotlib looks it up when a thing is made, each label and title anew."""

    @functools.wraps(draw)
    def in_style(*arguments: P.args, **keywords: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*arguments, **keywords)

    return in_style


@styled
def panels(columns: int, *, width: float = 5.2, height: float = 3.6) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels side by side, each of this size in inches, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


@styled
def label(axes: Axes, *, x: str, y: str = "", title: str = "") -> None:
    """What the axes show, and in the title what there is to see."""
    axes.set(xlabel=x, ylabel=y, title=title)


@styled
def curve(axes: Axes, values: Sequence[float], *, label: str, style: int, above: bool = True) -> None:
    """A line over 1, 2, 3, ... with its name at its end, above the line or below it."""
    steps = range(1, len(values) + 1)
    colour = COLOURS[style % len(COLOURS)]
    axes.plot(steps, values, LINES[style % len(LINES)], color=colour, linewidth=1.8)
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
def bars(axes: Axes, values: Mapping[str, float], *, unit: str) -> None:
    """Horizontal bars from the top down, each with its number; a line at 100 %."""
    names = list(values)
    places = range(len(names))
    axes.barh(places, list(values.values()), color=COLOURS[1], height=0.6)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    highest = max(118.0, 1.18 * max(values.values()))
    for place, value in zip(places, values.values(), strict=True):
        inside = 100 - 0.15 * highest < value < 100  # beside the bar it would cross the line
        beside: Any = {"xytext": (-4, 0), "ha": "right", "color": "white"} if inside else {"xytext": (4, 0)}
        axes.annotate(f"{value:.1f} {unit}", (value, place), textcoords="offset points", va="center", **beside)
    axes.axvline(100, color="0.4", linewidth=1, linestyle=":")
    axes.set_xlim(0, highest)


@styled
def points(axes: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """A point for each name at (x, y), with the name beside it where it hides nothing: no other name and no point.

    Call it last: where there is room depends on the scales and on the labels of the axes.
    """
    xs, ys = zip(*places.values(), strict=True)
    axes.scatter(xs, ys, s=36, color=COLOURS[0], zorder=3)
    axes.margins(x=0.12, y=0.12)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # now it is known where the points are, in pixels
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
        if abs(y) > NEAR:  # too far to be told: a line to the point
            axes.annotate("", place, xytext=(x, y), textcoords="offset points", arrowprops=LEADER)


def _box_around(x: float, y: float, radius: float = 6) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def smooth(values: Sequence[float], window: int = 15) -> list[float]:
    """The running mean of the last `window` values: a loss curve without its jitter."""
    smoothed = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        smoothed.append(sum(part) / len(part))
    return smoothed


@styled
def save(figure: Figure, path: Path, description: str | None = None) -> None:
    """As PNG, with a text for those who cannot see it, and without the version that would change its bytes."""
    figure.savefig(path, format="png", metadata={"Software": None, "Description": description})
