"""The cohort's secret, and the seeds derived from it.

A learner's own check draws fresh inputs every time. In grading, everybody in a cohort gets the same inputs, which
nobody knows beforehand: they are derived from a secret that is created at the first use and kept in the course folder.
The secret is stretched first (a person may have chosen a word), and every exercise has its own seed, so a seed that a
learner's code prints reveals nothing about the others.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path

FILE = "cohort.json"
LEAST = 8  # minimum number of characters in a secret chosen by a person
SALT = b"lora-from-scratch, the cohort's seeds"
COST = 2**16  # of scrypt: 64 MiB and about a fifth of a second per guess


def secret_of(course: Path, chosen: str | None = None) -> str:
    """The secret of the cohort of this course; created and written if there is none yet.

    Args:
        course: the folder that contains `cohort.json`.
        chosen: the secret to use, for instance that of another machine that grades the same cohort.

    Raises:
        ValueError: the file is damaged, or the chosen secret is too short or differs from the file's.
    """
    path = course / FILE
    if chosen is not None and len(chosen) < LEAST:
        raise ValueError(f"a cohort's secret needs at least {LEAST} characters, got {len(chosen)}")
    if not path.exists():
        _create(path, chosen or secrets.token_hex(16))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["secret"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, str) or len(found) < LEAST:
        raise ValueError(
            f'{path} is damaged: it should contain {{"secret": "..."}}; restore it from a copy, or delete it'
        )
    if chosen is not None and chosen != found:
        raise ValueError(
            f"{path} contains a different secret from the one given, so the results would not be comparable. "
            "Delete the file to start a new cohort"
        )
    return found


def seed_of(secret: str, unit: str, name: str) -> int:
    """The 24-bit seed of an exercise's inputs: the same for the whole cohort, and derived only from the secret."""
    digest = hmac.new(_stretched(secret), json.dumps([unit, name]).encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:3], "big")


@functools.cache
def _stretched(secret: str) -> bytes:
    """A key that is costly to derive, so that a few known seeds do not allow guessing a word chosen as the secret."""
    return hashlib.scrypt(secret.encode(), salt=SALT, n=COST, r=8, p=1, maxmem=2 * 128 * 8 * COST, dklen=32)


def _create(path: Path, secret: str) -> None:
    """Create the file atomically, readable only by the owner; if another process is first, its file is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps({"secret": secret}) + "\n")
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
