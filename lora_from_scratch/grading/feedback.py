"""The learner's feedback page: nbgrader's own, with its pictures in it and the exercises named in its contents.

Whoever returns a page (`nbgrader release_feedback`, an upload, a mail) returns only this file.

`nbgrader submit` writes two files beside the notebook, in the learner's account. `release_feedback` stops at the first
learner for whom one of them is missing or unreadable, so `for_the_exchange` writes them beside the page.
"""

from __future__ import annotations

import base64
import hmac
import html
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from nbconvert.exporters import HTMLExporter

from lora_from_scratch.support.plain_text import one_line

# As written by nbgrader's template. No other link matches: `harmless` removes addresses that begin with "#".
SECRET, TIMESTAMP = "submission_secret.txt", "timestamp.txt"
OF_NBGRADER = re.compile(rb"[0-9a-f]{128}")
ENTRY = re.compile(r'(<a href="#(comment-|check-)?([\w.-]+)">)(?:Test cell|\w+ (?:free-)?response|Task|Comment)</a>')

PICTURE = re.compile(r'(?<=<img )([^<>]*?)\bsrc="([^":/\\<>]+)"')  # a file beside the notebook
LARGEST = 20_000_000  # bytes of all pictures of a page that are put into it


class FeedbackPage(HTMLExporter):
    """What `nbgrader generate_feedback` writes; course/nbgrader_config.py names it."""

    def from_notebook_node(self, nb: Any, resources: Any = None, **options: Any) -> tuple[str, dict[str, Any]]:
        page, resources = super().from_notebook_node(nb, resources, **options)
        folder = (resources.get("metadata") or {}).get("path")
        return ENTRY.sub(_entry, _with_pictures(page, Path(folder)) if folder else page), resources


def _with_pictures(page: str, folder: Path) -> str:
    """The page with the files of `folder` that it shows as pictures; a learner may have named and written them."""
    from lora_from_scratch.grading.autograded import LARGEST_PICTURE, PICTURES, read_small
    from lora_from_scratch.grading.harmless import picture

    room, known = LARGEST, {}

    def embed(found: re.Match[str]) -> str:
        nonlocal room
        name = unquote(html.unescape(found[2]))
        if name not in known:
            is_one = name.lower().endswith(PICTURES) and Path(name).name == name and "\0" not in name
            content = read_small(folder / name, LARGEST_PICTURE) if is_one else None
            known[name] = picture(base64.b64encode(content).decode()) if content else None
        made = known[name]
        if made is None or len(made[1]) > room:
            return found[0]
        room -= len(made[1])
        return f'{found[1]}src="data:{made[0]};base64,{made[1]}"'

    return PICTURE.sub(embed, page)


def _entry(found: re.Match[str]) -> str:
    link, kind, name = found.groups()
    return f"{link}{name}{': comment' if kind == 'comment-' else ''}</a>"


def for_the_exchange(handed_in: Path, course: Path, learner: str) -> dict[str, str]:
    """The files that `nbgrader release_feedback` needs, by name.

    The page's name in the exchange follows from the secret, which the learner's account has too. For work that came in
    another way, or with something else as its secret, it follows from the cohort's, and nobody fetches the page.
    """
    from lora_from_scratch.grading.autograded import LONGEST_TIMESTAMP, read_small
    from lora_from_scratch.grading.cohort import secret_of

    secret = (read_small(handed_in / SECRET, 200) or b"").strip()
    when = read_small(handed_in / TIMESTAMP, LONGEST_TIMESTAMP) or b""
    if not OF_NBGRADER.fullmatch(secret):
        said = f"feedback of {learner}, {handed_in.name}".encode()
        secret = hmac.new(secret_of(course).encode(), said, "sha512").hexdigest().encode()
    return {SECRET: secret.decode(), TIMESTAMP: one_line(when.decode(errors="replace"))}
