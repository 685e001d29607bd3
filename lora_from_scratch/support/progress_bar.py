"""tqdm's progress bars, for notebooks as well.

In a terminal nothing changes. In a notebook tqdm would write to standard error, which JupyterLab shows on red like an
error. Here the bar is an output of the cell that is updated in place: HTML, and text for other front ends. Unlike
`tqdm.auto` it needs no widgets, so a notebook that is saved and opened again shows how far the bar came.
"""

from __future__ import annotations

import html
import io
import sys
from typing import Any

from tqdm import tqdm as TerminalBar


def in_notebook() -> bool:
    """Whether a front end can show rich output; false in a terminal or a script."""
    if "IPython" not in sys.modules:
        return False
    shell: Any = sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class tqdm(TerminalBar):  # noqa: N801
    """`tqdm.tqdm` with the same arguments."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self._shown: Any = None  # the output's handle
        self._here = in_notebook() and keywords.get("file") is None
        if self._here:
            keywords["file"] = io.StringIO()  # for the parts of tqdm that write to the terminal
        super().__init__(*arguments, **keywords)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar's present state; an empty `msg` removes it."""
        if not self._here:
            super().display(msg, pos)
            return
        from IPython.display import display

        text = str(self) if msg is None else msg
        bundle = {"text/plain": text, "text/html": self._as_html() if text else ""}
        if self._shown is None:
            self._shown = display(bundle, raw=True, display_id=True)
        else:
            self._shown.update(bundle, raw=True)

    def _as_html(self) -> str:
        words = self.format_meter(**{**self.format_dict, "bar_format": "{l_bar}{r_bar}"}).replace("||", "").strip("| ")
        done = f'value="{self.n}" max="{self.total}"' if self.total else ""
        name = html.escape(self.desc.strip(": ") or "progress")
        return f'<progress {done} aria-label="{name}"></progress> <code>{html.escape(words)}</code>'
