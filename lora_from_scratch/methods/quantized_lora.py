"""LoRA on a model whose linear layers are quantised: what QLoRA, LoftQ, QA-LoRA and LQ-LoRA have in common.

A subclass defines how the layers are quantised and, if it differs from LoRA's, how A and B are initialised.
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

# Attributes of an adapted model beside its `Adaptation`. They are not registered as submodules and `model.to` does not
# move them, so a layer that is put back is first moved to the device and dtype of the layer that it replaces.
DENSE = "dense_layers"  # the layers that `adapt` replaced, by name; None: discarded (keep_base=False)
_QUANTIZED = "quantized_layers"  # while merged: the quantised layers


@dataclass(frozen=True)
class QuantizedLoRA(LoRA):
    """LoRA on a base that `adapt` quantises. Merging dequantises, because s B A does not fit into few bits.

    Args:
        keep_base: whether the full weights stay in memory for `undo`. They take as much memory as the model itself.
            With False they are discarded, and `undo` is possible only if the model was quantised before `adapt`.
    """

    keep_base: bool = True

    @abstractmethod
    def quantize(self, model: nn.Module) -> dict[str, nn.Module]:
        """Quantise the layers of the model in place, and return the layers that were replaced, by name.

        Raises:
            ValueError: the model cannot be quantised with this method's settings. It is then unchanged.
        """

    def begin(self, model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
        """Initialise A and B, and if necessary the quantised weights, differently from LoRA.

        Args:
            dense: what `quantize` returned.
        """

    def adapt(self, model: nn.Module) -> None:
        super().adapt(model)
        if not self.keep_base:
            record, present = self._adaptation(model), {id(p) for p in model.parameters()}
            record.base = {name: p for name, p in record.base.items() if id(p) in present}

    def undo(self, model: nn.Module) -> None:
        """Restore the base model, bit for bit.

        Raises:
            ValueError: `keep_base` is False and `adapt` discarded the full weights.
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
        else:  # merged: the dequantised layers stay, and are as trainable as the base's were
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


def layers_to_quantize(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model by name, without its output head and those that are already quantised."""
    kept = set() if (head := classifier(model)) is None else set(head.modules())
    found = linear_layers(model).items()
    return {name: layer for name, layer in found if layer not in kept and not isinstance(layer, QuantizedLinear)}


def quantize_linear_layers(model: nn.Module, quantize: Callable[[str, Tensor], LowBitTensor]) -> dict[str, nn.Module]:
    """Replace every linear layer of a model except its output head by a `LowBitLinear`.

    Args:
        quantize: quantises a weight (out, in), given the layer's name and the weight.

    Returns:
        The layers that were replaced, by name. Layers that were already quantised are left alone.

    Raises:
        ValueError: a weight is not finite; the message names the layer. The model is then unchanged.
    """
    dense = layers_to_quantize(model)
    quantized: dict[str, nn.Module] = {}
    for name, layer in dense.items():
        try:
            quantized[name] = LowBitLinear.in_place_of(layer, quantize(name, weight_of(layer)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    inject_lora(model, quantized)
    keep_called(model, quantized)
    return dense
