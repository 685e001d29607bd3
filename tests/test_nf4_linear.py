"""The 4-bit layer: its values and gradients against a dense layer and bitsandbytes, its memory, its state dict."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.quantization.nf4_linear import NF4Linear, quantize_in_parts
from lora_from_scratch.quantization.quantized_tensor import quantize_4bit

few = settings(max_examples=25, deadline=None)


@st.composite
def random_layers(draw: st.DrawFn) -> tuple[nn.Module, NF4Linear, Tensor]:
    """A random Linear or Conv1D, the same in four bits, and an input for them."""
    inputs, outputs = draw(st.integers(1, 70)), draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    layer: nn.Module = nn.Linear(inputs, outputs, bias=draw(st.booleans()))
    if draw(st.booleans()):
        layer = Conv1D(inputs, outputs)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    options = draw(st.sampled_from(["nf4", "fp4"])), draw(st.sampled_from([32, 64])), draw(st.booleans())
    shape = draw(st.lists(st.integers(1, 4), max_size=2))  # none: one vector
    return layer, NF4Linear.from_layer(layer, *options), torch.randn(*shape, inputs)


@given(random_layers())
@few
def test_a_layer_and_its_gradients_equal_those_of_a_dense_one_with_the_dequantised_weight(case: Any) -> None:
    layer, ours, x = case
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # (out, in)
    W = quantize_4bit(weight, ours.quantized.quant_type, ours.quantized.blocksize, ours.quantized.nested).dequantize()
    x_ours, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(x_ours), torch.einsum("oi,...i->...o", W, x_dense)
    if layer.bias is not None:
        expected = expected + layer.bias
        assert ours.bias is layer.bias
    grad = torch.randn(y.shape)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    both = [(x_ours, x_dense)] if layer.bias is None else [(x_ours, x_dense), (layer.bias, layer.bias)]
    for mine, other in zip(
        torch.autograd.grad(y, [pair[0] for pair in both], grad),
        torch.autograd.grad(expected, [pair[1] for pair in both], grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)


def test_the_gradient_of_x_equals_the_dense_layers_within_1e_6_at_the_size_of_a_real_layer() -> None:
    torch.manual_seed(0)
    layer = Conv1D(256, 768)
    nn.init.normal_(layer.weight, std=0.02)
    ours = NF4Linear.from_layer(layer)
    dense = ours.dense()
    x = torch.randn(2, 9, 256)
    x_ours, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(x_ours), dense(x_dense)
    grad = torch.randn(y.shape)
    y.backward(grad)
    expected.backward(grad)
    assert x_ours.grad is not None
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(x_ours.grad, x_dense.grad, atol=1e-6, rtol=1e-6)


def test_the_derivative_is_right_by_finite_differences() -> None:
    torch.manual_seed(0)
    layer = NF4Linear.from_layer(nn.Linear(5, 4))
    bias = nn.Parameter(torch.randn(4, dtype=torch.float64))
    layer.bias = bias
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: layer(x), (x, bias))


def test_autocast_decides_the_type_as_for_a_dense_layer_bit_for_bit() -> None:
    torch.manual_seed(0)
    ours = NF4Linear.from_layer(nn.Linear(40, 30))
    dense = ours.dense()
    x = torch.randn(3, 40)
    x_ours, x_dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = ours(x_ours), dense(x_dense)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert x_ours.grad is not None
    assert x_ours.grad.dtype == torch.float32
    assert torch.equal(x_ours.grad, x_dense.grad)  # type: ignore[arg-type]
    half = x.bfloat16()
    assert torch.equal(ours(half), ours.dense().bfloat16()(half))


def float_matrices(size: int) -> list[int]:
    """The live floating-point tensors with so many numbers."""
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    return [id(t) for t in found if t.is_floating_point() and t.numel() == size]


def test_nothing_dequantised_is_kept_for_the_backward_pass() -> None:
    layer = NF4Linear.from_layer(nn.Linear(48, 37))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for module, kept in ((layer, 0), (layer.dense(), 1)):  # the dense layer shows that the count can see a weight
        saved.clear()
        gc.collect()
        before = set(float_matrices(48 * 37))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = module(torch.randn(5, 48, requires_grad=True))
        gc.collect()
        assert len([t for t in saved if t.numel() == 48 * 37]) == kept
        assert not set(float_matrices(48 * 37)) - before - {id(t) for t in saved}
        y.sum().backward()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes_computes_the_same_from_our_state_dict_and_we_from_its(quant_type: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnb: Any = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = nn.Linear(128, 96)
    ours = NF4Linear.from_layer(layer, quant_type, 64, True)
    theirs = bnb.nn.Linear4bit(
        128, 96, compute_dtype=torch.float32, compress_statistics=True, quant_type=quant_type, quant_storage=torch.uint8
    )
    with torch.compiler.set_stance("force_eager"):
        theirs.load_state_dict(layer.state_dict())
        theirs = theirs.to("cpu").train()
        x = torch.randn(4, 128)
        x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours(x_ours), theirs(x_theirs)
        torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
        y.sum().backward()
        expected.sum().backward()
        state = dict(theirs.state_dict())
    assert x_ours.grad is not None
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-6, rtol=1e-6)
    assert state.keys() == ours.state_dict().keys()
    other = NF4Linear.from_layer(nn.Linear(128, 96), quant_type, 64, True)
    other.load_state_dict(state)
    assert torch.equal(other(x), ours(x))


def test_a_state_dict_goes_into_another_layer_and_a_foreign_one_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model, other = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    for sequence in (model, other):
        sequence[0], sequence[1] = NF4Linear.from_layer(sequence[0]), NF4Linear.from_layer(sequence[1])
    x = torch.randn(3, 8)
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    with pytest.raises(RuntimeError, match=r"0\.weight has shape \(4, 6\) instead of \(6, 8\)"):
        other.load_state_dict({name.replace("1.", "0."): t for name, t in model.state_dict().items() if name[0] == "1"})
    with pytest.raises(RuntimeError, match=r"1\.weight"):
        other.load_state_dict({name: t for name, t in model.state_dict().items() if name[0] == "0"})


def test_another_type_changes_the_bias_and_not_the_scales() -> None:
    layer = NF4Linear.from_layer(nn.Linear(64, 64))
    before = layer.quantized.dequantize()
    layer.to(torch.bfloat16)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.quantized.dequantize(), before)


@pytest.mark.parametrize("shape", [(200, 70), (65, 33), (64, 64), (1, 5), (3, 1)])
@pytest.mark.parametrize("double", [False, True])
def test_quantising_in_parts_equals_quantising_at_once_bit_for_bit(shape: tuple[int, int], double: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for blocksize in (32, 64):
        whole = quantize_4bit(weight, "nf4", blocksize, double).state_dict()
        for part in (1, 5000, 2**18):
            parts = quantize_in_parts(weight, "nf4", blocksize, double, part).state_dict()
            assert parts.keys() == whole.keys()
            assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    weight[-1, -1] = torch.inf
    with pytest.raises(ValueError, match=f"rows .* to {shape[0] - 1}: .*not finite.* inf at"):
        quantize_in_parts(weight, "nf4", 32, double, 1)


def test_only_a_matrix_of_a_known_type_and_block_size_becomes_a_layer() -> None:
    with pytest.raises(ValueError, match=r"matrix \(out, in\), got shape \(4,\)"):
        NF4Linear(quantize_4bit(torch.randn(4)))
    with pytest.raises(ValueError, match="quant_type must be one of nf4, fp4, got 'int4'"):
        NF4Linear.from_layer(nn.Linear(4, 4), "int4")
    with pytest.raises(ValueError, match=r"blocksize must be one of 32, .*, got 16"):
        NF4Linear.from_layer(nn.Linear(4, 4), blocksize=16)
