"""The error that the build raises when a unit is not fit to be released."""

from __future__ import annotations

from collections.abc import Iterable


class Refused(ValueError):  # noqa: N818
    """A unit that is not fit to be released: one message for each problem to fix.

    Attributes:
        problems: the messages, each with the file and the cell.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))
