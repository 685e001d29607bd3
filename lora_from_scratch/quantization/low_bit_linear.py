"""A linear layer whose weight is stored in 2, 3, 4 or 8 bits."""

from __future__ import annotations

from torch import nn

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.quantization.fast_nf4 import CHUNK
from lora_from_scratch.quantization.low_bit import LowBitTensor
from lora_from_scratch.quantization.nf4_linear import QuantizedLinear
from lora_from_scratch.support.linear_layers import is_conv1d
from lora_from_scratch.support.tape import Tape, TensorSize


class LowBitLinear(QuantizedLinear):
    """A linear layer with a frozen `LowBitTensor` as its weight."""

    quantized: LowBitTensor

    @classmethod
    def in_place_of(cls, layer: nn.Module, quantized: LowBitTensor) -> LowBitLinear:
        """The layer with this weight, and the bias of the other one, which it shares."""
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        return cls(quantized, bias, type(layer) if is_conv1d(layer) else nn.Linear).train(layer.training)

    def extra_repr(self) -> str:
        q = self.quantized
        return f"{super().extra_repr()}, bits={q.bits}, group_size={q.group_size}"


# --- What it keeps for the backward pass ---------------------------------------------------------------


@activations.forward.register
def _(module: LowBitLinear, x: TensorSize, tape: Tape) -> TensorSize:
    x = tape.cast(x, 2) if tape.autocast else x
    n, columns = module.in_features * module.out_features, module.in_features
    on_the_way_to_W = min(n, max(CHUNK, columns)) * 16  # words, codes, values and scales of some rows
    scratch = n * x.width + max(0, on_the_way_to_W - x.nbytes)
    return tape.add([x], TensorSize(x.rows, module.out_features, x.width), trained=[module.bias], scratch=scratch)
