"""A LoRA on a model whose linear layers are quantised: what QLoRA, LoftQ, QA-LoRA and LQ-LoRA have in common.

A subclass says how the layers are quantised and, if A and B do not start as LoRA's, how they start.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from lora_from_scratch.methods.lora import LoRA, inject_lora
from lora_from_scratch.methods.placement import classifier, linear_layers
from lora_from_scratch.quantization.low_bit import LowBitTensor
from lora_from_scratch.quantization.low_bit_linear import LowBitLinear
from lora_from_scratch.quantization.nf4_linear import QuantizedLinear, quantized_layers
from lora_from_scratch.support.linear_layers import keep_called, weight_of
from lora_from_scratch.support.wrapped import unwrapped

# What an adapted model remembers beside its `Adaptation`, past nn.Module's own bookkeeping. So a layer that goes back
# is brought to the device and the dtype of the one that stands in its place.
DENSE = "dense_layers"  # the layers that `adapt` replaced, by name; None: thrown away (keep_base=False)
_QUANTIZED = "quantized_layers"  # while merged: the quantised layers


@dataclass(frozen=True)
class QuantizedLoRA(LoRA):
    """LoRA on a base that `adapt` quantises. Merging dequantises, because s B A does not fit into few bits.

    Args:
        keep_base: whether the full weights stay in memory for `undo`: as large as the model itself. `keep_base=False`
            saves that; then there is no way back (unless the model was quantised before).
    """

    keep_base: bool = True

    @abstractmethod
    def quantize(self, model: nn.Module) -> dict[str, nn.Module]:
        """Put quantised layers into the model, and return the layers that they replace, by name.

        Raises:
            ValueError: the model cannot be quantised as the method says. The model is then as it was.
        """

    def begin(self, model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
        """Change how A and B, and the quantised weights, start.

        Args:
            dense: what `quantize` returned.
        """

    def adapt(self, model: nn.Module) -> None:
        super().adapt(model)
        if not self.keep_base:
            record, present = self._adaptation(model), {id(p) for p in model.parameters()}
            record.base = {name: p for name, p in record.base.items() if id(p) in present}

    def undo(self, model: nn.Module) -> None:
        """Give the base model back, bit for bit.

        Raises:
            ValueError: `keep_base` is False and `adapt` threw the full weights away.
        """
        self._adaptation(model)
        if None in unwrapped(model).__dict__[DENSE].values():
            raise ValueError("nothing to go back to: keep_base=False kept no full weights; load the model anew")
        super().undo(model)

    def _install(self, model: nn.Module) -> None:
        dense = self.quantize(model)
        try:
            super()._install(model)
            with torch.no_grad():
                self.begin(model, dense)
        except BaseException:
            super()._uninstall(model)
            inject_lora(model, dense)
            raise
        model.__dict__[DENSE] = dense if self.keep_base else dict.fromkeys(dense)

    def _uninstall(self, model: nn.Module) -> None:
        super()._uninstall(model)
        dense = model.__dict__.pop(DENSE)
        model.__dict__.pop(_QUANTIZED, None)
        if not self._adaptation(model).merged:
            in_place = quantized_layers(model)
            inject_lora(model, {name: layer.to(in_place[name].like) for name, layer in dense.items()})
        else:  # merged, so wanted as it is: a plain model, to be trained like the base
            inject_lora(model, {name: layer.dense() for name, layer in quantized_layers(model).items()})
            flags = self._adaptation(model).required_grad
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags.get(name, True))

    def _merge(self, model: nn.Module) -> None:
        quantized = quantized_layers(model)
        model.__dict__[_QUANTIZED] = quantized
        inject_lora(model, {name: layer.dense() for name, layer in quantized.items()})
        super()._merge(model)

    def _unmerge(self, model: nn.Module) -> None:
        super()._unmerge(model)
        quantized = model.__dict__.pop(_QUANTIZED)
        inject_lora(model, {name: q.to(model.get_submodule(name).weight) for name, q in quantized.items()})

    def starts_as_base(self) -> bool | None:
        return False  # it starts as the quantised base

    def on_full_base(self) -> LoRA:
        return LoRA(**{f.name: getattr(self, f.name) for f in fields(LoRA)})


def quantize_linear_layers(model: nn.Module, quantize: Callable[[str, Tensor], LowBitTensor]) -> dict[str, nn.Module]:
    """Put a `LowBitLinear` in the place of every linear layer of a model but its output head.

    Args:
        quantize: makes a layer's name and its weight (out, in) a weight in few bits.

    Returns:
        The layers that were there, by name. Those that are quantised already stay, and are not among them.

    Raises:
        ValueError: a weight is not finite; the message names the layer. The model is then as it was.
    """
    kept = set() if (head := classifier(model)) is None else set(head.modules())
    found = linear_layers(model).items()
    dense = {name: layer for name, layer in found if layer not in kept and not isinstance(layer, QuantizedLinear)}
    quantized: dict[str, nn.Module] = {}
    for name, layer in dense.items():
        try:
            quantized[name] = LowBitLinear.in_place_of(layer, quantize(name, weight_of(layer)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    inject_lora(model, quantized)
    keep_called(model, quantized)
    return dense
