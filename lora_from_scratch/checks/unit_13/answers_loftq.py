"""Unit 13, QLoRA: mistakes that people make with LoftQ, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.loftq import begin_with_loftq, best_factors, loftq_init
from lora_from_scratch.quantization.quantized_tensor import quantize_4bit

# --- loftq_init --------------------------------------------------------------------------------------


def ready(W: Tensor, rank: int, iterations: int) -> Tensor:
    if W.ndim != 2 or not 1 <= rank <= min(W.shape) or iterations < 1:
        raise ValueError("a matrix, a rank from 1 to its smaller side, at least one iteration")
    return W.detach().float()


@right("loftq_init")
def all_of_s_in_b(W, rank, iterations=1, quantize=quantize_4bit):
    W = ready(W, rank, iterations)
    A, B = torch.zeros(rank, W.shape[1]), torch.zeros(W.shape[0], rank)
    while iterations > 0:
        Q = quantize(W - B @ A)
        U, S, Vh = torch.linalg.svd(W - Q.dequantize())
        A, B = Vh[:rank], U[:, :rank] * S[:rank]
        iterations -= 1
    return Q, A, B


@right("loftq_init")
def by_the_eigenvectors(W, rank, iterations=1, quantize=quantize_4bit):
    """The best A are the eigenvectors of E^T E; then B = E A^T."""
    W = ready(W, rank, iterations)
    Q = quantize(W)
    for iteration in range(iterations):
        error = (W - Q.dequantize()).double()
        A = torch.linalg.eigh(error.T @ error).eigenvectors[:, -rank:].T
        B = error @ A.T
        if iteration < iterations - 1:
            Q = quantize(W - (B @ A).float())
    return Q, A.float(), B.float()


@right("loftq_init")
def with_numpys_svd(W, rank, iterations=1, quantize=quantize_4bit):
    W = ready(W, rank, iterations)
    change = torch.zeros(W.shape)
    for _ in range(iterations):
        Q = quantize(W - change)
        U, S, Vh = np.linalg.svd((W - Q.dequantize()).double().numpy(), full_matrices=False)
        A, B = torch.from_numpy(S[:rank, None] * Vh[:rank]).float(), torch.from_numpy(U[:, :rank]).float()
        change = B @ A
    return Q, A, B


@right("loftq_init")
def by_recursion_in_float64(W, rank, iterations=1, quantize=quantize_4bit):
    W = ready(W, rank, iterations).double()

    def after(count):
        if count == 0:
            return None, W.new_zeros(rank, W.shape[1]), W.new_zeros(W.shape[0], rank)
        _, A, B = after(count - 1)
        Q = quantize((W - B @ A).float())
        U, S, Vh = torch.linalg.svd(W - Q.dequantize())
        return Q, S[:rank, None] ** 0.25 * Vh[:rank], U[:, :rank] * S[:rank] ** 0.75

    Q, A, B = after(iterations)
    return Q, A.float(), B.float()


@wrong("loftq_init", "A and B belong to the graph of W, because W requires gradients. Detach it first.")
@changed(loftq_init, ("W = W.detach().float()", "W = W.float()"))
def in_a_graph(): ...


@wrong("loftq_init", "A and B have the dtype of W. They should be float32, whatever it is.")
def in_the_dtype_of_w(W, rank, iterations=1, quantize=quantize_4bit):
    Q, A, B = loftq_init(W, rank, iterations, quantize)
    return Q, A.to(W.dtype), B.to(W.dtype)


@wrong("loftq_init", "You quantise once more before the loop. `quantize` is called once for each iteration.")
@changed(loftq_init, ("    low_rank = torch.zeros_like(W)", "    quantize(W)\n    low_rank = torch.zeros_like(W)"))
def a_first_q(): ...


@wrong("loftq_init", "You do not refuse a W that is not a matrix. Raise a ValueError for any other number of axes.")
@changed(loftq_init, ("if W.ndim != 2:", "W = W.reshape(W.shape[0], -1)\n    if W.ndim != 2:"))
def any_number_of_axes(): ...


@wrong("loftq_init", "You do as many iterations as the rank. Their number is `iterations`.")
@changed(loftq_init, ("in range(iterations)", "in range(rank)"))
def as_many_as_the_rank(): ...


@wrong("loftq_init", "You stop after one iteration, whatever number is given.")
def once(W, rank, iterations=1, quantize=quantize_4bit):
    W = ready(W, rank, iterations)
    Q = quantize(W)
    return Q, *best_factors(W - Q.dequantize(), rank)


@wrong(
    "loftq_init",
    "You quantise W itself in every iteration, so each one gives the same result as the first. What B A already holds "
    "need not be in Q.",
)
@changed(loftq_init, ("Q = quantize(W - low_rank)", "Q = quantize(W)"))
def w_every_time(): ...


@wrong(
    "loftq_init",
    "You start with the low-rank part and quantise the remainder: B A then holds the largest directions of W, not what "
    "quantisation loses. Quantise first.",
)
def the_low_rank_first(W, rank, iterations=1, quantize=quantize_4bit):
    W = ready(W, rank, iterations)
    Q_back = torch.zeros_like(W)
    for _ in range(iterations):
        A, B = best_factors(W - Q_back, rank)
        Q = quantize(W - B @ A)
        Q_back = Q.dequantize()
    return Q, A, B


@wrong("loftq_init", "A and B are computed from W itself. They have to hold what Q has lost of it.")
def factors_of_w(W, rank, iterations=1, quantize=quantize_4bit):
    W = ready(W, rank, iterations)
    A, B = best_factors(W, rank)
    Q = quantize(W)
    for _ in range(iterations - 1):
        Q = quantize(W - B @ A)
    return Q, A, B


@wrong(
    "loftq_init",
    "You quantise once more at the end. A and B then belong to the previous Q, and not to the one that you return.",
)
@changed(loftq_init, ("return Q, A, B", "return quantize(W - low_rank), A, B"))
def a_last_q(): ...


@wrong(
    "loftq_init",
    "B A contains the singular values twice: both A and B are multiplied by all of them.",
)
def s_twice(W, rank, iterations=1, quantize=quantize_4bit):
    W = ready(W, rank, iterations)
    low_rank = torch.zeros_like(W)
    for _ in range(iterations):
        Q = quantize(W - low_rank)
        U, S, Vh = torch.linalg.svd(W - Q.dequantize(), full_matrices=False)
        A, B = S[:rank, None] * Vh[:rank], U[:, :rank] * S[:rank]
        low_rank = B @ A
    return Q, A, B


@wrong("loftq_init", "B A lacks the singular values: it has the right directions, all with the same size.")
def without_s(W, rank, iterations=1, quantize=quantize_4bit):
    W = ready(W, rank, iterations)
    low_rank = torch.zeros_like(W)
    for _ in range(iterations):
        Q = quantize(W - low_rank)
        U, _, Vh = torch.linalg.svd(W - Q.dequantize(), full_matrices=False)
        A, B = Vh[:rank], U[:, :rank]
        low_rank = B @ A
    return Q, A, B


@wrong("loftq_init", "You take the smallest singular values: the best low-rank approximation uses the largest.")
def the_smallest(W, rank, iterations=1, quantize=quantize_4bit):
    W = ready(W, rank, iterations)
    low_rank = torch.zeros_like(W)
    for _ in range(iterations):
        Q = quantize(W - low_rank)
        U, S, Vh = torch.linalg.svd(W - Q.dequantize(), full_matrices=False)
        A, B = S[-rank:, None] * Vh[-rank:], U[:, -rank:]
        low_rank = B @ A
    return Q, A, B


@wrong(
    "loftq_init",
    "Your sign is reversed: W - Q has to be added to Q to give W, so B A approximates W - Q and not Q - W.",
)
@changed(
    loftq_init,
    ("Q = quantize(W - low_rank)", "Q = quantize(W + low_rank)"),
    ("W - Q.dequantize()", "Q.dequantize() - W"),
)
def the_other_sign(): ...


@wrong("loftq_init", "The order of the results is Q, A, B, and A is the one with r rows; you return B first.")
def b_before_a(W, rank, iterations=1, quantize=quantize_4bit):
    W = ready(W, rank, iterations)
    Q, A, B = loftq_init(W, rank, iterations, quantize)
    return Q, B, A


@wrong("loftq_init", caught_by="no error")
def refuses_nothing(W, rank, iterations=1, quantize=quantize_4bit):
    W = W.detach().float()
    A, B = torch.zeros(rank, W.shape[1]), torch.zeros(W.shape[0], rank)
    Q = quantize(W)
    for iteration in range(iterations):
        Q = quantize(W - B @ A) if iteration else Q
        A, B = best_factors(W - Q.dequantize(), rank)
    return Q, A, B


# --- begin_with_loftq --------------------------------------------------------------------------------


def refuse(layer, W: Tensor) -> None:
    if not hasattr(layer.base, "quantized") or tuple(layer.base.quantized.shape) != tuple(W.shape):
        raise ValueError("the LoRA must be on a 4-bit layer of the shape of W")


def write(layer, Q, A: Tensor, B: Tensor) -> None:
    with torch.no_grad():
        layer.base.quantized = Q
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)


@right("begin_with_loftq")
def the_scaling_in_a(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    Q, A, B = loftq_init(W, layer.rank, iterations, quantize)
    write(layer, Q, A / layer.scaling, B)


@right("begin_with_loftq")
def its_root_in_both(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    layer.base.quantized, A, B = loftq_init(W, layer.rank, iterations, quantize)
    for parameter, new in ((layer.lora_A, A), (layer.lora_B, B)):
        parameter.data = (new / layer.scaling**0.5).to(parameter.dtype)


@right("begin_with_loftq")
def with_orthonormal_columns_in_b(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    Q, A, B = loftq_init(W, layer.rank, iterations, quantize)
    columns, R = torch.linalg.qr(B)
    write(layer, Q, R @ A / layer.scaling, columns)


@right("begin_with_loftq")
def with_an_alternation_of_its_own(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    if iterations < 1:
        raise ValueError("at least one iteration")
    s, r = layer.scaling, layer.rank
    A, B = torch.zeros(r, W.shape[1]), torch.zeros(W.shape[0], r)  # s B A is LoftQ's
    for _ in range(iterations):
        Q = quantize(W - s * B @ A)
        U, S, Vh = np.linalg.svd(((W - Q.dequantize()) / s).numpy(), full_matrices=False)
        A, B = torch.from_numpy(Vh[:r]), torch.from_numpy(U[:, :r] * S[:r])
    layer.base.quantized = Q
    for parameter, new in ((layer.lora_A, A), (layer.lora_B, B)):
        parameter.detach().copy_(new)


@wrong(
    "begin_with_loftq",
    "You compute alpha / r yourself. With rsLoRA the scaling is alpha / sqrt(r): use the one that the layer stores.",
)
@changed(begin_with_loftq, ("B / layer.scaling", "B / (layer.alpha / layer.rank)"))
def alpha_over_r(): ...


@wrong("begin_with_loftq", "You write into the layer before you have checked everything: after an error it is changed.")
def changes_before_it_checks(layer, W, iterations=1, quantize=quantize_4bit):
    with torch.no_grad():
        layer.lora_A.zero_()
        layer.lora_B.zero_()
    begin_with_loftq(layer, W, iterations, quantize)


@wrong(
    "begin_with_loftq",
    "A or B has become float32. The parameters keep their dtype: copy the new values into them.",
)
def in_float32(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    layer.base.quantized, A, B = loftq_init(W, layer.rank, iterations, quantize)
    layer.lora_A.data, layer.lora_B.data = A, B / layer.scaling


@wrong("begin_with_loftq", "You quantise with the usual function and not with the one that is given.")
def with_the_usual_quantize(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    Q, A, B = loftq_init(W, layer.rank, iterations)
    write(layer, Q, A, B / layer.scaling)


@wrong("begin_with_loftq", "`lora_A` has its old values: you write only `lora_B`.")
@changed(begin_with_loftq, ("    layer.lora_A.copy_(A)\n", ""))
def only_b(): ...


@wrong("begin_with_loftq", "`lora_B` is still zero or has its old values: you write only `lora_A`.")
@changed(begin_with_loftq, ("    layer.lora_B.copy_(B / layer.scaling)", "    B"))
def only_a(): ...


@wrong(
    "begin_with_loftq",
    "LoftQ's B A has to be added unchanged, but the layer multiplies it by its scaling. Your layer starts with too "
    "much or too little of it.",
)
def without_the_scaling(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    write(layer, *loftq_init(W, layer.rank, iterations, quantize))


@wrong("begin_with_loftq", "You multiply by the scaling, and the layer does so again.")
def the_scaling_squared(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    Q, A, B = loftq_init(W, layer.rank, iterations, quantize)
    write(layer, Q, A, B * layer.scaling)


@wrong("begin_with_loftq", "You divide both A and B by the scaling, so their product is divided by its square.")
def out_of_both(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    Q, A, B = loftq_init(W, layer.rank, iterations, quantize)
    write(layer, Q, A / layer.scaling, B / layer.scaling)


@wrong(
    "begin_with_loftq",
    "You divide by the rank. The layer multiplies by alpha / r: use the scaling that it stores.",
)
def divided_by_the_rank(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    Q, A, B = loftq_init(W, layer.rank, iterations, quantize)
    write(layer, Q, A, B / layer.rank)


@wrong(
    "begin_with_loftq",
    "You set the layer's scaling to 1. The start is right, but alpha no longer has its meaning: every later training "
    "step has a different size.",
)
def changes_the_scaling(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    write(layer, *loftq_init(W, layer.rank, iterations, quantize))
    layer.scaling = 1.0


@wrong(
    "begin_with_loftq",
    "The layer still has its old Q. LoftQ chooses Q, A and B together: its A and B only fit its own Q.",
)
def the_old_q(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    _, A, B = loftq_init(W, layer.rank, iterations, quantize)
    write(layer, layer.base.quantized, A, B / layer.scaling)


@wrong(
    "begin_with_loftq",
    "A and B are new parameters. An optimiser created earlier holds the old ones, and would train those.",
)
def new_parameters(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    Q, A, B = loftq_init(W, layer.rank, iterations, quantize)
    layer.base.quantized = Q
    layer.lora_A, layer.lora_B = nn.Parameter(A), nn.Parameter(B / layer.scaling)


@wrong("begin_with_loftq", "You always use one iteration, whatever number is given.")
def one_iteration(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    Q, A, B = loftq_init(W, layer.rank, 1, quantize)
    write(layer, Q, A, B / layer.scaling)


@wrong(
    "begin_with_loftq",
    "You start from Q and not from the original W, so there is no error to correct.",
)
def of_the_quantised_weight(layer, W, iterations=1, quantize=quantize_4bit):
    refuse(layer, W)
    Q, A, B = loftq_init(layer.base.quantized.dequantize(), layer.rank, iterations, quantize)
    write(layer, Q, A, B / layer.scaling)


@wrong("begin_with_loftq", caught_by="no error")
def on_any_layer(layer, W, iterations=1, quantize=quantize_4bit):
    Q, A, B = loftq_init(W, layer.rank, iterations, quantize)
    layer.base.quantized = Q
    with torch.no_grad():
        layer.lora_A[:], layer.lora_B[:] = (
            (A, B / layer.scaling) if A.shape == layer.lora_A.shape else (layer.lora_A, layer.lora_B)
        )
