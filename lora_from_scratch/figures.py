"""Figures in a notebook: shown with alternative text, and with a slider where somebody is there to move it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUILDING = "LORA_FROM_SCRATCH_BUILD"  # set while the solved notebooks are executed: nobody is there


def show(figure: Figure, alt: str) -> None:
    """Show a figure as a PNG with alternative text, and close it.

    Args:
        alt: what a reader who does not see the figure has to know: the axes, and what the figure shows.

    Raises:
        ValueError: the alternative text is empty.
    """
    import matplotlib.pyplot
    from IPython.display import display

    if not alt.strip():
        raise ValueError("a figure needs alternative text: say what its axes are and what it shows")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    matplotlib.pyplot.close(figure)
    bundle = {"image/png": buffer.getvalue(), "text/plain": alt}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


def slider(draw: Callable[[Any], Figure], name: str, values: Sequence[Any], start: Any, alt: str) -> None:
    """Show `draw(value)` with a slider over the values; while the notebooks are built, at its start only.

    Args:
        draw: makes the figure of one value, in well under a second.
        name: what the slider says it is: "rank".
        start: the value that it begins with, one of `values`.
        alt: as in `show`.
    """
    if os.environ.get(BUILDING):
        show(draw(start), alt)
        return
    import ipywidgets

    def update(**given: Any) -> None:
        show(draw(given[name]), alt)

    control = ipywidgets.SelectionSlider(options=list(values), value=start, description=name, continuous_update=False)
    ipywidgets.interact(update, **{name: control})
