"""Patch nbgrader's formgrader so that learners' names cannot inject code into its pages."""

from __future__ import annotations

import functools
import html
import sys
from typing import Any

MODULE = "nbgrader.server_extensions.formgrader.base"


def escape_names() -> None:
    """Make the formgrader escape all values in its pages, because its templates insert names into HTML and JavaScript.

    Its server extension has no setting for this. nbgrader_config.py, which the extension reads at its start, calls this
    function; in other nbgrader commands it does nothing.
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
    """Escape texts, including those in a dict, and also backslashes, which are special in JavaScript strings."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    return html.escape(value).replace("\\", "&#92;") if isinstance(value, str) else value
