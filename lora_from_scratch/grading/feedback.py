"""The learner's page of feedback: nbgrader's own, but its table of contents names the exercises."""

from __future__ import annotations

import re
from typing import Any

from nbconvert.exporters import HTMLExporter

# As nbgrader's template writes them. Nobody else's link has such an address: `harmless` takes out what begins with "#".
ENTRY = re.compile(r'(<a href="#(comment-|check-)?([\w.-]+)">)(?:Test cell|\w+ (?:free-)?response|Task|Comment)</a>')


class FeedbackPage(HTMLExporter):
    """What `nbgrader generate_feedback` writes; course/nbgrader_config.py names it."""

    def from_notebook_node(self, nb: Any, resources: Any = None, **options: Any) -> tuple[str, dict[str, Any]]:
        page, resources = super().from_notebook_node(nb, resources, **options)
        return ENTRY.sub(_entry, page), resources


def _entry(found: re.Match[str]) -> str:
    link, kind, name = found.groups()
    return f"{link}{name}{': comment' if kind == 'comment-' else ''}</a>"
