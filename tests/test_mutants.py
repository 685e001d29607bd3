"""The mutants of `benchmarks/mutants.py` fit the library as it is now."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: f"{mutant.file}: {mutant.old}")
def test_a_mutants_text_occurs_once_in_its_file_and_its_tests_exist(mutant: Mutant) -> None:
    assert (ROOT / "lora_from_scratch" / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert all((ROOT / word).is_file() for word in mutant.tests.split() if word.endswith(".py"))
