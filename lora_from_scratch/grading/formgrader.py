"""nbgrader's formgrader, as far as it has to be changed for learners that nobody trusts."""

from __future__ import annotations

import functools
import html
import sys
from typing import Any

MODULE = "nbgrader.server_extensions.formgrader.base"


def escape_names() -> None:
    """Have the formgrader escape what it puts into its pages, in whose templates a name is HTML and JavaScript.

    Its server extension has no setting for that. nbgrader_config.py, which it reads at its start, calls this; in other
    commands of nbgrader nothing happens.
    """
    base = sys.modules.get(MODULE)
    handler = getattr(base, "BaseHandler", None)
    if handler is None or getattr(handler.render, "escapes", False):
        return
    render = handler.render

    @functools.wraps(render)
    def escaped(self: Any, name: str, **values: Any) -> str:
        return render(self, name, **{key: _escaped(value) for key, value in values.items()})

    escaped.escapes = True  # type: ignore[attr-defined]
    handler.render = escaped


def _escaped(value: Any) -> Any:
    """Texts, also those in a dict; the backslash too, which ends a string of JavaScript's before its end."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    return html.escape(value).replace("\\", "&#92;") if isinstance(value, str) else value
