"""Unit 19: mistakes that people make, and other right ways. LQ-LoRA's split."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.lq_lora import split, squared_error, weighted_factors

# --- split -------------------------------------------------------------------------------------------


@right("split")
def a_list_of_iterations(W, rank, quantize, iterations=5, weighting=None):
    W = W.detach().to(torch.float32)
    history = []
    for _ in range(iterations):
        target = W - history[-1][1].dequantize() if history else W
        A, B = weighted_factors(target, rank, weighting)
        Q = quantize(W - B @ A)
        history.append((squared_error(W - Q.dequantize() - B @ A, weighting), Q, A, B))
        if len(history) > 1 and history[-1][0] >= history[-2][0]:
            return history[-2][1:]
    return history[-1][1:]


@right("split")
def recursive(W, rank, quantize, iterations=5, weighting=None, start=None, before=None):
    W = W.detach().float()
    A, B = weighted_factors(W if start is None else W - start, rank, weighting)
    Q = quantize(W - B @ A)
    error = squared_error(W - Q.dequantize() - B @ A, weighting)
    if before is not None and error >= before[0]:
        return before[1]
    if iterations == 1:
        return Q, A, B
    return recursive(W, rank, quantize, iterations - 1, weighting, Q.dequantize(), (error, (Q, A, B)))


@right("split")
def with_its_own_svd(W, rank, quantize, iterations=5, weighting=None):
    W = W.detach().double()
    row, column = weighting or (torch.ones(W.shape[0]), torch.ones(W.shape[1]))
    row, column = row.double()[:, None], column.double()[None]
    kept, least, rest = None, None, W
    while iterations > 0:
        U, S, V = torch.linalg.svd(row * rest * column)
        A, B = (V[:rank] / column).float(), (U[:, :rank] * S[:rank] / row).float()
        Q = quantize((W - B.double() @ A.double()).float())
        rest = W - Q.dequantize().double()
        error = (row * (rest - B.double() @ A.double()) * column).norm().item()
        if least is not None and not error < least:
            return kept
        kept, least, iterations = (Q, A, B), error, iterations - 1
    return kept


@right("split")
def in_numpy(W, rank, quantize, iterations=5, weighting=None):
    W = W.detach().float().numpy()
    row, column = (one.numpy() for one in weighting) if weighting else (np.ones(len(W)), np.ones(W.shape[1]))
    scale, errors, results, Q = np.outer(row, column).astype(np.float32), [], [], np.zeros_like(W)
    for _ in range(iterations):
        U, S, V = np.linalg.svd(scale * (W - Q), full_matrices=False)
        A, B = V[:rank] / column, U[:, :rank] * S[:rank] / row[:, None]
        A, B = torch.from_numpy(A).float(), torch.from_numpy(B).float()
        results.append((quantize(torch.from_numpy(W) - B @ A), A, B))
        Q = results[-1][0].dequantize().numpy()
        errors.append(float(((scale * (W - Q - (B @ A).numpy())) ** 2).sum()))
        if errors[-1] != min(errors) or errors.index(errors[-1]) != len(errors) - 1:
            break
    return results[int(np.argmin(errors))]


@right("split")
def balanced_differently(W, rank, quantize, iterations=5, weighting=None):
    Q, A, B = split(W, rank, quantize, iterations, weighting)
    U, R = torch.linalg.qr(B)
    return Q, R @ A, U


@wrong("split", "You return the last iteration, which is the one in which the error rose. Return the one before.")
@changed(split, ("            break\n", "            return Q, A, B\n"))
def the_last_one(): ...


@wrong("split", "You do not stop when the error rises. You go on, and return the best of all iterations.")
@changed(split, ("            break\n", "            continue\n"))
def goes_on(): ...


@wrong("split", "You do all iterations and return the last, whatever its error is.")
def always_all(W, rank, quantize, iterations=5, weighting=None):
    W = W.detach().float()
    dequantized = torch.zeros_like(W)
    for _ in range(iterations):
        A, B = weighted_factors(W - dequantized, rank, weighting)
        Q = quantize(W - B @ A)
        dequantized = Q.dequantize()
    return Q, A, B


@wrong("split", "You begin with Q = quant(W), as LoftQ does. LQ-LoRA begins with Q = 0, and takes A and B first.")
@changed(split, ("torch.zeros_like(W)", "quantize(W).dequantize()"))
def begins_with_the_quantised_weight(): ...


@wrong(
    "split", "You take the two steps in LoftQ's order. A and B come first, and Q is what `quantize` makes of the rest."
)
def the_order_of_loftq(W, rank, quantize, iterations=5, weighting=None):
    W = W.detach().float()
    best, least, low_rank = None, math.inf, torch.zeros_like(W)
    for _ in range(iterations):
        Q = quantize(W - low_rank)
        A, B = weighted_factors(W - Q.dequantize(), rank, weighting)
        low_rank = B @ A
        error = squared_error(W - Q.dequantize() - low_rank, weighting)
        if error >= least:
            break
        best, least = (Q, A, B), error
    return best


@wrong("split", "You keep Q of the best iteration, but return the A and B of the last one.")
@changed(split, ("    return best\n", "    return best[0], A, B\n"))
def newer_factors(): ...


@wrong("split", "You keep A and B of the best iteration, but return the Q of the last one.")
@changed(split, ("    return best\n", "    return Q, *best[1:]\n"))
def newer_Q(): ...


@wrong("split", "The weighting is not used in your factors.")
@changed(split, ("weighted_factors(W - quantized, rank, weighting)", "weighted_factors(W - quantized, rank)"))
def unweighted_factors(): ...


@wrong("split", "The weighting is not used in your errors, so that other iterations count as better.")
@changed(split, ("squared_error(W - quantized - B @ A, weighting)", "squared_error(W - quantized - B @ A)"))
def unweighted_errors(): ...


@wrong("split", "You quantise W each time, not what A and B leave of it.")
@changed(split, ("quantize(W - B @ A)", "quantize(W)"))
def quantises_the_whole(): ...


@wrong("split", "Every iteration of yours starts from Q = 0 again, so that all have the same A and B.")
@changed(split, ("weighted_factors(W - quantized, rank", "weighted_factors(W, rank"))
def always_from_zero(): ...


@wrong("split", "Your error leaves out B A.")
@changed(split, ("squared_error(W - quantized - B @ A, weighting)", "squared_error(W - quantized, weighting)"))
def error_without_the_low_rank_part(): ...


@wrong("split", "You do one iteration more than you may.")
@changed(split, ("range(iterations)", "range(iterations + 1)"))
def one_too_many(): ...


@wrong("split", "You always do five iterations at most. Their largest number is an argument.")
@changed(split, ("range(iterations)", "range(5)"))
def always_five(): ...


@wrong("split", "Without a number of iterations, yours does another number than five.")
@changed(split, ("iterations: int = 5", "iterations: int = 10"))
def another_default(): ...


@wrong("split", "You return the dequantised Q. What `quantize` returned is wanted: it is what gets stored.")
@changed(split, ("best, least = (Q, A, B), error", "best, least = (quantized, A, B), error"))
def a_dequantised_Q(): ...


@wrong("split", "You return B before A.")
@changed(split, ("best, least = (Q, A, B), error", "best, least = (Q, B, A), error"))
def B_first(): ...


@wrong(
    "split",
    "You call `quantize` twice per iteration. It is slow, and may be random: call it once, and keep the result.",
)
@changed(split, ("quantized = Q.dequantize()", "quantized = quantize(W - B @ A).dequantize()"))
def quantises_twice(): ...


@wrong("split", "A and B are part of a graph that reaches back to W. Detach W first.")
@changed(split, ("W.detach().float()", "W.float()"))
def with_a_gradient(): ...


@wrong("split", "You compute in W's 16-bit type, for which there is no SVD. Convert W to float32.")
@changed(split, ("W.detach().float()", "W.detach()"))
def in_the_dtype_of_W(): ...


@wrong("split", "Your rank is always the full one. A and B have r rows and columns.")
@changed(
    split,
    ("weighted_factors(W - quantized, rank, weighting)", "weighted_factors(W - quantized, min(W.shape), weighting)"),
)
def full_rank(): ...
