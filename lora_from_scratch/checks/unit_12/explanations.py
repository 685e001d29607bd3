"""Unit 12, quantisation: what can be said of a wrong answer that is in no bank."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_from_scratch.checks.comparing import as_tensor, dtypes_differ, is_number, same
from lora_from_scratch.checks.exercise import Case
from lora_from_scratch.checks.explaining import Explanation
from lora_from_scratch.checks.observation import Data, Seen
from lora_from_scratch.quantization.nf4 import as_codebook, unpack_nibbles


def explain_int8(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which of the results is wrong, and the first wrong integer."""
    if not isinstance(expected.value, dict) or seen.value is None:
        return None
    if not isinstance(seen.value, dict):
        return "two results", "Return two results: the integers q, and the absmax."
    x, q, wanted = _tensor(case, "x").float(), seen.value["q"], _tensor_of(expected.value["q"])
    absmax = x.abs().max()
    if found := _shape(q, tuple(x.shape), "q"):
        return found
    assert isinstance(q, Tensor)
    if not same(seen.value["absmax"], absmax):
        return "another absmax", (
            f"The second result is the largest absolute value of x, here {float(absmax):.6g}, as a tensor without axes."
        )
    if not same(q, wanted):
        place = int((q.double() != wanted.double()).flatten().nonzero()[0])
        number, given = float(x.flatten()[place]), float(q.flatten()[place])
        return "another integer", (
            f"The absmax is right, but q is not. Number {place}, counted from 0, is {number:.6g}. The absmax, "
            f"{float(absmax):.6g}, becomes 127, so it has to become {_scaled(number, float(absmax))}, rounded; "
            f"yours is {given:.6g}."
        )
    if seen.value["dtypes"] != expected.value["dtypes"]:
        return "another dtype", "The numbers are right, but q should be int8 and the absmax float32."
    return None


def explain_absmax(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first wrong block."""
    y, wanted, size = seen.value, expected.value, case.inputs.get("blocksize", 64)
    if y is None or not isinstance(wanted, Tensor) or not isinstance(size, int):
        return None
    if found := _shape(y, tuple(wanted.shape), "the result, with one number for each block,"):
        return found
    assert isinstance(y, Tensor)
    flat = _tensor(case, "x").reshape(-1).float()
    for block, (one, other) in enumerate(zip(y, wanted, strict=True)):
        if not same(one, other):
            last = min(len(flat), (block + 1) * size) - 1
            return "another block", (
                f"Block {block}, counted from 0, has the numbers {block * size} to {last} of x, read row by row. Their "
                f"largest absolute value is {float(other):.6g}, but yours is {float(one):.6g}."
            )
    return None


def explain_codebook(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The number of values, the order, the ends, zero, and which half is wrong."""
    y, wanted = seen.value, expected.value
    assert isinstance(wanted, Tensor)
    if y is None:
        return None
    if found := _shape(y, (16,), "the codebook"):
        return found
    assert isinstance(y, Tensor)
    if not bool(y.isfinite().all()):
        return (
            "an infinite value",
            "Some values are NaN or infinite. The quantile of the probability 0 or 1 is infinite.",
        )
    if not bool((y[1:] > y[:-1]).all()):
        return "not ascending", "The values should ascend, each larger than the one before it. Yours do not."
    if float(y[7]) != 0:
        return "no zero", f"Code 7 should be exactly 0, but yours is {float(y[7]):.6g}."
    if not same(y[15], wanted[15]):
        return "another range", f"The largest value should be 1, but yours is {float(y[15]):.6g}."
    halves = [same(y[:7], wanted[:7], 2e-6), same(y[8:], wanted[8:], 2e-6)]
    if same(y, wanted, 1e-3) and not all(halves):
        return "too few digits", (
            f"Your values are nearly right, off by at most {float((y.double() - wanted.double()).abs().max()):.2g}. "
            "They have to be right to six digits: compute them, with p as it is given."
        )
    if halves[0] != halves[1]:
        wrong = "positive" if halves[0] else "negative"
        return (
            "half of the values",
            f"Only your {wrong} values are wrong. How many are there, and what are their steps?",
        )
    if not any(halves):
        return "both halves", (
            "Zero and the largest value are right, but neither the positive nor the negative values between. Which "
            "probabilities do you take, and how do you get from them to the values?"
        )
    return None


def explain_packed(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first wrong byte."""
    y, wanted = seen.value, expected.value
    if y is None or not isinstance(wanted, Tensor):
        return None
    if found := _shape(y, tuple(wanted.shape), "the result, a column of bytes,"):
        return found
    assert isinstance(y, Tensor)
    codes = _tensor(case, "codes").reshape(-1).tolist()
    for place, (one, other) in enumerate(zip(y.flatten().tolist(), wanted.flatten().tolist(), strict=True)):
        if one != other:
            even, odd = codes[2 * place : 2 * place + 2]
            return "another byte", (
                f"Byte {place}, counted from 0, holds the codes {even} and {odd}, in bits {even:04b} and {odd:04b}. "
                f"Joined they are {other:08b}, which is {other}; yours is {one}."
            )
    return None


def explain_quantized(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which of the results is wrong, and the first weight with a wrong code."""
    if not isinstance(expected.value, list) or seen.value is None:
        return None
    if not isinstance(seen.value, list) or len(seen.value) != 2:
        return "two results", "Return two results: the packed codes, and the absmax of each block."
    (packed, absmax), (wanted, scales) = seen.value, map(_tensor_of, expected.value)
    if found := _shape(absmax, tuple(scales.shape), "absmax"):
        return found
    if not same(absmax, scales):
        return "another absmax", "The scales, your second result, are wrong: not the absmax of each block."
    if found := _shape(packed, tuple(wanted.shape), "packed"):
        return found
    assert isinstance(packed, Tensor)
    if dtypes_differ(seen.value, expected.value):
        return "another dtype", "packed should be uint8, and absmax float32."
    codes, right = unpack_nibbles(packed), unpack_nibbles(wanted)
    return _wrong_code(case, codes, right, scales) if not torch.equal(codes, right) else None


def _wrong_code(case: Case, codes: Tensor, right: Tensor, scales: Tensor) -> Explanation:
    weight, size = _tensor(case, "weight").reshape(-1).float(), case.inputs.get("blocksize", 64)
    assert isinstance(size, int)
    codebook = case.inputs.get("codebook")
    values = as_codebook(codebook if isinstance(codebook, Tensor) else None, codes.device)
    place = int((codes != right).nonzero()[0])
    code = int(codes[place])
    if place == len(weight):
        return "the padding", (
            f"All codes are right but the last: the padding is a weight of 0, which has the code {int(right[place])}; "
            f"yours has the code {code}."
        )
    scale = float(scales[place // size])
    z = float(weight[place]) / scale if scale > 0 else 0.0
    return "another code", (
        f"The scales are right. Weight {place}, counted from 0, is {float(weight[place]):.6g}, and {z:.6g} when its "
        f"block is scaled. You give it the code {code}, which stands for {float(values[code]):.6g}, but "
        f"{float(values[int(right[place])]):.6g} is the nearest value, or as near and lower."
    )


def explain_dequantized(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """The first wrong weight, with its code, its value and its scale."""
    y, wanted, size = seen.value, expected.value, case.inputs["blocksize"]
    if y is None or not isinstance(wanted, Tensor) or not isinstance(size, int):
        return None
    if found := _shape(y, tuple(wanted.shape), "the weight"):
        return found
    assert isinstance(y, Tensor)
    if y.dtype != wanted.dtype:
        return "another dtype", f"The weight should be in {wanted.dtype}, as asked for, but yours is in {y.dtype}."
    off = (y.double() - wanted.double()).abs() > 1e-4 * wanted.double().abs().max()
    off |= ~y.double().isfinite()
    if not bool(off.any()):
        return None
    place = int(off.flatten().nonzero()[0])
    codes, scales = unpack_nibbles(_tensor(case, "packed")), _tensor(case, "absmax")
    codebook = case.inputs.get("codebook")
    values = as_codebook(codebook if isinstance(codebook, Tensor) else None, codes.device)
    code, scale = int(codes[place]), float(scales[place // size])
    return "another weight", (
        f"Weight {place}, counted from 0 and row by row, has the code {code}, which stands for "
        f"{float(values[code]):.6g}, and its block has the scale {scale:.6g}. Yours is {float(y.flatten()[place]):.6g}."
    )


def explain_bits(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """What the codes and the scales cost."""
    if expected.raised or not is_number(seen.value) or as_tensor(seen.value).ndim:
        return None
    given = {"bits": 4, "blocksize": 64, "double_quant": False, "nested_blocksize": 256} | dict(case.inputs)
    size, nested = given["blocksize"], given["nested_blocksize"]
    if given["double_quant"]:
        scales = (
            f"one scale of 8 bits for each {size} weights, and a second scale of 32 bits for each {nested} scales, "
            f"that is for each {int(str(size)) * int(str(nested)):,} weights"
        )
    else:
        scales = f"one scale of 32 bits for each {size} weights"
    return "another cost", (
        f"Here a weight has a code of {given['bits']} bits, and there is {scales}. What is each weight's share? Your "
        f"result is {float(as_tensor(seen.value)):.6g} bits."
    )


def explain_double(case: Case, seen: Seen, expected: Seen) -> Explanation:
    """Which of the three results is wrong."""
    one, other = seen.value, expected.value
    if not isinstance(other, list) or one is None:
        return None
    if not isinstance(one, list) or len(one) != 3:
        return "three results", "Return three results: the codes, the second scales and the offset."
    if not same(one[2], other[2]):
        return (
            "another offset",
            "The offset, your third result, is wrong. It is one number: the mean of all the scales.",
        )
    if found := _shape(one[1], tuple(_tensor_of(other[1]).shape), "the second scales"):
        return found
    if not same(one[1], other[1]):
        return "other second scales", (
            "The offset is right, but the second scales are not: each is the largest absolute value of what is left of "
            "its block when the offset is subtracted."
        )
    if found := _shape(one[0], tuple(_tensor_of(other[0]).shape), "the codes"):
        return found
    if as_tensor(one[0]).dtype != torch.uint8:
        return "another dtype", f"The codes should be uint8, but yours are {as_tensor(one[0]).dtype}."
    if dtypes_differ(one, other):
        return "another dtype", "The second scales and the offset should be float32."
    if same(one[0], other[0]):
        return None
    return "other codes", "The offset and the second scales are right, but the codes are not. Of what do you take them?"


def _shape(value: Data, shape: tuple[int, ...], of: str) -> Explanation:
    if value is None:
        return None
    if not is_number(value):
        return "no tensor", f"{of[:1].upper()}{of[1:]} should be a tensor of shape {shape}."
    given = tuple(as_tensor(value).shape)
    if given == shape:
        return None
    return "another shape", f"The shape of {of} should be {shape}, but yours is {given}."


def _scaled(number: float, absmax: float) -> str:
    return f"{number:.6g} * 127 / {absmax:.6g} = {127 * number / absmax:.6g}" if absmax else "0"


def _tensor(case: Case, name: str) -> Tensor:
    return _tensor_of(case.inputs[name])


def _tensor_of(value: Data) -> Tensor:
    assert isinstance(value, Tensor)
    return value
