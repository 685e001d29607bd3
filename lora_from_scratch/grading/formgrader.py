"""Patch nbgrader's formgrader: learners' names cannot inject code into its pages, and its pages are up to date."""

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


def read_gradebook_anew() -> None:
    """Make the formgrader read the gradebook again for each request.

    The formgrader keeps one database session as long as its server runs. Without this, its pages can show the scores
    and marks that the session read earlier, although `grade` has since written others (nbgrader's issue 1250).
    nbgrader_config.py calls this function as it calls `escape_names`.
    """
    base = sys.modules.get(MODULE)
    handler = getattr(base, "BaseHandler", None)
    if handler is None or hasattr(handler, "gradebook_is_read"):
        return
    gradebook = handler.gradebook.fget

    def read_anew(self: Any) -> Any:
        found = gradebook(self)
        if not self.gradebook_is_read:  # once in a request: a second time would lose what the request has changed
            self.gradebook_is_read = True
            found.db.rollback()  # ends the transaction, and with it everything that the session has read
        return found

    handler.gradebook_is_read = False
    handler.gradebook = property(read_anew)


def _escaped(value: Any) -> Any:
    """Escape texts, including those in a dict, and also backslashes, which are special in JavaScript strings."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    return html.escape(value).replace("\\", "&#92;") if isinstance(value, str) else value
