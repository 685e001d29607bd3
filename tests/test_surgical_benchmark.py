"""The page of `benchmarks.surgical` is what its stored results give."""

from __future__ import annotations

import json

from benchmarks.surgical import PAGE, RATES, RECORD, SEEDS, TUNING_SEEDS, page


def test_the_committed_page_is_written_from_the_committed_results() -> None:
    found = {(shift, choice): result for shift, choice, result in json.loads(RECORD.read_text(encoding="utf-8"))}
    assert page(found) == PAGE.read_text(encoding="utf-8")
    for result in found.values():
        assert len(result["test"]) == len(SEEDS)
        assert result["rate"] == RATES[result["validation"].index(max(result["validation"]))]
    assert not set(SEEDS) & set(TUNING_SEEDS)
