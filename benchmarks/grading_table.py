"""grading.md: the tables of the benchmarks of grading, each with the date, the machine and its load."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

OUTPUT = Path(__file__).with_name("grading.md")
HEAD = """\
# Grading: speed and memory

Written by the commands below with `--write`. A load average above zero at the start means that other programs were
using the processors, so the times are not those of a quiet machine.
"""


class Section:
    """A section of grading.md. Create it before measuring: it notes the load at the start.

    Args:
        title: its heading; a section with the same heading is replaced.
        module: the module that measures, as in `python -m`.
    """

    def __init__(self, title: str, module: str) -> None:
        self.title, self.lines = title, list[str]()
        options = shlex.join(word for word in sys.argv[1:] if word != "--write")
        self.command = f"python -m {module} {options}".strip()
        self.about = f"{datetime.now(UTC):%Y-%m-%d}, {machine()}; load average at the start {os.getloadavg()[0]:.2f}"

    def add(self, *lines: str) -> None:
        """Print lines, and keep them for the file."""
        self.lines += lines
        print(*lines, sep="\n", flush=True)

    def write(self) -> None:
        """Write grading.md, with this section in the place of an earlier one."""
        old = OUTPUT.read_text(encoding="utf-8") if OUTPUT.exists() else ""
        found = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", old, re.MULTILINE | re.DOTALL)
        sections = {title: text.strip("\n") for title, text in found}
        about = f"`{self.command}`, {self.about}; {os.getloadavg()[0]:.2f} at the end."
        sections[self.title] = "\n".join((about, "", *self.lines))
        made = [HEAD, *(f"## {title}\n\n{text}\n" for title, text in sorted(sections.items()))]
        OUTPUT.write_text("\n".join(made), encoding="utf-8")


def machine() -> str:
    """The number of processors that this process may use, and their model."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return f"{count} processors" + (f" ({models[0]})" if models else "")


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
