"""IA3 (Liu et al. 2022, arXiv:2205.05638): rescale activations by learned vectors.

(IA)^3, "infused adapter by inhibiting and amplifying inner activations", multiplies some activations by a vector
(section 3.3). Behind a layer it multiplies the layer's output, in front of it the input:

    y = l * (W x + b)      l: (out,), for instance of keys and values
    y = W (l * x) + b      l: (in,), of the MLP's second layer: the activation between the two is rescaled

l starts at one, so at the start nothing changes. Both are changes of W and b, and can be merged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.lora_peft import targets_in_peft
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import ends_with
from lora_from_scratch.methods.wrapped_layers import WrapsLayers, like
from lora_from_scratch.support.linear_layers import dense, in_and_out, is_conv1d
from lora_from_scratch.support.tape import Tape, TensorSize


class IA3Linear(nn.Module):
    """A linear layer whose output, or whose input, is rescaled.

    Args:
        base: the layer; kept, unchanged unless merged.
        feedforward: whether the input is rescaled.
    """

    def __init__(self, base: nn.Module, feedforward: bool = False) -> None:
        super().__init__()
        self.base, self.feedforward = base, feedforward
        inputs, outputs = in_and_out(base)
        self.ia3_l = like(torch.ones((1, inputs) if feedforward else (outputs, 1)), base)  # PEFT's shapes
        self._unmerged: tuple[Tensor, Tensor | None] | None = None
        self.train(base.training)

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @property
    def weight(self) -> Tensor | nn.Module:
        """The base's, for models that look at a layer's dtype before they call it."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base(x)
        scale = self.ia3_l.flatten()
        if self.feedforward:
            return self.base(x * scale.to(x.dtype))
        y: Tensor = self.base(x)
        return y * scale.to(y.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the vector into the weight, and into the bias if the output is rescaled; keep what was there."""
        if self.merged:
            return
        weight, bias = dense(self.base), getattr(self.base, "bias", None)
        scale = self.ia3_l.T if is_conv1d(self.base) else self.ia3_l
        self._unmerged = weight.data, None if bias is None else bias.data
        weight.data = (weight.float() * scale.float()).to(weight.dtype)
        if bias is not None and not self.feedforward:
            bias.data = (bias.float() * self.ia3_l.flatten().float()).to(bias.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back what was there, bit for bit."""
        if self._unmerged is not None:
            weight, bias = self._unmerged
            here = dense(self.base)
            here.data = weight.to(here)
            if bias is not None:
                self.base.bias.data = bias.to(here)
            self._unmerged = None

    def extra_repr(self) -> str:
        return f"feedforward={self.feedforward}, merged={self.merged}"


@dataclass(frozen=True)
class IA3(WrapsLayers):
    """IA3 on whole linear layers of any model; see the module for the equations.

    As in PEFT, GPT-2's fused `c_attn` is rescaled as one: the queries too, which the paper leaves alone.

    Raises:
        ValueError: as for `WrapsLayers`; or `feedforward` names a layer that is no target, in `adapt`.
    """

    targets: Sequence[str] | str = hyperparameter(
        ("c_attn", "mlp.c_proj"), "the layers to adapt, by name (c_attn, mlp.c_proj) or one regular expression"
    )
    feedforward: Sequence[str] = hyperparameter(
        ("mlp.c_proj",), "those of the targets whose input is rescaled instead of the output"
    )

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-1, 3e-3, "T-Few (Liu et al. 2022, section 3.5); bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 75
    use_when: ClassVar[str] = (
        "an adapter may have only a few numbers per layer, each of which scales an activation, and has to be "
        "merged in the end"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"ia3"})
    layer: ClassVar[type[nn.Module]] = IA3Linear

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward, str):
            raise ValueError(f"feedforward must be a list of names, got {self.feedforward!r}")
        object.__setattr__(self, "feedforward", tuple(self.feedforward))

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        for end in self.feedforward:
            if not any(ends_with(name, end) for name in bases):
                raise ValueError(f"feedforward names {end!r}, which matches none of the targets {', '.join(bases)}")
        inside = {name for name in bases if any(ends_with(name, end) for end in self.feedforward)}
        return {name: IA3Linear(base, name in inside) for name, base in bases.items()}

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys."""
        return self.peft_config(model, feedforward_modules=list(self.feedforward)), self.peft_tensors(model)

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[IA3, dict[str, Tensor]]:
        understood = ("target_modules", "feedforward_modules", "exclude_modules", "fan_in_fan_out", "init_ia3_weights")
        adapter_files.refuse_unknown_fields(config, understood)
        names = targets_in_peft(config, model)
        given = config.get("feedforward_modules") or []
        inside = [name for name in names if any(ends_with(name, end) for end in given)]
        state = {key.removeprefix(adapter_files.PREFIX): tensor for key, tensor in tensors.items()}
        return cls(targets=names, feedforward=inside), state

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> IA3:
        targets = rng.choice([("c_attn",), ("c_attn", "mlp.c_proj"), ("c_fc", "c_proj")])
        return cls(targets=targets, feedforward=[name for name in targets if rng.random() < 0.5])


@activations.forward.register
def _(module: IA3Linear, x: TensorSize, tape: Tape) -> TensorSize:
    if module.merged:
        return activations.forward(module.base, x, tape)
    if module.feedforward:
        scaled = tape.add([x], TensorSize(x.rows, x.columns, x.width), [x], [module.ia3_l])
        return activations.forward(module.base, scaled, tape)
    y = activations.forward(module.base, x, tape)
    return tape.add([y], TensorSize(y.rows, y.columns, y.width), [y], [module.ia3_l])
