"""A share of a list of named tasks, for one of several machines."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Shard `number` of `count`, counted from 1.

    The shard of a task depends only on the task's name, so every task is in exactly one shard, whatever other tasks
    there are.
    """

    number: int
    count: int

    def holds(self, name: str) -> bool:
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


EVERYTHING = Shard(1, 1)


def parse_shard(text: str) -> Shard:
    """Parse a shard such as "3/16".

    Raises:
        ValueError: the text is not a valid shard.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"--shard should look like 3/16, the third of sixteen, got {text!r}")
    return Shard(int(number), int(count))
