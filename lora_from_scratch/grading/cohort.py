"""The cohort's secret, and the seeds of the inputs that follow from it.

A learner's own check draws fresh inputs every time. In grading everybody of a cohort gets the same ones, which nobody
knows before: they follow from a secret that lies in the course's folder, made at the first use. The secret itself never
leaves this module: it is stretched first (a person may have chosen a word), and every exercise gets a seed of its own.
A seed that a learner's code prints tells nothing of the others.
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
LEAST = 8  # characters of a secret that a person chooses
SALT = b"lora-from-scratch, the cohort's seeds"
COST = 2**16  # of scrypt: 64 MiB and about a fifth of a second for each word that is tried


def secret_of(course: Path, chosen: str | None = None) -> str:
    """The secret of the cohort whose course lies in this folder; made and written when there is none yet.

    Args:
        course: the folder that `cohort.json` lies in.
        chosen: a secret to use from now on, for instance that of a second machine which grades the same cohort.

    Raises:
        ValueError: the file is not what was written, or the chosen secret is too short or another one than the file's.
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
        raise ValueError(f'{path} is damaged: it should hold {{"secret": "..."}}; restore it from a copy, or delete it')
    if chosen is not None and chosen != found:
        raise ValueError(
            f"{path} holds another secret than the one that you gave: what was graded with it would not be comparable. "
            "Delete the file to begin a new cohort"
        )
    return found


def seed_of(secret: str, unit: str, name: str) -> int:
    """The seed of an exercise's inputs, 24 bits: the same for the whole cohort, and told by nothing but the secret."""
    digest = hmac.new(_stretched(secret), json.dumps([unit, name]).encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:3], "big")


@functools.cache
def _stretched(secret: str) -> bytes:
    """A key, at some cost: who knows a few seeds should not be able to try all words that a person might choose."""
    return hashlib.scrypt(secret.encode(), salt=SALT, n=COST, r=8, p=1, maxmem=2 * 128 * 8 * COST, dklen=32)


def _create(path: Path, secret: str) -> None:
    """Readable by the owner only, whole from the beginning; whoever comes second takes what the first has written."""
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
