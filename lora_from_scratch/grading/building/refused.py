"""What the build refuses, and where it is."""

from __future__ import annotations

from collections.abc import Iterable


class Refused(ValueError):  # noqa: N818
    """A unit that is not fit to be released: one message for each thing that has to be mended.

    Attributes:
        problems: the messages, each with the file and the cell.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))
