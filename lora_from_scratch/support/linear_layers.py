"""What a linear layer is, whichever library it comes from: `nn.Linear`, and the Conv1D of GPT-2.

A Conv1D, ours or transformers', computes `x W + b` with W stored as (in, out); `nn.Linear` stores (out, in). Everywhere
else in this package weights are written (out, in).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_from_scratch.support.wrapped import plain_name

CONV1D = "Conv1D"  # the name of both classes, so that transformers is not needed to recognise its own


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear`, a Conv1D, or another layer with `in_features` and `out_features`.

    The output projection of `nn.MultiheadAttention` is not: PyTorch reads its weight and never calls it, so what is put
    in its place would have no effect.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    return is_conv1d(module) or all(isinstance(getattr(module, name, None), int) for name in _FEATURES)


def is_conv1d(module: nn.Module) -> bool:
    """Whether the weight is stored as (in, out)."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == CONV1D and isinstance(weight, Tensor) and weight.ndim == 2


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


def dense(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as it is stored, to be changed.

    Raises:
        ValueError: it is not made of floating-point numbers.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(f"cannot merge into {layer}: its weight is not made of floating-point numbers")
    return weight


def linear_layer(kind: type[nn.Module], weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
    """A layer of this class, `nn.Linear` or a Conv1D, with this weight (out, in), frozen, and this very bias."""
    outputs, inputs = weight.shape
    conv1d = kind.__name__ == CONV1D
    in_init = inspect.signature(kind).parameters  # transformers' Conv1D calls the two sizes nf and nx
    sizes = {"nf": outputs, "nx": inputs} if "nf" in in_init else {"in_features": inputs, "out_features": outputs}
    with torch.device("meta"):  # shapes without memory
        layer = kind(**sizes)
    layer.weight = nn.Parameter(weight.T.contiguous() if conv1d else weight, requires_grad=False)
    layer.register_parameter("bias", bias)
    return layer


def refuse_tied(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Check that no other module of the model has the weight of one of these layers, and would change with it.

    Args:
        layers: by name, in the model; a LoRA's layer says that its base's weight is its own.

    Raises:
        ValueError: names the layer and the other place.
    """
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(plain_name(name))
    for name, layer in layers.items():
        others = [place for place in places.get(id(layer.weight), []) if not place.startswith(f"{name}.")]
        if isinstance(layer.weight, nn.Parameter) and others:
            raise ValueError(f"cannot merge into {name}: {others[0]} is the same tensor and would change with it")


def keep_called(model: nn.Module, names: Iterable[str]) -> None:
    """See to it that PyTorch's `nn.TransformerEncoderLayer` calls the modules that now stand at these places in it.

    In eval mode it reads the weights of its linear layers and calls none of them, unless one has a hook. So a module
    that was put there gets a hook, which does nothing and goes with the module.
    """
    for name in names:
        parent, _, child = name.rpartition(".")
        encoder_layer = model.get_submodule(parent)
        if isinstance(encoder_layer, nn.TransformerEncoderLayer):
            encoder_layer.get_submodule(child).register_forward_pre_hook(_do_nothing)


def _do_nothing(module: nn.Module, inputs: object) -> None:
    pass


_FEATURES = ("in_features", "out_features")
