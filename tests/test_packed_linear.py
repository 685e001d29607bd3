"""A layer whose weight is packed computes what the layer itself does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.serving.packed_linear import PackedLinear

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


def layer_of(kind: str, inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    layer: nn.Module = (
        Conv1D(inputs, outputs) if kind == "conv1d" else nn.Linear(inputs, outputs, bias=kind == "linear")
    )
    for parameter in layer.requires_grad_(False).parameters():
        parameter.normal_()
    return layer


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 72), (7, 13), (1, 5)])
@pytest.mark.parametrize("rows", [1, 5, 33, 200])
@pytest.mark.parametrize("packed", [pytest.param(True, marks=needs_onednn), False])
def test_the_result_is_that_of_the_layer(kind: str, inputs: int, outputs: int, rows: int, packed: bool) -> None:
    layer = layer_of(kind, inputs, outputs)
    with torch.backends.mkldnn.flags(enabled=packed):
        ours = PackedLinear.of(layer)
    assert (ours.packed is not None) == packed
    x = torch.randn(rows, inputs)
    torch.testing.assert_close(ours(x), layer(x))
    torch.testing.assert_close(ours(x[None]), layer(x[None]))


@needs_onednn
def test_a_weight_that_is_packed_is_not_kept_as_well() -> None:
    assert PackedLinear(torch.randn(8, 4)).weight is None


def test_what_has_no_packed_kernel_is_computed_as_usual() -> None:
    weight, x = torch.randn(8, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(PackedLinear(weight)(x), F.linear(x, weight))
