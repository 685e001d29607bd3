"""QA-LoRA (Xu et al. 2023, arXiv:2309.14717): LoRA that can be merged into a quantised weight, which stays quantised.

The weight is stored as b-bit integers, in groups of g inputs that share a scale and a zero (section 3.2). A change can
be merged into the zeros if it is the same for all inputs of a group. So A sees only the sum of each group (section
3.3):

    y = W x + b + s B A P x,        W[i, j] = scale[i, k] * code[i, j] + zero[i, k],  k = j // g
    codes: (out, in) of b bits,  scale, zero: (out, G),  P x: (G,), the sums over the groups,  A: (r, G),  B: (out, r)

Merging replaces the zeros by `zero + s B A` and changes neither codes nor scales: the merged layer computes the same
with the same number of bits. QLoRA's s B A would have to be rounded to the steps of the integers.

The zeros are floating-point numbers; integer zero-points, as GPTQ stores them, could not represent the change. The
paper's code quantises with GPTQ and averages over the groups; here weights are rounded to the nearest step, and the
groups are summed (algorithm 1). B starts at zero, and A as in LoRA: uniform between -1/sqrt(in) and 1/sqrt(in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.linear_algebra.rank import check_rank
from lora_from_scratch.methods.lora import LoRA, LoRALinear
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import random_targets
from lora_from_scratch.methods.quantized_lora import QuantizedLoRA, quantize_linear_layers
from lora_from_scratch.quantization.low_bit import LowBitTensor, check_bits, quantize_integer
from lora_from_scratch.quantization.low_bit_linear import LowBitLinear
from lora_from_scratch.quantization.nf4_linear import quantized_layers
from lora_from_scratch.support.linear_layers import in_and_out
from lora_from_scratch.support.tape import Tape, TensorSize


def sum_groups(x: Tensor, group_size: int) -> Tensor:
    """P x, the sum of each group of inputs: what QA-LoRA's A sees (QA-LoRA, algorithm 1).

    A group is `group_size` neighbours on the last axis, from the first on; the last group may be shorter. No group is
    averaged, nor scaled in another way.

    Args:
        x: (..., in), with any number of axes before the last, or none.
        group_size: g.

    Returns:
        (..., G), with G = ceil(in / g), in the dtype of x. Gradients flow to x.
    """
    return F.pad(x, (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size)).sum(dim=-1)


def merge_into_zeros(zero: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The zeros of the merged weight (QA-LoRA, section 3.3).

    With these zeros in place of the old ones, and the same codes and scales, the layer without A and B computes what
    it computed with them: y = W x + b + s B A P x, where P x are the sums over the groups (`sum_groups`).

    Args:
        zero: (out, G), float32, added to scale * code.
        A: (r, G), in any dtype. All is computed in float32.
        B: (out, r), in any dtype.
        scaling: s, which is alpha / r already.

    Returns:
        (out, G), float32: a new tensor.
    """
    return zero + scaling * (B.float() @ A.float())


class QALoRALinear(LoRALinear):
    """LoRA on a layer of b-bit integers, with an A (r, G) that is applied to sums of inputs."""

    base: LowBitLinear

    def __init__(self, base: LowBitLinear, *arguments: Any, **options: Any) -> None:
        super().__init__(base, *arguments, **options)
        self._before: LowBitTensor | None = None  # the base's weight, while merged

    def initial_factors(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        inputs, outputs = in_and_out(self.base)
        groups = self.base.quantized.groups
        check_rank(self.rank, min(groups, outputs), "the number of groups, or of outputs")
        bound = 1 / math.sqrt(inputs)
        A = torch.empty(self.rank, groups).uniform_(-bound, bound, generator=generator)
        return A, torch.zeros(outputs, self.rank)

    def middle(self, x: Tensor, A: Tensor) -> Tensor:
        """A P x: (..., in) to (..., r)."""
        return F.linear(sum_groups(x, self.base.quantized.group_size), A)

    @property
    def merged(self) -> bool:
        return self._before is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Set the zeros to zero + s B A, in float32. Codes and scales remain the same tensors."""
        if self._before is None:
            q = self.base.quantized
            assert q.zero is not None
            zero = merge_into_zeros(q.zero, self.lora_A, self.lora_B, self.scaling)
            self.base.quantized = replace(q, zero=zero)
            self._before = q

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the zeros, bit for bit."""
        if self._before is not None:
            self.base.quantized = self._before.to(self.base.weight.device)
            self._before = None


@dataclass(frozen=True)
class QALoRA(QuantizedLoRA):
    """QA-LoRA on whole linear layers of any model; see the module for the equations.

    `adapt` quantises every linear layer except the head, including those without LoRA. A merged model stays in b bits;
    a merged *copy*, which is a plain model, is dequantised. An adapter is loaded onto the full base, which is then
    quantised again.

    PEFT has `use_qalora` for GPTQ layers; for other layers it is silently ignored (0.21). It multiplies the mean of
    each group by the number of groups instead of g, and cannot merge.

    Raises:
        ValueError: a hyperparameter is out of range (raised by the constructor); or, raised by `adapt`, a target is a
            part of a fused layer or is not quantised, the rank is larger than the number of groups, or the model is
            already quantised with other settings.
    """

    bits: int = hyperparameter(4, "bits of the weights: 2, 3, 4 or 8")
    group_size: int = hyperparameter(32, "number of inputs that share a scale and a zero")

    name: ClassVar[str] = "qa-lora"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_QALORA"  # PEFT's needs GPTQ
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-3, 2e-5, "LLaMA-7B on Alpaca (QA-LoRA, section 4.1); bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 22
    use_when: ClassVar[str] = (
        "the merged model has to stay in its 4, 3 or 2 bits, as it is when it runs in a format with group-wise "
        "scales and zeros"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"qa-lora"})
    layer: ClassVar[type[LoRALinear]] = QALoRALinear

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits, self.group_size)

    def quantize(self, model: nn.Module) -> dict[str, nn.Module]:
        for name, layer in quantized_layers(model).items():
            q = layer.quantized
            if not isinstance(q, LowBitTensor) or q.zero is None or (q.bits, q.group_size) != self._storage:
                raise ValueError(f"{name} is quantised already, in another way than by {self}: {layer}")
        return quantize_linear_layers(model, lambda name, W: quantize_integer(W, self.bits, self.group_size))

    @property
    def _storage(self) -> tuple[int, int]:
        return self.bits, self.group_size

    def _layer(self, model: nn.Module, name: str, parts: tuple[str, ...], generator: torch.Generator) -> LoRALinear:
        if parts:
            raise ValueError(f"QA-LoRA adapts whole layers, got a part of {name}; give the layer as a target")
        if not isinstance(model.get_submodule(name), LowBitLinear):
            raise ValueError(f"QA-LoRA adapts quantised layers, and {name} is not quantised; leave it out")
        return super()._layer(model, name, parts, generator)

    def _merge(self, model: nn.Module) -> None:
        super(QuantizedLoRA, self)._merge(model)  # without dequantising

    def _unmerge(self, model: nn.Module) -> None:
        super(QuantizedLoRA, self)._unmerge(model)

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Our own fields and names."""
        config, tensors = super(LoRA, self).to_adapter(model)
        del config["keep_base"]
        return config, tensors

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        return super(LoRA, cls).from_adapter(config, tensors, model)

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LoRA:
        return cls(
            rank=1,
            alpha=rng.uniform(0.1, 5),
            targets=random_targets(rng, with_parts=False),
            dropout=rng.choice([0.0, 0.1]),
            bits=rng.choice([2, 3, 4]),
            group_size=rng.choice([3, 4, 32]),
            seed=rng.randint(0, 99),
            **cls.random_parts(rng),
        )


# --- What it keeps for the backward pass ---------------------------------------------------------------


@activations.forward.register
def _(module: QALoRALinear, x: TensorSize, tape: Tape) -> TensorSize:
    y = activations.forward(module.base, x, tape)
    if module.merged:
        return y
    A, B = module.lora_A, module.lora_B
    x = tape.dropout(x, module.dropout_p, noise_width=1)
    sums = tape.add([x], TensorSize(x.rows, module.base.quantized.groups, x.width))
    h = tape.linear(sums, A, len(A))  # (rows, r)
    saved = [h] if h.width == B.element_size() else [h, TensorSize(1, B.numel(), h.width)]  # and the copy of B
    return tape.add([y, h], TensorSize(y.rows, y.columns, y.width), saved, [B])
