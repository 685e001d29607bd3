"""What can be measured of the 4-bit origin of SmolLM2's weights: Q4_1, sixteen equally spaced values per 32 weights.

The original weights are not at hand, so that what rounding them cost the model cannot be measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.quantization.nf4 import dequantize_nf4, quantize_nf4

BLOCK = 32  # weights of a row that share a scale and an offset in Q4_1


@dataclass(frozen=True)
class Origin:
    """The weights of all linear layers in the blocks. Errors are root mean squares relative to that of the weights."""

    weights: int
    most_values: int  # the largest number of different values in 32 weights
    mean_values: float
    same_again: float  # share of weights that Q4_1 changes by less than a thousandth of its step when applied again
    nf4_error: float  # of NF4 in blocks of 64
    nf4_error_gaussian: float  # the same for Gaussian numbers
    nf4_error_rounded: float  # the same for Gaussian numbers that Q4_1 has rounded before
    q4_1_error_gaussian: float  # of Q4_1 for Gaussian numbers


@dataclass(frozen=True)
class Update:
    """What becomes of a fine-tuning update W' - W if W' is rounded to Q4_1 again."""

    size: float  # root mean square of W' - W relative to that of W
    in_steps: float  # the same relative to the root mean square of Q4_1's steps
    below_half_a_step: float  # share of the weights that change by less than half a step
    codes_changed: float  # share of the weights whose value changes when W' is rounded, by more than half a step
    error: float  # root mean square of what rounding W' adds, relative to that of W' - W


def block_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights (out, in) of the linear layers in the blocks; an adapted layer has its weight in `base`."""
    for name, parameter in model.named_parameters():
        plain = name.removeprefix("inside.").replace(".base.weight", ".weight")
        if "layers." in plain and plain.endswith("_proj.weight"):
            yield plain, parameter.detach()


def q4_1(weight: Tensor) -> Tensor:
    """The weight rounded to Q4_1 by the package gguf, in float32."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q4_1
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.float().numpy(), kind), kind)).view(weight.shape)


def steps(weight: Tensor) -> Tensor:
    """The distance between neighbouring values in Q4_1, (blocks, 1)."""
    blocks = weight.reshape(-1, BLOCK)
    return (blocks.max(dim=1, keepdim=True).values - blocks.min(dim=1, keepdim=True).values) / 15


def origin(model: nn.Module) -> Origin:
    generator = torch.Generator().manual_seed(0)
    names = ("same", "square", "nf4", "gaussian", "nf4_gaussian", "nf4_rounded", "q4_1")
    sums = dict.fromkeys(names, 0.0)
    count, blocks, values, most = 0, 0, 0, 0
    for _, weight in block_weights(model):
        rows = weight.reshape(-1, BLOCK)
        different = 1 + ((rows.sort(dim=1).values.diff(dim=1)) > 1e-3 * steps(weight)).sum(dim=1)
        count, blocks, values = count + weight.numel(), blocks + len(rows), values + int(different.sum())
        most = max(most, int(different.max()))
        sums["same"] += float(((q4_1(weight).reshape(-1, BLOCK) - rows).abs() < 1e-3 * steps(weight)).sum())
        gaussian = torch.randn(weight.shape, generator=generator)
        rounded = q4_1(gaussian)
        pairs = {
            "square": (weight, 0 * weight),
            "nf4": (weight, nf4(weight)),
            "gaussian": (gaussian, 0 * gaussian),
            "nf4_gaussian": (gaussian, nf4(gaussian)),
            "nf4_rounded": (rounded, nf4(rounded)),
            "q4_1": (gaussian, rounded),
        }
        for name, (one, other) in pairs.items():
            sums[name] += float((one - other).double().square().sum())
    return Origin(
        weights=count,
        most_values=most,
        mean_values=values / blocks,
        same_again=sums["same"] / count,
        nf4_error=math.sqrt(sums["nf4"] / sums["square"]),
        nf4_error_gaussian=math.sqrt(sums["nf4_gaussian"] / sums["gaussian"]),
        nf4_error_rounded=math.sqrt(sums["nf4_rounded"] / sums["gaussian"]),
        q4_1_error_gaussian=math.sqrt(sums["q4_1"] / sums["gaussian"]),
    )


def nf4(weight: Tensor) -> Tensor:
    codes, absmax = quantize_nf4(weight)
    return dequantize_nf4(codes, absmax, weight.shape)


@torch.no_grad()
def round_again(model: nn.Module, base: nn.Module) -> Update:
    """Round the weights of a fine-tuned model to Q4_1, in place; all adapters are merged before."""
    before = dict(block_weights(base))
    sums = dict.fromkeys(("change", "weight", "step", "small", "moved", "error"), 0.0)
    count = 0
    for name, weight in block_weights(model):
        old, new = before[name], q4_1(weight)
        step = steps(old).expand(-1, BLOCK).reshape(old.shape)
        parts: dict[str, Any] = {
            "change": (weight - old).double().square(),
            "weight": old.double().square(),
            "step": step.double().square(),
            "small": (weight - old).abs() < step / 2,
            "moved": (new - old).abs() > step / 2,
            "error": (new - weight).double().square(),
        }
        for part, numbers in parts.items():
            sums[part] += float(numbers.sum())
        count += weight.numel()
        weight.copy_(new)
    return Update(
        size=math.sqrt(sums["change"] / sums["weight"]),
        in_steps=math.sqrt(sums["change"] / sums["step"]),
        below_half_a_step=sums["small"] / count,
        codes_changed=sums["moved"] / count,
        error=math.sqrt(sums["error"] / sums["change"]),
    )
