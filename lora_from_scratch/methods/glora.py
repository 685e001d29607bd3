"""GLoRA (Chavan et al. 2023, arXiv:2306.07967): scale and shift of weight and bias, in one form.

    y = (W + W * A + B) x + b + b * D + E + W C        (eq. 10; * entry by entry)
    A, B: (out, in), C: (in, 1), D, E: (out,)

Each of the five is of low rank, a column, a number or nothing. Special cases are other methods: only B of low rank is a
LoRA, only E as a column is BitFit, a column for A and for D rescales a layer's output as IA3 does. All start at zero,
so at the start nothing changes. Everything can be merged: afterwards there is only a weight and a bias.

(The paper searches for the best form of each layer by training a supernet; here one form is chosen for all. Where a
layer has no bias, C, D and E are left out, as in PEFT.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.linear_algebra.rank import check_rank
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.lora_peft import targets_in_peft
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS
from lora_from_scratch.methods.wrapped_layers import WrapsLayers, like
from lora_from_scratch.support.linear_layers import dense, in_and_out, is_conv1d, weight_of
from lora_from_scratch.support.tape import Tape, TensorSize

LORA, VECTOR, CONSTANT, NONE = "lora", "vector", "constant", "none"
FORMS = {
    "form_of_weight": (LORA, VECTOR, CONSTANT, NONE),
    "form_of_coupling": (LORA, VECTOR, NONE),
    "form_of_bias": (VECTOR, CONSTANT, NONE),
}
GROUPS = {
    "A": "form_of_weight",
    "B": "form_of_weight",
    "C": "form_of_coupling",
    "D": "form_of_bias",
    "E": "form_of_bias",
}
PEFT_NAMES = {"form_of_weight": "config_A_B", "form_of_coupling": "config_C", "form_of_bias": "config_D_E"}


def scale_and_shift(
    W: Tensor,
    b: Tensor | None,
    A: Tensor | None = None,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    E: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The weight W + W * A + B and the bias b + b * D + E + W C (Chavan et al. 2023, eq. 10).

    The star is a product entry by entry, and W C is a product of matrices with the weight as it was before. A term
    whose tensor is None is left out. W and b keep their values; gradients flow to the other tensors.

    Args:
        W: (out, in).
        b: (out,). None: the layer has no bias, and C, D and E are ignored.
        A, B: (out, in), or a column (out, 1), or a single number (a tensor without axes).
        C: (in, 1).
        D, E: (out,), or a single number.

    Returns:
        The new weight (out, in), and the new bias (out,), or None if b is None.
    """
    weight = W
    if A is not None:
        weight = weight + W * A
    if B is not None:
        weight = weight + B
    if b is None:
        return weight, None
    bias = b
    if D is not None:
        bias = bias + b * D
    if E is not None:
        bias = bias + E
    if C is not None:
        bias = bias + (W * C.T).sum(dim=-1)
    return weight, bias


class Support(nn.Module):
    """One of the five tensors, in the form of a product, a column or a number. It starts at zero.

    Args:
        base: whose device and dtype it gets.
        form: "lora", "vector" or "constant".
        shape: of the whole tensor, (rows, columns) or (rows,).
        rank, generator: of the form "lora", in which the second factor starts random.
    """

    def __init__(
        self, base: nn.Module, form: str, shape: tuple[int, ...], rank: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.form = form
        if form == LORA:
            second = nn.init.kaiming_uniform_(torch.empty(rank, shape[1]), a=math.sqrt(5), generator=generator)
            self.Xd, self.Xu = like(torch.zeros(shape[0], rank), base), like(second, base)
        elif form == VECTOR:
            self.X = like(torch.zeros(shape[0], *[1] * (len(shape) - 1)), base)
        else:
            self.X = like(torch.zeros(1), base)

    def forward(self) -> Tensor:
        """The tensor; a column and a number are broadcast where it is used."""
        if self.form == LORA:
            return self.Xd @ self.Xu
        return self.X if self.form == VECTOR else self.X[0]


class GLoRALinear(nn.Module):
    """A linear layer whose weight and bias are scaled and shifted.

    - `forward(x)`: (..., in) to (..., out).
    - `merge()` puts the new weight and bias into the base and keeps the old ones; `unmerge()` puts those back, bit for
      bit.
    """

    def __init__(
        self, base: nn.Module, rank: int, forms: Mapping[str, str], generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.base = base
        dense(base)
        inputs, outputs = in_and_out(base)
        has_bias = getattr(base, "bias", None) is not None
        if LORA in forms.values():
            check_rank(rank, min(inputs, outputs), "the smaller side of W")
        shapes = {"A": (outputs, inputs), "B": (outputs, inputs), "C": (inputs, 1), "D": (outputs,), "E": (outputs,)}
        for letter, shape in shapes.items():
            form = forms[GROUPS[letter]]
            used = form != NONE and (has_bias or letter in "AB")
            setattr(self, f"glora_{letter}", Support(base, form, shape, rank, generator) if used else None)
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
        return F.linear(x, *self.weight_and_bias(weight_of(self.base), getattr(self.base, "bias", None)))

    def weight_and_bias(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + W * A + B, (out, in), and b + b * D + E + W C, (out,)."""
        return scale_and_shift(W, b, *(self._part(letter, W.dtype) for letter in "ABCDE"))

    def _part(self, letter: str, dtype: torch.dtype) -> Tensor | None:
        support: Support | None = getattr(self, f"glora_{letter}")
        return None if support is None else support().to(dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the new weight and bias into the base."""
        if self.merged:
            return
        weight, bias = dense(self.base), getattr(self.base, "bias", None)
        W, b = self.weight_and_bias(weight_of(self.base).float(), None if bias is None else bias.float())
        self._unmerged = weight.data, None if bias is None else bias.data
        weight.data = (W.T.contiguous() if is_conv1d(self.base) else W).to(weight.dtype)
        if bias is not None and b is not None:
            bias.data = b.to(bias.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the old weight and bias back, bit for bit."""
        if self._unmerged is not None:
            weight, bias = self._unmerged
            here: Any = self.base
            here.weight.data = weight.to(here.weight)
            if bias is not None:
                here.bias.data = bias.to(here.bias)
            self._unmerged = None


@dataclass(frozen=True)
class GLoRA(WrapsLayers):
    """GLoRA on whole linear layers of any model; see the module for the equation.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; a rank that does not fit a layer, or there is
            nothing to train, in `adapt`; or as for `WrapsLayers`.
    """

    rank: int = hyperparameter(4, "r, the rank of what is of low rank")
    form_of_weight: str = hyperparameter(LORA, "form of the change of the weight: lora, vector, constant or none")
    form_of_coupling: str = hyperparameter(VECTOR, "form of what the weight adds to the bias: lora, vector or none")
    form_of_bias: str = hyperparameter(VECTOR, "form of the change of the bias: vector, constant or none")
    seed: int = 0  # of the first values

    name: ClassVar[str] = "glora"
    peft_type: ClassVar[str] = "GLORA"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        1e-2, 2e-4, "as LoRA; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 19
    use_when: ClassVar[str] = (
        "the bias and the scale of each weight are to be learned as well, and everything has to be merged in the end"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"glora"})
    layer: ClassVar[type[nn.Module]] = GLoRALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        for name, allowed in FORMS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.forms == dict.fromkeys(FORMS, NONE):
            raise ValueError("at least one of form_of_weight, form_of_coupling and form_of_bias must not be none")

    @property
    def forms(self) -> dict[str, str]:
        """The form of each group of tensors."""
        return {name: getattr(self, name) for name in FORMS}

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        generator = torch.Generator().manual_seed(self.seed)
        layers: dict[str, nn.Module] = {}
        for name, base in bases.items():
            layers[name] = GLoRALinear(base, self.rank, self.forms, generator)
        if self.form_of_weight == NONE and not any(
            hasattr(base, "bias") and base.bias is not None for base in bases.values()
        ):
            raise ValueError("form_of_weight is none and the targets have no biases, so there is nothing to train")
        return layers

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys. (PEFT 0.21 reads them for layers that are no Conv1D.)"""
        config = self.peft_config(model, r=self.rank, **{PEFT_NAMES[name]: form for name, form in self.forms.items()})
        tensors = self.peft_tensors(model)
        for name, layer in self.layers(model).items():
            inputs, outputs = in_and_out(layer.base)
            for letter, shape in {"C": (inputs, 1), "D": (outputs,), "E": (outputs,)}.items():
                if getattr(layer, f"glora_{letter}") is None:  # PEFT keeps zeros there
                    tensors[f"{adapter_files.PREFIX}{name}.glora_{letter}.zeros"] = torch.zeros(shape)
        return config, tensors

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[GLoRA, dict[str, Tensor]]:
        understood = (
            "r",
            "target_modules",
            "exclude_modules",
            "init_weights",
            "fan_in_fan_out",
            "bias",
            *PEFT_NAMES.values(),
        )
        adapter_files.refuse_unknown_fields(config, understood)
        given = {name: config[theirs] for name, theirs in PEFT_NAMES.items() if theirs in config}
        forms = {name: form.lower() if isinstance(form, str) else form for name, form in given.items()}
        named = {key.removeprefix(adapter_files.PREFIX): tensor for key, tensor in tensors.items()}
        state = {name: tensor for name, tensor in named.items() if not name.endswith(".zeros")}
        defaults = dict.fromkeys(FORMS, LORA) | {"form_of_bias": VECTOR}
        return cls(targets=targets_in_peft(config, model), rank=config.get("r", 8), **defaults | forms), state

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> GLoRA:
        forms = {name: rng.choice(allowed) for name, allowed in FORMS.items()}
        if set(forms.values()) == {NONE}:
            forms["form_of_weight"] = LORA
        return cls(targets=rng.choice(WHOLE_LAYERS), rank=rng.randint(1, 2), seed=rng.randint(0, 99), **forms)


@activations.forward.register
def _(module: GLoRALinear, x: TensorSize, tape: Tape) -> TensorSize:
    if module.merged:
        return activations.forward(module.base, x, tape)
    inputs, outputs = in_and_out(module.base)
    learned = [p for name, p in module.named_parameters() if name.startswith("glora_")]
    of_weight = module.glora_A is not None
    if tape.autocast:
        x = tape.cast(x, 2)
        products = [s for s in module.children() if isinstance(s, Support) and s.form == LORA]
        factors = [TensorSize(1, s.Xd.numel() + s.Xu.numel(), 2) for s in products]  # their copies in bf16
        tape.add([], TensorSize(1, 1), factors, learned)
    kept = [x] if of_weight else []
    if x.grad:
        kept.append(TensorSize(1, inputs * outputs, x.width))  # the new weight, or its copy
    return tape.add([x], TensorSize(x.rows, outputs, x.width), kept, learned, scratch=4 * inputs * outputs * of_weight)
