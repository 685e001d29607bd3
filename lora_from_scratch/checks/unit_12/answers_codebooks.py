"""Unit 12, quantisation: mistakes that people make with codebooks, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.quantization.int8 import blockwise_absmax
from lora_from_scratch.quantization.nf4 import as_codebook, normalize_blocks, pack_nibbles, quantize_nf4

TINY = 1e-30

# --- nf4_codebook ------------------------------------------------------------------------------------

P = 0.9677083


def sides(p: float, positive: int = 9, negative: int = 8) -> tuple[Tensor, Tensor]:
    """The quantiles of both halves, ascending."""
    halves = [torch.special.ndtri(torch.linspace(p, 0.5, n).double()[:-1]) for n in (positive, negative)]
    return -halves[1], halves[0].flip(0)


def joined(negative: Tensor, positive: Tensor) -> Tensor:
    values = torch.cat([negative, torch.zeros(1).double(), positive])
    return (values / values.max()).float()


@right("nf4_codebook")
def by_the_standard_library() -> Tensor:
    quantile = NormalDist().inv_cdf
    positive = [quantile(0.5 + (P - 0.5) * k / 8) for k in range(1, 9)]
    negative = [-quantile(0.5 + (P - 0.5) * k / 7) for k in range(7, 0, -1)]
    return torch.tensor([value / positive[-1] for value in [*negative, 0.0, *positive]])


@right("nf4_codebook")
def by_the_inverse_error_function() -> Tensor:
    p = 1 - (1 / 32 + 1 / 30) / 2
    upper = torch.erfinv(2 * torch.linspace(0.5, p, 9, dtype=torch.float64) - 1)
    lower = torch.erfinv(2 * torch.linspace(0.5, p, 8, dtype=torch.float64) - 1)
    return (torch.cat([-lower.flip(0), upper[1:]]) / upper.max()).float()


@right("nf4_codebook")
def two_rows_of_probabilities_in_numpy() -> np.ndarray:
    quantile = np.vectorize(NormalDist().inv_cdf)
    upper, lower = (quantile(0.5 + (P - 0.5) * np.arange(n + 1) / n) for n in (8, 7))
    return (np.concatenate([-lower[:0:-1], upper]) / upper[-1]).astype(np.float32)


@right("nf4_codebook")
def by_bisection() -> Tensor:
    """The quantiles by halving intervals: of the normal distribution only its `erf` is needed."""
    steps = torch.cat([-torch.arange(7, 0, -1) / 7, torch.zeros(1), torch.arange(1, 9) / 8]).double()
    low, high = torch.zeros(16).double(), torch.full((16,), 5.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        too_low = torch.erf(middle / 2**0.5) < 2 * (P - 0.5) * steps.abs()
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    values = steps.sign() * low
    return (values / values.max()).float()


@wrong("nf4_codebook", "You have rounded the values to four digits. Compute them: they have to be right to six.")
def four_digits() -> Tensor:
    return (joined(*sides(P)) * 10**4).round() / 10**4


@wrong(
    "nf4_codebook",
    "The negative values are those of equal steps of the *positive* half. They have seven steps of their own.",
)
def the_same_steps_in_both_halves() -> Tensor:
    positive = sides(P)[1]
    return joined(-positive.flip(0)[:7], positive)


@wrong(
    "nf4_codebook", "These are equal steps. Normal weights are dense around zero: use equal *probabilities* instead."
)
def equal_steps() -> Tensor:
    return torch.linspace(-1, 1, 16)


@wrong("nf4_codebook", "You have eight negative values and seven positive ones: it has to be the reverse.")
def the_halves_swapped() -> Tensor:
    negative, positive = sides(P)
    return joined(-positive.flip(0), -negative.flip(0))


@wrong(
    "nf4_codebook",
    "Your 16 quantiles are symmetric, so none of them is 0. Padding and pruned weights need an exact zero: that is why "
    "there are two halves.",
)
def no_zero() -> Tensor:
    values = torch.special.ndtri(torch.linspace(1 - P, P, 16).double())
    return (values / values.max()).float()


@wrong("nf4_codebook", "These are the unscaled quantiles. The codebook has to fit into -1 to 1: scale it.")
def not_scaled() -> Tensor:
    negative, positive = sides(P)
    return torch.cat([negative, torch.zeros(1).double(), positive]).float()


@wrong("nf4_codebook", "The values are right, but in descending order. Code 0 is the smallest value.")
def descending() -> Tensor:
    return joined(*sides(P)).flip(0)


@wrong("nf4_codebook", "The values are right, but not in order: they have to ascend, and code 7 has to be 0.")
def in_three_pieces() -> Tensor:
    negative, positive = sides(P)
    return (torch.cat([torch.zeros(1).double(), positive, negative]) / positive.max()).float()


@wrong("nf4_codebook", "Each half has kept its 0.5, whose quantile is 0, so the codebook contains zero three times.")
def zero_three_times() -> Tensor:
    negative, positive = sides(P)
    zero = torch.zeros(1).double()
    return joined(torch.cat([negative, zero]), torch.cat([zero, positive]))


@wrong(
    "nf4_codebook",
    "You map a number to its probability. A quantile is the inverse: it maps a probability to a number.",
)
def probabilities_instead_of_quantiles() -> Tensor:
    positive = torch.special.ndtr(torch.linspace(P, 0.5, 9).double()[:-1]).flip(0)
    negative = -torch.special.ndtr(torch.linspace(P, 0.5, 8).double()[:-1])
    return joined(negative, positive)


@wrong("nf4_codebook", "Your outermost probability is not p: check where the two rows of probabilities begin.")
def another_p() -> Tensor:
    return joined(*sides(1 - 1 / 32))


@wrong("nf4_codebook", "Each half has eight values besides the zero. That makes 17, but four bits have only 16 codes.")
def seventeen() -> Tensor:
    return joined(*sides(P, 9, 9))


@wrong("nf4_codebook", "You drop the outermost probability of each row instead of the 0.5 at its end.")
def drops_the_wrong_end() -> Tensor:
    positive = torch.special.ndtri(torch.linspace(P, 0.5, 9).double()[1:]).flip(0)
    negative = -torch.special.ndtri(torch.linspace(P, 0.5, 8).double()[1:])
    return joined(negative, positive)


@wrong("nf4_codebook", caught_by="returns nothing")
def forgets_to_return() -> None:
    joined(*sides(P))


# --- quantize_nf4 ------------------------------------------------------------------------------------

Quantised = tuple[Tensor, Tensor]


def book(codebook: Tensor | None) -> Tensor:
    return as_codebook(codebook, torch.device("cpu"))


def nearest(z: Tensor, codebook: Tensor, right: bool = False) -> Tensor:
    values, code_of = codebook.sort(stable=True)
    return code_of[torch.bucketize(z, (values[1:] + values[:-1]) / 2, right=right)]


def packed_up(codes: Tensor, filler: int = 7) -> Tensor:
    return pack_nibbles(F.pad(codes, (0, codes.numel() % 2), value=filler))


@right("quantize_nf4")
def by_all_distances(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    """A table of all distances, and the smallest of each row; the first of equals is the lower one."""
    values, code_of = as_codebook(codebook, weight.device).sort(stable=True)
    absmax = blockwise_absmax(weight, blocksize)
    scale = absmax.repeat_interleave(blocksize)[: weight.numel()]
    z = weight.reshape(-1).float() / torch.where(scale > 0, scale, 1.0)
    z = F.pad(z, (0, z.numel() % 2))
    codes = code_of[(z[:, None] - values).abs().argmin(dim=1)].to(torch.uint8).view(-1, 2)
    return codes[:, :1] * 16 + codes[:, 1:], absmax


@right("quantize_nf4")
def counts_the_midpoints_below(
    weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    table = as_codebook(codebook, weight.device).numpy().astype(np.float64)
    order = np.argsort(table, kind="stable")
    midpoints = (table[order][1:] + table[order][:-1]) / 2
    absmax = blockwise_absmax(weight, blocksize).numpy()
    z = normalize_blocks(weight, torch.from_numpy(absmax), blocksize).numpy()
    z = np.append(z, [0.0] * (len(z) % 2))
    codes = order[(z[:, None] > midpoints).sum(axis=1)].astype(np.uint8)
    return (codes[::2] << 4 | codes[1::2])[:, None], absmax


@right("quantize_nf4")
def weight_by_weight(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    """With Python's `min`, which returns the first of equals: the values are tried in ascending order."""
    table = as_codebook(codebook, weight.device).tolist()
    ascending = sorted(range(16), key=table.__getitem__)
    absmax = blockwise_absmax(weight, blocksize)
    codes = []
    for z in [*normalize_blocks(weight, absmax, blocksize).tolist(), *[0.0] * (weight.numel() % 2)]:
        codes.append(min(ascending, key=lambda code: abs(table[code] - z)))
    pairs = zip(codes[::2], codes[1::2], strict=True)
    return torch.tensor([[16 * even + odd] for even, odd in pairs], dtype=torch.uint8), absmax


@right("quantize_nf4")
def block_by_block_with_searchsorted(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    values, code_of = as_codebook(codebook, weight.device).sort(stable=True)
    borders = values[:-1].add(values[1:]).div(2)
    scales = blockwise_absmax(weight, blocksize)
    codes = []
    for block, scale in zip(weight.reshape(-1).float().split(blocksize), scales, strict=True):
        scaled = block * (1 / scale if len(block) == blocksize else 1.0) if scale > 0 else torch.zeros_like(block)
        scaled = scaled / scale if scale > 0 and len(block) < blocksize else scaled
        codes.append(code_of[torch.searchsorted(borders, scaled)])
    flat = torch.cat(codes)
    if len(flat) % 2:
        flat = torch.cat([flat, code_of[torch.searchsorted(borders, torch.zeros(1))]])
    return pack_nibbles(flat), scales


@wrong("quantize_nf4", "You accept a codebook with another number of values than 16. Raise a ValueError.")
@changed(
    quantize_nf4,
    (
        "as_codebook(codebook, weight.device)",
        "(nf4_codebook() if codebook is None else F.pad(codebook, (0, max(0, 16 - len(codebook))), value=9.0))",
    ),
)
def any_codebook(): ...


@wrong(
    "quantize_nf4", "You scale in the dtype of the weight. In half precision the quotients are too coarse: use float32."
)
@changed(
    quantize_nf4,
    (
        "z = normalize_blocks(weight, absmax, blocksize)",
        "z = normalize_blocks(weight, absmax, blocksize).to(weight.dtype).float()",
    ),
)
def in_the_dtype_of_the_weight(): ...


@wrong("quantize_nf4", "You use one scale for the whole weight. Every block has its own.")
def one_scale_for_all(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    absmax = blockwise_absmax(weight, blocksize).max()
    return packed_up(nearest(weight.reshape(-1) / absmax, book(codebook))), absmax.view(1)


@wrong(
    "quantize_nf4",
    "You look for the next lower value, not for the nearest: the border between two codes is the midpoint of their "
    "values.",
)
def next_value_below(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    absmax = blockwise_absmax(weight, blocksize)
    z = normalize_blocks(weight, absmax, blocksize)
    values, code_of = book(codebook).sort(stable=True)
    return packed_up(code_of[(torch.bucketize(z, values, right=True) - 1).clamp(0, 15)]), absmax


@wrong(
    "quantize_nf4",
    "Of two values that are equally near you take the one with the smaller code. A tie goes to the lower *value*: a "
    "codebook need not be in ascending order.",
)
def ties_go_to_the_smaller_code(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    absmax = blockwise_absmax(weight, blocksize)
    z = F.pad(normalize_blocks(weight, absmax, blocksize), (0, weight.numel() % 2))
    codes = (z[:, None] - as_codebook(codebook, weight.device)).abs().argmin(dim=1)
    return pack_nibbles(codes), absmax


@wrong("quantize_nf4", "A weight exactly between two values gets the lower one; yours gets the upper one.")
@changed(quantize_nf4, ("bucketize(z, midpoints)", "bucketize(z, midpoints, right=True)"))
def ties_go_up(): ...


@wrong(
    "quantize_nf4",
    "In a block of zeros you divide 0 by 0. The result is NaN, which is sorted behind the largest value: a zero has to "
    "get the code of zero.",
)
def zero_over_zero(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    absmax = blockwise_absmax(weight, blocksize)
    z = weight.reshape(-1) / absmax.repeat_interleave(blocksize)[: weight.numel()]
    return packed_up(nearest(z, book(codebook))), absmax


@wrong(
    "quantize_nf4",
    "In a block of zeros you divide 0 by 0. The result is NaN, for which `argmin` returns the first index, code 0, "
    "which stands for -1. The code of 0 is 7, so the bytes are 0x77.",
)
def zero_over_zero_by_argmin(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    absmax = blockwise_absmax(weight, blocksize)
    z = weight.reshape(-1) / absmax.repeat_interleave(blocksize)[: weight.numel()]
    return packed_up((z[:, None] - book(codebook)).abs().argmin(dim=1)), absmax


@wrong("quantize_nf4", "You use NF4's values whatever codebook is given.")
@changed(quantize_nf4, ("as_codebook(codebook, weight.device)", "nf4_codebook()"))
def always_nf4(): ...


@wrong(
    "quantize_nf4",
    "You return indices into the sorted codebook. A code is an index into the codebook as it was given, and FP4's is "
    "not sorted.",
)
@changed(quantize_nf4, ("code_of[interval]", "interval"))
def places_in_the_sorted_table(): ...


@wrong(
    "quantize_nf4",
    "You assume that the codebook is sorted. FP4's is not: a search among unsorted midpoints returns arbitrary "
    "results.",
)
def does_not_sort(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    absmax = blockwise_absmax(weight, blocksize)
    z = normalize_blocks(weight, absmax, blocksize)
    values = book(codebook)
    return packed_up(torch.bucketize(z, (values[1:] + values[:-1]) / 2)), absmax


@wrong(
    "quantize_nf4",
    "You compare the weights themselves with the codebook, whose values are between -1 and 1: divide by the scale.",
)
@changed(quantize_nf4, ("normalize_blocks(weight, absmax, blocksize)", "weight.reshape(-1)"))
def without_the_scale(): ...


@wrong("quantize_nf4", "You scale by the standard deviation. The largest weight of a block has to become 1 or -1.")
def by_the_standard_deviation(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    blockwise_absmax(weight, blocksize)
    spread = torch.stack([block.float().square().mean().sqrt() for block in weight.reshape(-1).split(blocksize)])
    return packed_up(nearest(normalize_blocks(weight, spread, blocksize), book(codebook))), spread


@wrong("quantize_nf4", "You read the weight column by column. Read it row by row.")
def column_by_column(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    flat = weight.T.reshape(-1) if weight.ndim == 2 else weight
    absmax = blockwise_absmax(flat, blocksize)
    return packed_up(nearest(normalize_blocks(flat, absmax, blocksize), book(codebook))), absmax


@wrong("quantize_nf4", "The codes are right, but each of them fills a whole byte. Two codes share a byte.")
def a_byte_for_each_code(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    absmax = blockwise_absmax(weight, blocksize)
    codes = nearest(normalize_blocks(weight, absmax, blocksize), book(codebook))
    return codes.to(torch.uint8)[:, None], absmax


@wrong(
    "quantize_nf4",
    "You keep the padding of the last block: there are more bytes than the weights need. Cut to n before you pack.",
)
def keeps_the_filling(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    absmax = blockwise_absmax(weight, blocksize)
    filled = F.pad(weight.reshape(-1).float(), (0, -weight.numel() % blocksize)).view(-1, blocksize)
    blocks = filled / absmax.clamp(min=TINY)[:, None]
    return packed_up(nearest(blocks.reshape(-1), book(codebook))), absmax


@wrong(
    "quantize_nf4",
    "If the number of weights is odd, append a weight of 0. You append a *code* of 0, which is the smallest value.",
)
def fills_up_with_code_0(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    absmax = blockwise_absmax(weight, blocksize)
    codes = nearest(normalize_blocks(weight, absmax, blocksize), book(codebook))
    return packed_up(codes, filler=0), absmax


@wrong("quantize_nf4", "The second result is the inverse of the scale. Store the absmax itself.")
@changed(quantize_nf4, ("[interval]), absmax", "[interval]), 1 / absmax.clamp(min=TINY)"))
def stores_the_inverse(): ...


@wrong("quantize_nf4", caught_by="no error")
def takes_anything(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    values = book(codebook)
    flat = weight.reshape(-1).float().nan_to_num(0, 0, 0)
    flat = flat if len(flat) else torch.zeros(1)
    absmax = torch.stack([block.abs().max() for block in flat.split(blocksize)])
    z = flat / absmax.clamp(min=TINY).repeat_interleave(blocksize)[: len(flat)]
    return packed_up(nearest(z, values)), absmax


@wrong("quantize_nf4", caught_by="raises")
def cannot_take_a_short_block(weight: Tensor, blocksize: int = 64, codebook: Tensor | None = None) -> Quantised:
    absmax = blockwise_absmax(weight, blocksize)
    z = weight.reshape(-1, blocksize) / absmax.clamp(min=TINY)[:, None]
    return packed_up(nearest(z.reshape(-1), book(codebook))), absmax
