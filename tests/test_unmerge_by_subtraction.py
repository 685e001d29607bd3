"""The exhibit of unit 15: what its fault does, and that its test tells the faulty layer from the mended one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lora_from_scratch.checks.unit_15.versions import FAULTY, SOUND
from lora_from_scratch.museum import unmerge_by_subtraction as exhibit


def made(kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    layer = kind(40, 30, rank=4, scaling=2.0)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_changes_the_frozen_weight_of_the_faulty_layer_only(dtype: torch.dtype) -> None:
    for kind, same in ((exhibit.FaultyMergingLinear, False), (exhibit.MergingLinear, True)):
        layer = made(kind, dtype)
        W = layer.weight.detach().clone()
        layer.eval()
        layer.train()
        assert torch.equal(layer.weight, W) is same


def test_the_fault_is_done_after_the_first_evaluation_unless_the_change_grows() -> None:
    layer = made(exhibit.FaultyMergingLinear)
    layer.eval()
    layer.train()
    once = layer.weight.detach().clone()
    for _ in range(50):
        layer.eval()
        layer.train()
    assert int((layer.weight != once).sum()) <= 0.02 * once.numel()


def test_the_faulty_layer_returns_nothing_and_the_mended_one_itself() -> None:
    faulty, mended = made(exhibit.FaultyMergingLinear), made(exhibit.MergingLinear)
    assert faulty.eval() is faulty.train() is None
    assert mended.eval() is mended.train() is mended


@pytest.mark.parametrize("kind", [exhibit.FaultyMergingLinear, exhibit.MergingLinear])
def test_both_modes_compute_the_same(kind: Any) -> None:
    layer, x = made(kind), torch.randn(5, 40)
    expected = F.linear(x, layer.weight + 2.0 * layer.lora_B @ layer.lora_A, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer.eval()
    torch.testing.assert_close(layer(x), expected)


def test_the_test_passes_for_sound_layers_and_fails_for_faulty_ones() -> None:
    for kind in (exhibit.MergingLinear, *SOUND.values()):
        exhibit.test_merging_linear(kind)
    for kind in (exhibit.FaultyMergingLinear, *FAULTY.values()):
        with pytest.raises(AssertionError):
            exhibit.test_merging_linear(kind)
