"""The units whose exercises were gone through sentence by sentence; the stricter tests of checks hold for these.

For the others they are expected to fail. A unit that passes all of them is added here.
"""

from __future__ import annotations

import pytest

UNITS = ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13", "14")


def expected_to_fail(unit: str) -> list[pytest.MarkDecorator]:
    """The marks of a test that a unit which was not gone through may still fail; only `make test-all` tries it."""
    return (
        [] if unit in UNITS else [pytest.mark.xfail(reason=f"unit {unit} was not gone through yet"), pytest.mark.slow]
    )
