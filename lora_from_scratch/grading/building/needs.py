"""What a unit's solved notebook needs beside the course's own packages.

A unit's `exercises.py` may define `NEEDS`, names of packages in `constraints.txt`. Without them the notebook still runs
to its end, on a stand-in, but with other results: then it is not built, and its outputs are not compared.
"""

from __future__ import annotations

import importlib.metadata

from lora_from_scratch.checks.units import Unit, load, unit_files


def needs(unit: Unit) -> tuple[str, ...]:
    """The names of the packages; most units need none."""
    return tuple(
        name for file in unit_files("exercises.py", f"unit_{unit.number}") for name in getattr(load(file), "NEEDS", ())
    )


def missing(unit: Unit) -> list[str]:
    """Those that are not installed."""
    return [name for name in needs(unit) if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
