"""BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): freeze every matrix and train the biases, 0.08 % of GPT-2 small.

Training only the biases of the queries and of the MLP's first layer is nearly as good (section 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.blocks import blocks_of
from lora_from_scratch.methods.method import LearningRates, Method, hyperparameter
from lora_from_scratch.methods.placement import fused_parts
from lora_from_scratch.support.tape import Tape, TensorSize
from lora_from_scratch.support.wrapped import plain_name

VARIANTS = ("all", "two")

# --- BitFit ------------------------------------------------------------------------------------------------


def select_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every bias of a model by its full name, those of the LayerNorms included (Ben Zaken et al., section 3).

    A bias is a parameter that its module calls `bias`, so that its full name ends in `.bias`, or is `bias` for a
    module by itself. Nothing about the parameters changes, `requires_grad` included: choosing is not training.

    Returns:
        name -> the parameter itself, not a copy of it; in the order of `model.named_parameters()`.
    """
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}


class QueryBias(nn.Module):
    """GPT-2's `c_attn` with the queries' part of its bias learned by itself, as `bias_q` (d,).

    The bias of `c_attn` is (3 d,), `[q | k | v]`, in one tensor, and PyTorch trains a tensor as a whole. So the
    first third is copied out and learned; the tensor itself, with the parts of k and v, stays frozen in `base`.

    - `bias()`: the (3 d,) that the layer works with: `bias_q` for the queries, what `base` has for keys and values.
    - `forward(x)`: (..., d) to (..., 3 d), what `base` computes, with `bias()` for its bias. The weight of `base`, a
      `Conv1D`, is (d, 3 d).
    - `merge()`: `base.bias` gets the numbers of `bias()` and stays the same parameter, so that `base` alone computes
      what the layer does. The numbers as they were are kept in `_unmerged`. Merging twice is like merging once.
    - `unmerge()`: every bit of `base.bias` as it was before, and `_unmerged` is None again. Without a merge before it,
      it does nothing.

    Args:
        base: the `c_attn` that it stands for, ours or transformers'; frozen by whoever puts this layer into a model.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.bias_q = nn.Parameter(base.bias.detach()[: len(base.bias) // 3].clone())  # (d,)
        self._unmerged: Tensor | None
        self.register_buffer("_unmerged", None, persistent=False)  # the bias as it was, while merged
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight.T, self.bias())  # (..., 3 d)

    def bias(self) -> Tensor:
        """(3 d,), `[q | k | v]`."""
        return torch.cat([self.bias_q, self.base.bias[len(self.bias_q) :]])

    @torch.no_grad()
    def merge(self) -> None:
        """Put what is learned into `base`, and keep what was there."""
        if self._unmerged is None:
            self._unmerged, self.base.bias.data = self.base.bias.data, self.bias()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back what was there."""
        if self._unmerged is not None:
            self.base.bias.data, self._unmerged = self._unmerged, None


@dataclass(frozen=True)
class BitFit(Method):
    """Train only biases.

    The variant "all" trains every bias of any model. "two" trains two in each block: b_q, the bias of the queries (a
    third of the bias of GPT-2's `c_attn`), and b_m2, the bias of the MLP's first layer. They are the two that change
    most (Ben Zaken et al., section 4, where m1 is the attention's output projection and m2 the matrix after it). It
    needs an architecture that `blocks.py` lists.

    Raises:
        ValueError: there is no such variant (raised by the constructor), or the model lacks these biases (raised by
            `adapt`).
    """

    variant: str = hyperparameter(
        "all", "which biases are trained: all, or two per block (of the queries and of the MLP's first layer)"
    )

    name: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_BITFIT"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(6e-2, 1e-3, "run_glue.py in benzakenelad/BitFit")
    position: ClassVar[float] = 70
    use_when: ClassVar[str] = "a few ten thousand numbers are enough, and nothing may be added to the model"
    can_merge: ClassVar[bool] = True  # biases are trained in place; only `bias_q` is copied back

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")

    def _install(self, model: nn.Module) -> None:
        biases = select_biases(model)
        if not biases:
            raise ValueError(f"a {type(model).__name__} has no biases, and BitFit trains nothing else")
        if self.variant == "all":
            for bias in biases.values():
                bias.requires_grad_(True)
            return
        layers = _layers_of_two(model)
        for name in layers:
            if f"{name}.bias" not in biases:
                raise ValueError(
                    f"{name} has no bias, so the variant 'two' does not fit; 'all' trains those that exist"
                )
        for name, layer in layers.items():
            if fused_parts(model, name):
                model.set_submodule(name, QueryBias(layer))
            else:
                biases[f"{name}.bias"].requires_grad_(True)

    def _uninstall(self, model: nn.Module) -> None:
        for name, layer in _query_biases(model).items():
            model.set_submodule(name, layer.base)

    def _merge(self, model: nn.Module) -> None:
        for layer in _query_biases(model).values():
            layer.merge()

    def _unmerge(self, model: nn.Module) -> None:
        for layer in _query_biases(model).values():
            layer.unmerge()

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> BitFit:
        return cls(variant=rng.choice(VARIANTS))

    def trains_of_base(self) -> str:
        return "biases"

    def starts_as_base(self) -> bool | None:
        return True


def _layers_of_two(model: nn.Module) -> dict[str, Any]:
    """In each block the layer that computes the queries and the MLP's first layers, by their full names."""
    try:
        blocks = blocks_of(model)
    except LookupError as error:
        raise ValueError(f"{error.args[0]}; the variant 'all' fits any model") from None
    names = []
    for block, parts in blocks.items():
        if parts.query is None:
            raise ValueError(
                f"the queries of {block} have no bias apart from keys and values; the variant 'all' fits it"
            )
        names += [f"{block}.{part}" for part in (parts.query, *parts.middle)]
    return {name: model.get_submodule(name) for name in names}


def _query_biases(model: nn.Module) -> dict[str, QueryBias]:
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, QueryBias)}


# --- What it keeps for the backward pass ---------------------------------------------------------------


@activations.forward.register
def _(module: QueryBias, x: TensorSize, tape: Tape) -> TensorSize:
    return tape.linear(x, module.base.weight, module.base.out_features, module.bias_q)
