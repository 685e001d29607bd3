"""Bottleneck adapters: small new layers inside a frozen model.

Houlsby et al. 2019 (arXiv:1902.00751), figure 2: project the d features of a token down to `width` features, apply a
nonlinearity, project back to d, and add the input:

    x + W_up gelu(W_down x + b) + b',      W_down: (width, d),  W_up: (d, width)

The weights start so close to zero that the adapter is nearly the identity. The variants differ in where adapters are
inserted in a block:

    houlsby    after the attention and after the MLP, each before it is added to the residual stream
    pfeiffer   after the MLP only (Pfeiffer et al. 2021, arXiv:2005.00247)
    lin        after the whole block, with its own LayerNorm on the adapter's input and relu instead of gelu
               (Lin et al. 2020, arXiv:2004.03829; "Adapter-L" in the LoRA paper)
    parallel   in parallel with the MLP (He et al. 2022, arXiv:2110.04366): MLP(x) + s W_up relu(W_down x)

For an architecture that `blocks.py` does not list, or to insert adapters elsewhere, name the modules:
`Adapter(places=...)`.

Because of the nonlinearity, an adapter is not a change of the model's weights: it cannot be merged, and an adapted
model stays slower than its base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.blocks import check_layers, find_modules, parts_of_blocks, widths
from lora_from_scratch.methods.method import LearningRates, Method, hyperparameter
from lora_from_scratch.support.tape import Tape, TensorSize

PLACES = {  # variant: the modules of a block that get an adapter each; "" is the block itself
    "houlsby": ("attn", "mlp"),
    "pfeiffer": ("mlp",),
    "lin": ("",),
    "parallel": ("mlp",),
}
INIT_STD = 1e-3  # the authors' code; they find everything below 1e-2 to be near enough to the identity

# --- The adapters ----------------------------------------------------------------------------------------


class BottleneckAdapter(nn.Module):
    """`x + W_up gelu(W_down x + b) + b'` (Houlsby et al. 2019, figure 2), nearly the identity at the start.

    It has two `nn.Linear`, both with a bias: `down`, from d to the width of the bottleneck, and `up`, from there to d.
    The gelu is GPT-2's, the tanh approximation.

    Both weights are initialised from a normal distribution with standard deviation 1e-3 (`INIT_STD`) that is truncated
    at two standard deviations, +-2e-3 (section 3.6 of the paper). Both biases start at 0.

    Args:
        n_embd: d, the width of input and output.
        width: the width of the bottleneck.
        generator: all random numbers are drawn from it, one after the other; None: PyTorch's own generator.
    """

    def __init__(self, n_embd: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(n_embd, width)
        self.up = nn.Linear(width, n_embd)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        h = F.gelu(self.down(x), approximate="tanh")  # (..., d) -> (..., width)
        return x + self.up(h)  # (..., d)


class NormedAdapter(BottleneckAdapter):
    """`x + W_up relu(W_down norm(x) + b) + b'`, with a trained LayerNorm (Lin et al. 2020)."""

    def __init__(self, n_embd: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__(n_embd, width, generator)
        self.norm = nn.LayerNorm(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.down(self.norm(x)))  # (..., width)
        return x + self.up(h)


class ParallelAdapter(nn.Module):
    """`s W_up relu(W_down x)` (He et al. 2022, section 3.3), to be added to what a module computes from the same x.

    It has two `nn.Linear` without biases: `down`, from d to the width of the bottleneck, and `up`, from there to d.
    `up` starts at zero, so that at first nothing is added. `down` is initialised uniformly between -1/sqrt(d) and
    1/sqrt(d).

    Args:
        n_embd: d, the width of input and output.
        width: the width of the bottleneck.
        scaling: s, a positive number that is not trained; `forward` reads it from the attribute `scaling`.
        generator: all random numbers are drawn from it, one after the other; None: PyTorch's own generator.
    """

    def __init__(self, n_embd: int, width: int, scaling: float = 1.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.scaling = scaling
        self.down = nn.Linear(n_embd, width, bias=False)
        self.up = nn.Linear(width, n_embd, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d), without adding x."""
        return self.scaling * self.up(F.relu(self.down(x)))  # (..., d)

    def extra_repr(self) -> str:
        return f"scaling={self.scaling:g}"


def adapter_parameter_count(n_embd: int, width: int, adapters: int = 1, bias: bool = True, norms: int = 0) -> int:
    """The number of trained parameters of all adapters in a model, and of the LayerNorms trained with them.

    An adapter has a down projection, a matrix that makes w numbers of d, and an up projection, from w back to d. (Hu et
    al. 2021, section 5.1, have a formula.)

    Args:
        n_embd: d.
        width: w, the width of the bottleneck.
        adapters: the number of adapters in the whole model.
        bias: whether both projections have a bias, which is as long as the projection's output.
        norms: the number of LayerNorms in the whole model, each with a gain and a shift of d numbers; may be 0.
    """
    biases = width + n_embd if bias else 0
    return adapters * (2 * n_embd * width + biases) + 2 * norms * n_embd


# --- Putting them into a model -----------------------------------------------------------------------------


class AdapterAfter(nn.Module):
    """A module, kept unchanged as `base`, followed by an adapter."""

    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, *inputs: Any, **named: Any) -> Any:
        y = self.base(*inputs, **named)
        if isinstance(y, tuple):  # an attention of transformers returns its weights as well
            return self.adapter(y[0]), *y[1:]
        return self.adapter(y)


class AdapterBeside(AdapterAfter):
    """A module, kept unchanged as `base`, and an adapter, kept as `adapter`, with the same input.

    `forward(x, *others)` returns the sum of their outputs, (..., d) for x (..., d). The other arguments (an attention
    gets a mask and a cache, and either may be None) are passed on to the base as they are; the adapter gets only x.
    Gradients flow through both.
    """

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        y: Tensor = self.base(x, *others) + self.adapter(x)
        return y


def insert_adapters(
    model: GPT2,
    width: int = 24,
    variant: str = "houlsby",
    *,
    scaling: float = 1.0,
    layers: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> dict[str, nn.Module]:
    """Insert adapters into a GPT-2, in place.

    `adapter_places(n_layer, variant, layers)` lists the places, `new_adapter(variant, n_embd, width, scaling,
    generator)` creates an adapter, and `replace_module(model, name, module)` puts a module in the place of another.

    Afterwards there is at each place an `AdapterBeside` for the variant "parallel", and an `AdapterAfter` for the
    others. Its `base` is the module that was there before, the same object. Each place gets an adapter of its own. The
    adapters have the dtype of the model and are on its device. What was frozen stays frozen, and what was not stays
    trainable.

    Args:
        width: the width of the bottleneck, from 1 to the model's own width d (`model.config.n_embd`), both included.
        variant: one of `PLACES`.
        scaling: s of the variant "parallel".
        layers: the indices of the blocks that get adapters, from 0; if empty, all of them.
        generator: for the initial values; the adapters draw from it one after the other.

    Returns:
        The adapters, by the names of their places.

    Raises:
        ValueError: the width is out of range, or there is no such layer or variant. The model is then unchanged.
    """
    places = adapter_places(model.config.n_layer, variant, layers)
    d = model.config.n_embd
    if not 1 <= width <= d:
        raise ValueError(f"width must be between 1 and {d} (a bottleneck is no wider than the model), got {width}")
    like = model.transformer.ln_f.weight
    adapters: dict[str, nn.Module] = {}
    for name in places:
        base = model.get_submodule(name)
        adapter = new_adapter(variant, d, width, scaling, generator).to(like.device, like.dtype)
        wrapper = AdapterBeside(base, adapter) if variant == "parallel" else AdapterAfter(base, adapter)
        replace_module(model, name, wrapper.train(base.training))
        adapters[name] = adapter
    return adapters


def insert_at(
    model: nn.Module, places: Sequence[str], width: int, variant: str, scaling: float, generator: torch.Generator
) -> None:
    """Insert adapters at the named modules of any model, in place.

    The width d of a module's output is taken from the linear layers in it (`blocks.widths`).

    Args:
        places: the full names of the modules.
        width, variant, scaling, generator: as for `insert_adapters`.

    Raises:
        ValueError: the width is out of range, or a module's input or output width does not fit. The model is then
            unchanged.
    """
    wrapper = AdapterBeside if variant == "parallel" else AdapterAfter
    wrapped = {}
    for name in places:
        base = model.get_submodule(name)
        taken, d = widths(base, name)
        if variant == "parallel" and taken != d:
            raise ValueError(
                f"{name} takes {taken} numbers and returns {d}; an adapter beside it needs as many of both"
            )
        if not 1 <= width <= d:
            raise ValueError(f"{name}: width must be between 1 and {d}, the number of its outputs, got {width}")
        adapter = new_adapter(variant, d, width, scaling, generator).to(next(base.parameters()))
        wrapped[name] = wrapper(base, adapter).train(base.training)
    for name in reversed(wrapped):  # inner modules first, while their names are valid
        replace_module(model, name, wrapped[name])


def remove_adapters(model: nn.Module) -> None:
    """Remove, in place, what `insert_adapters` has inserted.

    Every module that is an `AdapterAfter` (an `AdapterBeside` is one, too) is replaced by its `base`: the same object,
    under its old name. Adapters may have been inserted several times, one after the other or inside each other; all
    are removed. A model without adapters stays as it is. `replace_module(model, name, module)` puts a module in the
    place of another.
    """
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, AdapterAfter)]
    for name, wrapper in reversed(wrapped):  # inner modules first, while their names are valid
        replace_module(model, name, wrapper.base)


def adapter_places(n_layer: int, variant: str, layers: Sequence[int] = ()) -> list[str]:
    """The full names of the modules of a GPT-2 that get an adapter, in the order of the blocks.

    Raises:
        ValueError: there is no such variant, or no such layer.
    """
    _check_variant(variant)
    check_layers(layers, n_layer)
    chosen = sorted(set(layers)) or range(n_layer)
    return [f"transformer.h.{layer}.{place}".rstrip(".") for layer in chosen for place in PLACES[variant]]


def new_adapter(
    variant: str, n_embd: int, width: int, scaling: float = 1.0, generator: torch.Generator | None = None
) -> nn.Module:
    """A new adapter of this variant."""
    if variant == "parallel":
        return ParallelAdapter(n_embd, width, scaling, generator)
    return (NormedAdapter if variant == "lin" else BottleneckAdapter)(n_embd, width, generator)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module with this full name, such as "transformer.h.0.mlp"."""
    model.set_submodule(name, module)


def _check_variant(variant: str) -> None:
    if variant not in PLACES:
        raise ValueError(f"variant must be one of {', '.join(PLACES)}, got {variant!r}")


# --- The method --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter(Method):
    """Adapters in any model; the docstring of this module describes the variants.

    In the architectures that `blocks.py` lists, which include our GPT-2, the variant determines where adapters are
    inserted. `places` names the modules instead, each by its full name or by the last components of it ("mlp"). Such a
    module returns (..., d), or a tuple whose first element is (..., d); for "parallel" it must return a tensor, and its
    first argument is x.

    Raises:
        ValueError: a hyperparameter is out of range (raised by the constructor), or does not fit the model (raised by
            `adapt`).
    """

    width: int = hyperparameter(24, "width of the bottleneck")
    variant: str = hyperparameter("houlsby", f"where the adapters are inserted: {', '.join(PLACES)}")
    scaling: float = hyperparameter(  # s; He et al. 2022 take 4
        1.0, "factor that multiplies the output of parallel adapters"
    )
    layers: Sequence[int] = hyperparameter(  # to leave some out is AdapterDrop, Rücklé et al. 2021
        (), "blocks that get adapters, counted from 0; all of them if none is given"
    )
    places: Sequence[str] = ()  # the modules that get adapters; empty: those of the variant
    seed: int = 0  # of the initial values

    name: ClassVar[str] = "adapter"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_ADAPTER"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(1e-2, 3e-4, "the example in google-research/adapter-bert")
    position: ClassVar[float] = 30
    use_when: ClassVar[str] = (
        "a nonlinear path is wanted and latency does not matter: an adapter cannot be merged into the weights"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"adapter-pfeiffer"})

    def __post_init__(self) -> None:
        _check_variant(self.variant)
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ValueError(f"width must be a whole number of at least 1, got {self.width!r}")
        if not isinstance(self.scaling, int | float) or not math.isfinite(self.scaling) or self.scaling <= 0:
            raise ValueError(f"scaling must be a positive number, got {self.scaling!r}")
        if self.scaling != 1 and self.variant != "parallel":
            raise ValueError(f"scaling={self.scaling:g} is for the variant 'parallel'; {self.variant!r} has none")
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "places", (self.places,) if isinstance(self.places, str) else tuple(self.places))
        if self.places and self.layers:
            raise ValueError("places and layers exclude each other: places are modules of any block")
        for layer in self.layers:
            if not isinstance(layer, int) or isinstance(layer, bool):
                raise ValueError(f"layers must be whole numbers, counted from 0, got {layer!r}")

    def _install(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        if isinstance(model, GPT2) and not self.places:
            options: dict[str, Any] = {"scaling": self.scaling, "layers": self.layers, "generator": generator}
            insert_adapters(model, self.width, self.variant, **options)
        else:
            insert_at(model, self._places(model), self.width, self.variant, self.scaling, generator)

    def _places(self, model: nn.Module) -> list[str]:
        """The full names of the modules that get an adapter."""
        if self.places:
            return find_modules(model, self.places)
        try:
            return parts_of_blocks(model, PLACES[self.variant], self.layers)
        except LookupError as error:
            raise ValueError(f"{error.args[0]}; name the modules that get adapters, in `places`") from None

    def _uninstall(self, model: nn.Module) -> None:
        remove_adapters(model)

    @classmethod
    def contestants(cls) -> dict[str, dict[str, Any]]:
        return {f"{cls.name}-{variant}": {"variant": variant} for variant in ("houlsby", "parallel", "pfeiffer")}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> Adapter:
        return cls(width=rng.randint(1, config.n_embd), variant=rng.choice(list(PLACES)))

    def starts_as_base(self) -> bool | None:
        return True if self.variant == "parallel" else None  # the others are nearly the identity


# --- What it keeps for the backward pass ---------------------------------------------------------------


@activations.forward.register
def _(module: AdapterAfter, x: TensorSize, tape: Tape) -> TensorSize:
    return activations.forward(module.adapter, activations.forward(module.base, x, tape), tape)


@activations.forward.register
def _(module: AdapterBeside, x: TensorSize, tape: Tape) -> TensorSize:
    return tape.sum(activations.forward(module.base, x, tape), activations.forward(module.adapter, x, tape))


@activations.forward.register
def _(module: BottleneckAdapter, x: TensorSize, tape: Tape) -> TensorSize:
    h = activations.forward(module.down, x, tape)
    return tape.sum(x, activations.forward(module.up, tape.like(h, [h]), tape))  # gelu


@activations.forward.register
def _(module: NormedAdapter, x: TensorSize, tape: Tape) -> TensorSize:
    h = tape.nonlinearity(activations.forward(module.down, tape.norm(x, module.norm), tape))
    return tape.sum(x, activations.forward(module.up, h, tape))


@activations.forward.register
def _(module: ParallelAdapter, x: TensorSize, tape: Tape) -> TensorSize:
    return tape.like(activations.forward(module.up, tape.nonlinearity(activations.forward(module.down, x, tape)), tape))
