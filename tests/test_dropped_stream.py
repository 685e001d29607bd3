"""The museum's LoReFT with dropout on the residual stream: what it does, and the test that finds it."""

from __future__ import annotations

import pytest
import torch

from lora_from_scratch.checks.unit_21 import edits
from lora_from_scratch.methods.loreft import reft_change
from lora_from_scratch.museum import dropped_stream


def test_the_exhibit_fails_the_test_of_the_museum_and_the_mended_edit_passes() -> None:
    dropped_stream.test_edit(dropped_stream.Edit)
    with pytest.raises(AssertionError, match="a change of zero changes h in training mode"):
        dropped_stream.test_edit(dropped_stream.FaultyEdit)


@pytest.mark.parametrize("kind", [dropped_stream.FaultyEdit, dropped_stream.Edit])
def test_in_evaluation_mode_both_are_the_edit_of_the_method(kind: type[dropped_stream.FaultyEdit]) -> None:
    torch.manual_seed(0)
    edit, h = kind(12, 3, 0.5).eval(), torch.randn(2, 5, 12)
    torch.testing.assert_close(edit(h), h + reft_change(h, edit.R, edit.W, edit.b))


def test_the_exhibit_drops_hidden_states_and_the_mended_edit_drops_changes() -> None:
    torch.manual_seed(0)
    h = torch.randn(1000, 8)
    zeros = {}
    for kind in (dropped_stream.FaultyEdit, dropped_stream.Edit):
        edit = kind(8, 2, 0.25)
        zeros[kind.__name__] = (float((edit(h) == 0).float().mean()), float((edit(h) == h).float().mean()))
    assert zeros["FaultyEdit"] == (pytest.approx(0.25, abs=0.02), 0)
    assert zeros["Edit"] == (0, pytest.approx(0.25, abs=0.02))


@pytest.mark.parametrize("name", sorted(edits.SOUND))
def test_the_sound_edits_of_the_check_pass(name: str) -> None:
    dropped_stream.test_edit(edits.SOUND[name])


@pytest.mark.parametrize("name", sorted(edits.FAULTY))
def test_the_faulty_edits_of_the_check_fail(name: str) -> None:
    with pytest.raises(AssertionError):
        dropped_stream.test_edit(edits.FAULTY[name])
