"""One style for all figures: labels on the lines instead of legends, readable in grey, the same bytes every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that differ in lightness as well (a subset of Okabe and Ito 2008), each with a line of its own.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.size": 10,
    "svg.hashsalt": "lora-from-scratch",
}


def panels(columns: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels side by side, without a display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * columns, 3.6), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


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


def bars(axes: Axes, values: Mapping[str, float], *, unit: str) -> None:
    """Horizontal bars from the top down, each with its number; a line at 100 %."""
    names = list(values)
    places = range(len(names))
    axes.barh(places, list(values.values()), color=COLOURS[1], height=0.6)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    for place, value in zip(places, values.values(), strict=True):
        axes.annotate(f"{value:.1f} {unit}", (value, place), xytext=(4, 0), textcoords="offset points", va="center")
    axes.axvline(100, color="0.4", linewidth=1, linestyle=":")
    axes.set_xlim(0, max(118.0, 1.18 * max(values.values())))


def smooth(values: Sequence[float], window: int = 15) -> list[float]:
    """The running mean of the last `window` values: a loss curve without its jitter."""
    smoothed = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        smoothed.append(sum(part) / len(part))
    return smoothed


def save(figure: Figure, path: Path) -> None:
    """As PNG, without the date and the version that would change its bytes."""
    figure.savefig(path, format="png", metadata={"Software": None})
