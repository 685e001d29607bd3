"""BOFT (Liu et al. 2023, arXiv:2311.06243): OFT with a product of rotations, as in a fast Fourier transform.

With a block-diagonal R as in `oft`, an input never meets one of another block. BOFT multiplies m such matrices, each
of which has other inputs in its blocks (section 4):

    R = B_m ... B_2 B_1,      B_i = P_i diag(R_i1, ..., R_ik) P_i^T,      R_ij: (b, b), orthogonal, k = in / b

The permutations P_i are those of the butterfly: the inputs are cut into segments of b / 2, and each block of B_i acts
on two segments that are 2^(i - 1) segments apart, that of B_1 on two neighbours. After m factors, 2^(m - 1) b inputs
are mixed with one another. That takes m (b - 1) / 2 parameters for each input, where a block-diagonal R with blocks of
that size takes (2^(m - 1) b - 1) / 2. With m = 1 it is OFT.

As in PEFT, the length of each neuron is also multiplied by a learned number s ("re-scaled" OFT, Qiu et al. 2023,
section 3.5), which leaves the angles between neurons as they are as long as it is positive:

    y = s * (W (R^T x)) + b        s: (out,), starts at one
"""

from __future__ import annotations

from collections.abc import Mapping
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
from lora_from_scratch.methods.oft import OFTLinear, at_least_float32, cayley, rotate, skew_symmetric
from lora_from_scratch.methods.placement import WHOLE_LAYERS
from lora_from_scratch.methods.wrapped_layers import WrapsLayers, like
from lora_from_scratch.support.linear_layers import in_and_out
from lora_from_scratch.support.tape import FP32, Tape, TensorSize


def butterfly(x: Tensor, R: Tensor, distance: int) -> Tensor:
    """P diag(R_1, ..., R_k) P^T x, for each of the vectors in x: blocks of two segments that are `distance` apart.

    Gradients flow to x and R. With distance 1 it is `rotate`.

    Args:
        x: (..., k b), with any number of leading axes, also none; k a multiple of `distance`.
        R: (k, b, b), in the dtype of x; b is even, unless the distance is 1.
        distance: in segments of b / 2.

    Returns:
        (..., k b).
    """
    if distance == 1:
        return rotate(x, R)
    segments = x.unflatten(-1, (-1, 2, distance, R.shape[-1] // 2))
    blocks = segments.transpose(-3, -2)  # P^T x: the last two axes are a block
    turned = rotate(blocks.flatten(-4), R).view_as(blocks)
    return turned.transpose(-3, -2).flatten(-4)


class BOFTLinear(OFTLinear):
    """A linear layer whose neurons are rotated by a product of m factors, and rescaled.

    Args:
        base: the linear layer.
        block_size: b.
        factors: m.

    Raises:
        ValueError: blocks of this size, or so many factors, do not fit the layer's inputs.
    """

    def __init__(self, base: nn.Module, block_size: int, factors: int) -> None:
        nn.Module.__init__(self)
        inputs, outputs = in_and_out(base)
        self.base, self.block_size, self.factors = base, block_size, factors
        mixed = block_size * 2 ** (factors - 1)
        if inputs % mixed or (factors > 1 and block_size % 2):
            raise ValueError(
                f"block_size {block_size} and {factors} factors do not fit {inputs} inputs: "
                f"{mixed} must divide them, and for several factors block_size must be even"
            )
        self.register_buffer("_unmerged", None, persistent=False)  # W, while merged
        self.boft_R = like(torch.zeros(factors, inputs // block_size, block_size * (block_size - 1) // 2), base)
        self.boft_s = like(torch.ones(outputs, 1), base)  # PEFT's shape
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        if self.merged:
            return y
        s, bias = self.boft_s.flatten().to(y.dtype), getattr(self.base, "bias", None)
        return y * s if bias is None else y * s + (1 - s) * bias.to(y.dtype)  # the bias is not rescaled

    def turn(self, vectors: Tensor, back: bool = False) -> Tensor:
        """R v for each of the vectors v, (..., in); R^T v with `back`."""
        factors = list(enumerate(self.rotation().to(vectors.dtype)))
        for i, R in reversed(factors) if back else factors:
            vectors = butterfly(vectors, R.mT if back else R, 2**i)
        return vectors

    def rotation(self) -> Tensor:
        """The blocks of the factors, (m, k, b, b), B_1 first, in at least float32."""
        return cayley(skew_symmetric(at_least_float32(self.boft_R), self.block_size))

    def change_weight(self, W: Tensor) -> Tensor:
        """diag(s) W R^T."""
        return at_least_float32(self.boft_s) * self.turn(W)

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, factors={self.factors}, merged={self.merged}"


@dataclass(frozen=True)
class BOFT(WrapsLayers):
    """BOFT on whole linear layers of any model; see the module for the equations.

    PEFT stores all of each skew-symmetric matrix, and learns twice as many numbers. It has BOFT for an `nn.Linear`
    only, and several factors only where it can compile its CUDA code: elsewhere it uses one, with a warning.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; or one that does not fit a layer, in `adapt`; or
            as for `WrapsLayers`.
    """

    block_size: int = hyperparameter(8, "b, the side of the blocks of each factor")
    factors: int = hyperparameter(2, "m, the number of factors of the rotation; 1: as OFT")

    name: ClassVar[str] = "boft"
    peft_type: ClassVar[str] = "BOFT"
    learning_rates: ClassVar[LearningRates] = LearningRates(1e-2, 4e-4, "as OFT; bundled: benchmarks/learning_rates.md")
    position: ClassVar[float] = 24.1
    use_when: ClassVar[str] = (
        "the angles between the neurons of each layer should stay what they were, and OFT has too many parameters; "
        "each factor costs memory for activations"
    )
    can_merge: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"boft"})
    layer: ClassVar[type[nn.Module]] = BOFTLinear

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("block_size", 2), ("factors", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")

    def make_layers(self, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        layers: dict[str, nn.Module] = {}
        for name, base in bases.items():
            try:
                layers[name] = BOFTLinear(base, self.block_size, self.factors)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return layers

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys, with each skew-symmetric matrix as a whole."""
        fields = {"boft_block_size": self.block_size, "boft_n_butterfly_factor": self.factors}
        tensors = self.peft_tensors(model)
        for key, tensor in tensors.items():
            if key.endswith(".boft_R"):
                tensors[key] = -skew_symmetric(tensor, self.block_size)  # its sign in PEFT
        return self.peft_config(model, **fields), tensors

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[BOFT, dict[str, Tensor]]:
        adapter_files.refuse_unknown_fields(config, UNDERSTOOD, HARMLESS)
        adapter_files.refuse_other_values(config, "bias", ("none",))
        adapter_files.refuse_other_values(config, "boft_dropout", (0.0,))
        names = targets_in_peft(config, model)
        state = {key.removeprefix(adapter_files.PREFIX): tensor for key, tensor in tensors.items()}
        for name, tensor in state.items():
            if name.endswith(".boft_R") and tensor.ndim == 4:
                row, column = torch.triu_indices(tensor.shape[-2], tensor.shape[-1], offset=1)
                state[name] = ((tensor - tensor.mT) / 2)[..., row, column]  # as PEFT does
        # The tensors say how many factors there are: where PEFT cannot compile its code, it is 1 whatever the field is.
        shapes = [tensor.shape for name, tensor in state.items() if name.endswith(".boft_R")]
        factors = shapes[0][0] if shapes else config.get("boft_n_butterfly_factor", 1)
        return cls(targets=names, block_size=_block_size_in_peft(config, model, names), factors=factors), state

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> BOFT:
        sizes = [(b, m) for b in range(2, 9) for m in (1, 2, 3) if config.n_embd % (b * 2 ** (m - 1)) == 0]
        block_size, factors = rng.choice([(b, m) for b, m in sizes if m == 1 or b % 2 == 0])
        return cls(targets=rng.choice(WHOLE_LAYERS), block_size=block_size, factors=factors)


UNDERSTOOD = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "bias"),
)
HARMLESS = ("fan_in_fan_out", "init_weights")


def _block_size_in_peft(config: Mapping[str, Any], model: nn.Module, names: list[str]) -> int:
    """b, which PEFT gives as it is or as the number of blocks of each layer."""
    blocks: int = config.get("boft_block_num") or 0
    if not blocks:
        return int(config.get("boft_block_size", 4))
    sizes = {in_and_out(model.get_submodule(name))[0] // blocks for name in names}
    if len(sizes) > 1:
        raise ValueError(
            f"{adapter_files.CONFIG_FILE} has boft_block_num={blocks}, which makes blocks of "
            f"{', '.join(map(str, sorted(sizes)))} in layers of different width; supported: one boft_block_size"
        )
    return sizes.pop()


# --- What it keeps for the backward pass ---------------------------------------------------------------


@activations.forward.register
def _(module: BOFTLinear, x: TensorSize, tape: Tape) -> TensorSize:
    if module.merged:
        return activations.forward(module.base, x, tape)
    x = tape.cast(x, 2) if tape.autocast else x
    entries, b = module.boft_R, module.block_size
    m, k, n = entries.shape
    width = max(entries.element_size(), FP32)
    Q = tape.add([], TensorSize(m * k * b, b, width), [TensorSize(2, n, 8)], [entries])
    inverse = TensorSize(m * k * b, b, width)
    R = tape.add([Q], TensorSize(m * k * b, b, width), [inverse], scratch=inverse.nbytes)
    for i in reversed(range(m)):
        factor = R if R.width == x.width else tape.add([R], TensorSize(k * b, b, x.width))
        blocks = tape.like(x) if i else x  # P^T x, a copy
        turned = tape.add(
            [blocks, factor], TensorSize(x.rows, x.columns, x.width), [blocks, *([factor] if x.grad else [])]
        )
        x = tape.like(turned) if i else turned
    y = activations.forward(module.base, x, tape)
    s = TensorSize(1, y.columns, y.width)
    saved = [y] if s.width == module.boft_s.element_size() else [y, s]  # and its copy
    scaled = tape.add([y], TensorSize(y.rows, y.columns, y.width), saved, [module.boft_s])
    return scaled if getattr(module.base, "bias", None) is None else tape.like(scaled)
