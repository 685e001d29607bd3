"""LoftQ (Li et al. 2023, arXiv:2310.08659): initialise the LoRA with the quantisation error.

    y = Q x + b + s B A x,      Q: (out, in) in four bits,  A: (r, in),  B: (out, r)

Plain QLoRA starts at `Q = quant(W)`, which differs from W. A LoRA of rank r can represent the r largest directions of
the error, so Q and B A are chosen together: minimise `||W - Q - B A||` (section 3.1), alternately over the two
(algorithm 1). Afterwards Q is frozen, and A and B are trained as in QLoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.lora import LoRA, LoRALinear, lora_layers
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.qlora import QLoRA
from lora_from_scratch.models.checkpoint import AnyTokenizer, LanguageModel, load_language_model
from lora_from_scratch.quantization.nf4_linear import NF4Linear, nf4_layers
from lora_from_scratch.quantization.quantized_tensor import QuantizedTensor, quantize_4bit
from lora_from_scratch.support.linear_layers import weight_of

# --- One layer -----------------------------------------------------------------------------------------


def loftq_init(
    W: Tensor, rank: int, iterations: int = 1, quantize: Callable[[Tensor], QuantizedTensor] = quantize_4bit
) -> tuple[QuantizedTensor, Tensor, Tensor]:
    """Alternate `Q = quant(W - B A)` and `B A = SVD_r(W - Q)`, from B A = 0 (algorithm 1).

    `SVD_r(M)` is the matrix of rank r nearest to M. The second step is optimal for its Q (Eckart and Young); the first
    is not optimal, because rounding each weight to its nearest code does not take into account what B A could
    represent. In practice the error falls at every iteration, most of all at the first.

    Args:
        W: (out, in), floating-point, perhaps a parameter, on any device; the computation runs on that device and needs
            no GPU.
        rank: r, from 1 to the smaller side of W.
        iterations: T, at least 1.
        quantize: maps a matrix to Q; `Q.dequantize()` is a matrix again. It is called once per iteration.

    Returns:
        Q of the last iteration, A (r, in) and B (out, r), both float32 and not part of a graph.
        The layer is `Q x + B A x`, without a factor alpha / r.
        How the product is factored into A and B is not specified.

    Raises:
        ValueError: W is not a matrix, rank or iterations are out of range, or `quantize` rejects W (not finite).
    """
    if W.ndim != 2:
        raise ValueError(f"W must be a matrix (out, in), got shape {tuple(W.shape)}")
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"rank must be between 1 and {min(W.shape)} (the smaller side of W), got {rank}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    W = W.detach().float()
    low_rank = torch.zeros_like(W)  # B A
    for _ in range(iterations):
        Q = quantize(W - low_rank)
        A, B = best_factors(W - Q.dequantize(), rank)
        low_rank = B @ A
    return Q, A, B


def best_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) whose product B A is the nearest matrix of rank r; each has the square root of S."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()  # (r,)
    return root[:, None] * Vh[:rank], U[:, :rank] * root


@torch.no_grad()
def begin_with_loftq(
    layer: LoRALinear, W: Tensor, iterations: int = 1, quantize: Callable[[Tensor], QuantizedTensor] = quantize_4bit
) -> None:
    """Initialise a LoRA on a 4-bit layer, in place, with `loftq_init` of the layer's full-precision weight W.

    The layer gets a new Q (`layer.base.quantized`), and its A and B get new values; they remain the same parameters,
    with the same dtype. The layer computes `Q x + s B A x` with its own scaling s = alpha / r, while LoftQ has no s:
    afterwards Q + s B A is what LoftQ's Q + B A should be.

    Args:
        layer: a LoRA of rank r on an `NF4Linear`, not merged.
        W: (out, in), the full weight.
        iterations, quantize: as for `loftq_init`.

    Raises:
        ValueError: `layer.base` is not an `NF4Linear` or its shape differs from W's; or as for `loftq_init`. The layer
            is then unchanged.
    """
    base = layer.base
    if not isinstance(base, NF4Linear) or base.quantized.shape != W.shape:
        raise ValueError(f"the LoRA must be on a 4-bit layer whose weight is {tuple(W.shape)}, got one on {base}")
    Q, A, B = loftq_init(W, layer.rank, iterations, quantize)
    base.quantized = Q
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B / layer.scaling)


# --- The method ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoftQ(QLoRA):
    """QLoRA that starts near the full base: Q, A and B are fitted to each weight together.

    It needs the full weights, so a model that is in four bits already is refused. Layers without a LoRA are quantised
    as in QLoRA.

    The adapter directory is a QLoRA's, and `init_lora_weights` says that the adapter belongs to LoftQ's Q, under PEFT's
    name. Q itself is not saved: loading fits it again to the same base, which gives the same bits. PEFT 0.21 computes
    this on a GPU only, transposes A and B of a Conv1D, and leaves out the scaling s, so that its start is LoftQ's only
    with alpha = rank.

    Raises:
        ValueError: as for `QLoRA`; or the model is quantised already, or a target is a part of a fused layer, in
            `adapt`.
    """

    iterations: int = hyperparameter(1, "how often Q, and then A and B, are fitted to what the other leaves")

    name: ClassVar[str] = "loftq"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-3, 3e-4, "GSM8K with LLaMA-2 in yxli2123/LoftQ; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 21
    use_when: ClassVar[str] = (
        "you would use QLoRA, and the run is so short that its start matters: the first A and B make up for a "
        "part of the rounding, though a small one (unit 13)"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"loftq"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.iterations, int) or isinstance(self.iterations, bool) or self.iterations < 1:
            raise ValueError(f"iterations must be a whole number of at least 1, got {self.iterations!r}")

    def load_base(self, source: str | Path) -> tuple[LanguageModel, AnyTokenizer]:
        """Load the model in full precision, which the initialisation needs."""
        return load_language_model(source)

    def quantize(self, model: nn.Module) -> dict[str, nn.Module]:
        for name, layer in nf4_layers(model).items():
            if not layer.weight.is_meta:  # on the meta device there are no values to fit
                raise ValueError(
                    f"LoftQ needs the weights before they are quantised, and {name} is in four bits already; load the "
                    "model in full"
                )
        return super().quantize(model)

    def begin(self, model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
        """New Q, A and B for every layer with a LoRA."""

        def quantize(W: Tensor) -> QuantizedTensor:
            return quantize_4bit(W, self.quant_type, self.blocksize, self.double_quantization)

        for name, layer in lora_layers(model).items():
            if layer.parts:
                raise ValueError(f"LoftQ adapts whole layers, got a part of {name}; give the layer as a target")
            if name in dense:  # the head is not quantised
                begin_with_loftq(layer, weight_of(dense[name]), self.iterations, quantize)

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A QLoRA's, and how Q, A and B were fitted."""
        config, tensors = super().to_adapter(model)
        config["loftq_config"]["loftq_iter"] = self.iterations
        return config | {"init_lora_weights": "loftq"}, tensors

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        return config.get("init_lora_weights") == "loftq" and super().reads(config)

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
    ) -> tuple[LoRA, dict[str, Tensor]]:
        method, state = super().from_adapter({**config, "init_lora_weights": True}, tensors, model)
        iterations = config["loftq_config"].get("loftq_iter", 1)
        return replace(method, iterations=iterations), state  # type: ignore[call-arg]

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LoRA:
        return replace(super().sample(rng, config), iterations=rng.randint(1, 2))  # type: ignore[call-arg]
