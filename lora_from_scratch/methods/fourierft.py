"""FourierFT (Gao et al. 2024, arXiv:2405.03003): a few numbers in the Fourier spectrum of the weight's change.

F is a matrix of the size of the weight, and zero except at n random places, which hold the learned numbers c (section
3.1). Its inverse discrete Fourier transform is the change of the weight:

    y = W x + b + dW x        dW = s Re(IDFT2(F))        W, F, dW: (out, in); c: (n,); F[j_l, k_l] = c_l, l = 1 ... n

As c is real, only cosines are left, each a wave across the whole matrix (p counts the rows, q the columns):

    dW[p, q] = s / (in out) * sum over l of c_l cos(2 pi (p j_l / out + q k_l / in))

The paper's eq. 3 has no factor 1 / (in out); its code and PEFT have it. The places are drawn from a seed and are the
same for all layers of one size, so that c is all that is stored: n numbers for a layer, whatever its size.

**Start.** Here c starts at zero, so at the start nothing changes; dW is linear in c, so c has a gradient all the same.
The paper and PEFT draw c from N(0, 1) (here `start="random"`), which changes the model before the first step: an entry
of dW then has a standard deviation of s sqrt(n / 2) / (in out).

**Scaling.** The same s is a smaller change for a larger weight. Adam's steps do not depend on the size of the gradient,
so s and the learning rate act only through their product when c starts at zero (up to weight decay and Adam's epsilon).

**What dW can be.** The spectrum of a real part is (F + F') / 2, where F' has c_l at the mirrored place (-j_l mod out,
-k_l mod in). IDFT2 is invertible, so dW has the rank of that matrix. It has at most 2 n entries that are not zero, so
the rank is at most min(2 n, in, out). But cosines are even: dW[p, q] = dW[-p mod out, -q mod in], whatever c is. About
half of all directions of W cannot be reached, however large n is, and of two mirrored places one is superfluous.

**Cost.** As cos(a + b) = cos a cos b - sin a sin b, dW is a product of thin matrices, (out, 2 n) diag(c, c) (2 n, in):
frozen ones with learned numbers between them, as in VeRA. With these a token takes 2 n (in + out) multiply-adds. With
dW itself it takes in out, and each forward pass a fast Fourier transform and the memory of a second W. The thin
matrices are cheaper only below n = in out / (2 (in + out)): 192 for a weight of 768 by 768. n is usually 1000, so dW is
computed here. Merged, neither is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.fast_product import add_product
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.lora_peft import targets_in_peft
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import WHOLE_LAYERS
from lora_from_scratch.methods.wrapped_layers import WrapsLayers, like
from lora_from_scratch.support.linear_layers import in_and_out, is_linear
from lora_from_scratch.support.tape import Tape, TensorSize

BASE, RANDOM = "base", "random"
PEFT_SEED = 777  # its default; the paper's experiments use 2024
SPECTRUM = ".fourierft_spectrum"  # behind a layer's name, as in PEFT
SIZES = "layer_sizes"  # (layers, 2): the (in, out) of each layer by its name, in directories that we write


def draw_places(n: int, out_features: int, in_features: int, seed: int) -> Tensor:
    """The places of the learned entries in the spectrum of a layer: the same as PEFT's.

    They are the first n of a random order of all out * in places, from `torch.Generator().manual_seed(seed)`. PyTorch's
    global generator is neither read nor changed.

    Args:
        n: how many, at most out * in.
        out_features, in_features: the size of the weight.
        seed: the same seed gives the same places in every call, on every device.

    Returns:
        (n,), whole numbers, all different: j * in + k is row j, column k.
    """
    order = torch.randperm(out_features * in_features, generator=torch.Generator().manual_seed(seed))
    return order[:n].clone()


def fourier_delta_weight(c: Tensor, places: Tensor, shape: tuple[int, int], scaling: float) -> Tensor:
    """The learned change of a weight, s Re(IDFT2(F)) (Gao et al. 2024, eq. 2 to 4).

    Args:
        c: (n,), the learned entries of F.
        places: (n,), where in F they stand, from `draw_places`.
        shape: (out, in).
        scaling: s.

    Returns:
        (out, in), in float32, or in float64 if c is. Gradients flow to c.
    """
    c = c.to(torch.promote_types(c.dtype, torch.float32))  # PyTorch has no Fourier transform of bfloat16
    F = c.new_zeros(math.prod(shape)).index_copy_(0, places, c).view(shape)
    return scaling * torch.fft.ifft2(F).real


class FourierFTLinear(LoRALinear):
    """A linear layer with a FourierFT beside it; merging is LoRA's.

    Args:
        base: the linear layer.
        c: (n,), the first values of the learned entries.
        places: (n,), their places. Layers of one size share this tensor.
        scaling: s.
    """

    def __init__(self, base: nn.Module, c: Tensor, places: Tensor, scaling: float) -> None:
        nn.Module.__init__(self)
        self.base, self.scaling = base, scaling
        self.register_buffer("_unmerged", None, persistent=False)
        self.places: Tensor
        self.register_buffer("places", places, persistent=False)
        self.fourierft_spectrum = like(c, base)  # PEFT's name
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            y: Tensor = self.base(x)
            return y
        dW = self.delta_weight()  # before base(x) takes memory: the transform takes five times that of dW
        return add_product(self.base(x), x, dW.to(x.dtype), 1.0)  # W x + b + dW x

    def delta_weight(self) -> Tensor:
        """dW (out, in), in at least float32."""
        inputs, outputs = in_and_out(self.base)
        return fourier_delta_weight(self.fourierft_spectrum, self.places, (outputs, inputs), self.scaling)

    def change(self, W: Tensor) -> Tensor:
        """What merging adds to the weight (out, in)."""
        return self.delta_weight()

    def extra_repr(self) -> str:
        return f"n_frequency={len(self.places)}, scaling={self.scaling:g}, merged={self.merged}"


@dataclass(frozen=True)
class FourierFT(WrapsLayers):
    """FourierFT on whole linear layers of any model; see the module for the equations.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; more entries than a weight has, in `adapt`; or
            as for `WrapsLayers`.
    """

    n_frequency: int = hyperparameter(1000, "n, the learned entries of each layer's Fourier spectrum")
    scaling: float = hyperparameter(300.0, "s, by which the update is multiplied")  # the paper's; 150 in PEFT
    entry_seed: int = hyperparameter(PEFT_SEED, "seed of the random places of these entries")
    start: str = hyperparameter(BASE, "base: nothing changes at the start; random: as in the authors' package")
    seed: int = 0  # of the first values, if they are random

    name: ClassVar[str] = "fourierft"
    peft_type: ClassVar[str] = "FOURIERFT"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-1, 2e-2, "GPT-2 medium on E2E (Gao et al. 2024, table 10); bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 15.3
    use_when: ClassVar[str] = (
        "thousands of adapters have to be stored, a few kilobytes for each layer whatever its size; merge it before "
        "use, because each forward pass computes the whole update"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"fourierft"})
    layer: ClassVar[type[nn.Module]] = FourierFTLinear

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("n_frequency", 1), ("entry_seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not isinstance(self.scaling, int | float) or not 0 < self.scaling < float("inf"):
            raise ValueError(f"scaling must be a number above 0, got {self.scaling!r}")
        if self.start not in (BASE, RANDOM):
            raise ValueError(f"start must be one of {BASE}, {RANDOM}, got {self.start!r}")

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        places: dict[tuple[int, int], Tensor] = {}  # by the size of the weight
        for name, base in bases.items():
            inputs, outputs = in_and_out(base)
            if self.n_frequency > inputs * outputs:
                raise ValueError(
                    f"n_frequency must be at most {inputs * outputs}, the number of entries of {name}, "
                    f"got {self.n_frequency}"
                )
            if (inputs, outputs) not in places:
                weight: Any = base.weight
                drawn = draw_places(self.n_frequency, outputs, inputs, self.entry_seed)
                places[inputs, outputs] = drawn.to(weight.device)
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: FourierFTLinear(base, self.first_values(generator), places[in_and_out(base)], self.scaling)
            for name, base in bases.items()
        }

    def first_values(self, generator: torch.Generator) -> Tensor:
        """c (n,) of one layer before the first step."""
        if self.start == BASE:
            return torch.zeros(self.n_frequency)
        return torch.randn(self.n_frequency, generator=generator)

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys, and the sizes of the layers: n numbers fit a layer of any size, but were trained
        for one. PEFT ignores that tensor."""
        optional: dict[str, Any] = {"init_weights": self.start == BASE}
        if self.entry_seed != PEFT_SEED:
            optional["random_loc_seed"] = self.entry_seed
        config = self.peft_config(model, n_frequency=self.n_frequency, scaling=self.scaling, **optional)
        sizes = [in_and_out(layer.base) for _, layer in sorted(self.layers(model).items())]
        return config, {SIZES: torch.tensor(sizes, dtype=torch.int32), **self.peft_tensors(model)}

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[FourierFT, dict[str, Tensor]]:
        understood: tuple[str, ...] = ("n_frequency", "scaling", "random_loc_seed", "init_weights", "target_modules")
        understood += ("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias")
        adapter_files.refuse_unknown_fields(config, understood)
        adapter_files.refuse_other_values(config, "bias", ("none",))
        state = {key.removeprefix(adapter_files.PREFIX): tensor for key, tensor in tensors.items() if key != SIZES}
        if SIZES in tensors:
            refuse_other_sizes(sorted(key.removesuffix(SPECTRUM) for key in state), tensors[SIZES].tolist(), model)
        method = cls(
            targets=targets_in_peft(config, model),
            n_frequency=config.get("n_frequency", 1000),
            scaling=config.get("scaling", 150.0),
            entry_seed=config.get("random_loc_seed", PEFT_SEED),
            start=BASE if config.get("init_weights") else RANDOM,
        )
        return method, state

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> FourierFT:
        return cls(
            targets=rng.choice(WHOLE_LAYERS),
            n_frequency=rng.randint(1, config.n_embd**2),
            scaling=rng.uniform(1, 20),
            entry_seed=rng.randint(0, 99),
            start=rng.choice((BASE, RANDOM)),
            seed=rng.randint(0, 99),
        )

    def starts_as_base(self) -> bool | None:
        return self.start == BASE


def refuse_other_sizes(names: Sequence[str], sizes: Sequence[Sequence[int]], model: nn.Module) -> None:
    """Check that the linear layers of these names have these numbers of inputs and outputs.

    Raises:
        ValueError: one of them does not, or is not there.
    """
    modules = dict(model.named_modules())
    for name, size in zip(names, sizes, strict=False):
        if name not in modules or not is_linear(modules[name]) or in_and_out(modules[name]) != tuple(size):
            raise ValueError(f"the adapter is for {name} with (in, out) = {size}; was it made for another model?")


# --- What it keeps for the backward pass ---------------------------------------------------------------

COMPLEX = 8  # bytes of a complex number


@activations.forward.register
def _(module: FourierFTLinear, x: TensorSize, tape: Tape) -> TensorSize:
    if module.merged:
        return activations.forward(module.base, x, tape)
    inputs, outputs = in_and_out(module.base)
    F = tape.add([], TensorSize(outputs, inputs), [], [module.fourierft_spectrum])
    waves = tape.add([F], TensorSize(outputs, inputs, COMPLEX))
    waves = tape.add([waves], TensorSize(outputs, inputs, COMPLEX))
    dW = tape.add([waves], TensorSize(outputs, inputs))
    y = activations.forward(module.base, x, tape)
    if tape.autocast:
        x, dW = tape.cast(x, y.width), tape.cast(dW, y.width)
    return tape.add([y, x, dW], TensorSize(y.rows, y.columns, y.width), [x, *([dW] if x.grad else [])])
