"""An answer of the bank that is the reference with a few pieces of its source changed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from lora_from_scratch.checks.bank import changed
from lora_from_scratch.compare.capstone.budget import over_budget
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.quantization.nf4_linear import FourBitProduct
from lora_from_scratch.quantization.quantized_tensor import quantize_4bit


def test_a_changed_function_does_what_its_source_says_and_the_reference_stays_as_it_is() -> None:
    @changed(over_budget, ("cost[name] > limit", "cost[name] >= limit"))
    def limit_is_too_much() -> Any: ...

    assert limit_is_too_much({"a": 1}, {"a": 1}) == ["a"]
    assert over_budget({"a": 1}, {"a": 1}) == []
    assert inspect.getsource(limit_is_too_much) == inspect.getsource(over_budget).replace("] > limit", "] >= limit")


def test_it_has_the_name_and_the_module_of_the_bank() -> None:
    @changed(over_budget, ("cost[name] > limit", "cost[name] >= limit"))
    def limit_is_too_much() -> Any: ...

    @changed(FourBitProduct, ("return F.linear(x, W, bias)", "return F.linear(x, W)"))
    class WithoutTheBias: ...

    made: list[Any] = [limit_is_too_much, WithoutTheBias]
    assert [one.__name__ for one in made] == ["limit_is_too_much", "WithoutTheBias"]
    assert [one.__module__ for one in made] == [__name__, __name__]


def test_several_pieces_and_several_methods_of_a_class_can_be_changed() -> None:
    @changed(FourBitProduct, ("F.linear(x, W, bias)", "F.linear(x, W)"), (".sum(dim=0)", ".mean(dim=0)"))
    class TwoMistakes: ...

    product: Any = TwoMistakes
    weight = quantize_4bit(torch.randn(3, 4))
    x, bias = torch.randn(2, 4), torch.ones(3, requires_grad=True)
    y = product.apply(x, bias, weight)
    assert torch.equal(y, x @ weight.dequantize().T)
    (grad,) = torch.autograd.grad(y, bias, torch.ones(2, 3))
    assert torch.equal(grad, torch.ones(3))
    assert "F.linear(x, W)" in inspect.getsource(product.forward)


def test_a_changed_class_can_call_the_constructor_above_it() -> None:
    @changed(LoRALinear, ("lora_scaling(rank, alpha, rslora)", "lora_scaling(rank, 2 * alpha, rslora)"))
    class TwiceTheAlpha: ...

    layer: Any = TwiceTheAlpha
    assert layer(torch.nn.Linear(4, 3), rank=2, alpha=5).scaling == 5


@pytest.mark.parametrize(("old", "times"), [("no such text", 0), ("cost", None)])
def test_a_piece_that_does_not_occur_exactly_once_is_refused(old: str, times: int | None) -> None:
    times = inspect.getsource(over_budget).count(old) if times is None else times
    said = f"wrong_piece changes '{old}', which must occur exactly once .* of over_budget; it occurs {times} times"
    with pytest.raises(ValueError, match=said):

        @changed(over_budget, (old, "x"))
        def wrong_piece() -> None: ...
