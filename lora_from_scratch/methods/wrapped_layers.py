"""Methods that put a layer around each of some linear layers and are not a `LoRA`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.methods.adapter_files import PREFIX
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.lora_peft import task_type_of
from lora_from_scratch.methods.method import Method, hyperparameter
from lora_from_scratch.methods.placement import find_targets
from lora_from_scratch.support.linear_layers import is_conv1d, keep_called, refuse_tied
from lora_from_scratch.support.tape import Tape, TensorSize
from lora_from_scratch.support.wrapped import plain_name


@dataclass(frozen=True)
class WrapsLayers(Method):
    """A method whose layers hold the linear layer that they adapt as `base` and can `merge` and `unmerge`.

    A subclass names the class of its layers and says how to make them.

    Raises:
        ValueError: there is no target, when it is made; or a target is not in the model or is a part of a fused layer,
            in `adapt`.
    """

    targets: Sequence[str] | str = hyperparameter(
        "all-linear", "the layers to adapt: all-linear, their names (c_attn, mlp.c_proj), or one regular expression"
    )

    layer: ClassVar[type[nn.Module]]

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise ValueError(f"targets must name at least one layer, got {self.targets!r}")

    @abstractmethod
    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The layers that take the places of these, by the same names."""

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """This method's layers in an adapted model, by the names of the layers that they adapt."""
        return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, self.layer)}

    def _install(self, model: nn.Module) -> None:
        plan = find_targets(model, self.targets)
        for name, parts in plan.items():
            if parts:
                raise ValueError(f"{self.name} adapts whole layers, got a part of {name}; give the layer as a target")
        layers = self.make_layers({name: model.get_submodule(name) for name in plan})
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        keep_called(model, layers)

    def _uninstall(self, model: nn.Module) -> None:
        for name, layer in self.layers(model).items():
            model.set_submodule(name, layer.base)

    def _merge(self, model: nn.Module) -> None:
        layers = self.layers(model)
        refuse_tied(model, layers)
        for layer in layers.values():
            layer.merge()

    def _unmerge(self, model: nn.Module) -> None:
        for layer in self.layers(model).values():
            layer.unmerge()

    def starts_as_base(self) -> bool | None:
        return True

    def peft_config(self, model: nn.Module, **fields: Any) -> dict[str, Any]:
        """The fields that PEFT has for every method of this kind, and these that differ from its defaults."""
        task_type = task_type_of(model)
        config: dict[str, Any] = {"peft_type": self.peft_type, **({"task_type": task_type} if task_type else {})}
        config["target_modules"] = self.targets if isinstance(self.targets, str) else list(self.targets)
        if any(is_conv1d(layer.base) for layer in self.layers(model).values()):
            config["fan_in_fan_out"] = True
        return config | fields

    def peft_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What is learned, under PEFT's names."""
        return {f"{PREFIX}{name}": tensor for name, tensor in self.state_dict(model).items()}


def like(values: Tensor, layer: nn.Module) -> nn.Parameter:
    """These first values as a parameter, on the device and in the dtype of a layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    return nn.Parameter(values.to(weight.device, dtype))


def lora_on_computed_factors(module: LoRALinear, x: TensorSize, tape: Tape) -> TensorSize:
    """What a LoRA layer keeps for the backward pass whose A and B are computed in every forward pass."""
    y = activations.forward(module.base, x, tape)
    if module.merged:
        return y
    A, B = module.factors()
    h = tape.linear(tape.dropout(x, module.dropout_p, noise_width=1), A, len(A))  # (rows, r)
    kept = [h, TensorSize(1, B.numel(), h.width)]  # and B, or its copy
    return tape.add([y, h], TensorSize(y.rows, y.columns, y.width), kept, [B])
