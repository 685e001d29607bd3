"""What a linear layer is, whichever library it comes from: `nn.Linear`, and the Conv1D of GPT-2.

A Conv1D, ours or transformers', computes `x W + b` with W stored as (in, out); `nn.Linear` stores (out, in). Everywhere
else in this package weights are written (out, in).
"""

from __future__ import annotations

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear`, a Conv1D, or another layer with `in_features` and `out_features`.

    The output projection of `nn.MultiheadAttention` is not: PyTorch reads its weight and never calls it, so what is put
    in its place would have no effect.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return is_conv1d(module) or all(isinstance(getattr(module, name, None), int) for name in _FEATURES)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the weight is stored as (in, out). Recognised by the class's name, so that transformers is not needed."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2


def in_and_out(layer: nn.Module) -> tuple[int, int]:
    """How many features a linear layer takes and how many it returns."""
    if is_conv1d(layer):
        inputs, outputs = layer.weight.shape  # type: ignore[misc]
        return inputs, outputs
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), a view where it is stored the other way round."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight.T if is_conv1d(layer) else layer.weight


_FEATURES = ("in_features", "out_features")
