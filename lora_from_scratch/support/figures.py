"""Figures in a notebook, with alternative text, and with a slider where the notebook is used interactively."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS = 110  # per inch
# In JupyterLab's dark themes a drawing has light lines on a dark ground, in the same hues. A picture or heat map, in
# which lightness means something, is only dimmed. Elsewhere, and in notebooks that are not trusted, nothing changes.
DARK = {"drawing": "invert(0.93) hue-rotate(180deg)", "picture": "brightness(0.8)"}
DARK_STYLE = "".join(
    f'[data-jp-theme-light="false"] img.figure-{kind} {{filter: {change};}}' for kind, change in DARK.items()
)
BUILDING = "LORA_FROM_SCRATCH_BUILD"  # set while the solved notebooks are executed, without a user


def show(figure: Figure, alt: str) -> None:
    """Show a figure as a PNG with alternative text, and close it.

    The output contains the image twice: as `image/png`, with the text in its metadata, and as HTML with an
    `<img alt="...">`. JupyterLab 4.6 and nbconvert show the HTML; they do not use the text in the metadata.

    Args:
        alt: what a reader who cannot see the figure needs to know: the axes, and what the figure shows.

    Raises:
        ValueError: the alternative text is empty.
    """
    import matplotlib.pyplot
    from IPython.display import display

    if not alt.strip():
        raise ValueError("a figure needs alternative text: say what its axes are and what it shows")
    kind = "picture" if any(axes.images or _shades(axes) for axes in figure.axes) else "drawing"
    picture = _png(figure)
    matplotlib.pyplot.close(figure)
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    image = f'<img class="figure-{kind}" src="{source}" alt="{html.escape(alt)}"'
    image = f'<style>{DARK_STYLE}</style>{image} style="max-width: 100%; background: white;">'
    bundle = {"text/html": image, "image/png": picture, "text/plain": alt}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})


def _shades(axes: Axes) -> bool:
    """Whether the axes show a mesh of coloured cells, as a heat map does."""
    from matplotlib.collections import QuadMesh

    return any(isinstance(collection, QuadMesh) for collection in axes.collections)


def _png(figure: Figure) -> bytes:
    """The figure as a PNG with at most 256 colours: a third of the size, without a visible difference."""
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
        draw: makes the figure for one value, in well under a second.
        name: the slider's label, such as "rank".
        values: the values of the slider.
        start: the initial value, one of `values`.
        alt: as in `show`, for the figure at `start`. With another value the text says so.
    """
    widgets = None if os.environ.get(BUILDING) else _widgets()
    if widgets is None:
        show(draw(start), alt)
        return

    def update(**given: Any) -> None:
        value = given[name]
        show(draw(value), alt if value == start else f"The same figure for {name} {value}. For {name} {start}: {alt}")

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
    except ImportError:  # without the `course` extra: show the figure without a slider
        return None
    return ipywidgets
