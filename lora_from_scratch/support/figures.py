"""Figures in a notebook: shown with alternative text, and with a slider where somebody is there to move it."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS = 110  # per inch
BUILDING = "LORA_FROM_SCRATCH_BUILD"  # set while the solved notebooks are executed: nobody is there


def show(figure: Figure, alt: str) -> None:
    """Show a figure as a PNG with alternative text, and close it.

    The picture is there twice: as `image/png`, with the text in its metadata, and as HTML with an `<img alt="...">`.
    JupyterLab 4.6 and nbconvert show the HTML, and do not take the text from the metadata.

    Args:
        alt: what a reader who does not see the figure has to know: the axes, and what the figure shows.

    Raises:
        ValueError: the alternative text is empty.
    """
    import matplotlib.pyplot
    from IPython.display import display

    if not alt.strip():
        raise ValueError("a figure needs alternative text: say what its axes are and what it shows")
    picture = _png(figure)
    matplotlib.pyplot.close(figure)
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    # A dark theme stays dark around it; the figure's own background is white.
    image = f'<img src="{source}" alt="{html.escape(alt)}" style="max-width: 100%; background: white;">'
    bundle = {"text/html": image, "image/png": picture, "text/plain": alt}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


def _png(figure: Figure) -> bytes:
    """The figure in at most 256 colours: a third of the bytes, and no eye sees it."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS, metadata={"Software": None})
    picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small = io.BytesIO()
    picture.save(small, format="png", optimize=True, dpi=(DOTS, DOTS))
    return small.getvalue()


def slider(draw: Callable[[Any], Figure], name: str, values: Sequence[Any], start: Any, alt: str) -> None:
    """Show `draw(value)` with a slider over the values; while notebooks are built, or without ipywidgets, at `start`.

    Args:
        draw: makes the figure of one value, in well under a second.
        name: what the slider says it is: "rank".
        start: the value that it begins with, one of `values`.
        alt: as in `show`.
    """
    widgets = None if os.environ.get(BUILDING) else _widgets()
    if widgets is None:
        show(draw(start), alt)
        return

    def update(**given: Any) -> None:
        show(draw(given[name]), alt)

    control = widgets.SelectionSlider(
        options=list(values),
        value=start,
        description=name,
        continuous_update=False,
        style={"description_width": "initial"},
        layout=widgets.Layout(width="min(36em, 100%)"),
    )
    widgets.interact(update, **{name: control})


def _widgets() -> Any:
    try:
        import ipywidgets
    except ImportError:  # without the course extra: the figure without its control
        return None
    return ipywidgets
