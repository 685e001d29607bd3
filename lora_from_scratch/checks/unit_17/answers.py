"""Unit 17: mistakes that people make, and other right ways. MultiLoRA's scales and GLoRA's terms."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch
from torch import Tensor

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.glora import scale_and_shift

# --- scaled_B ----------------------------------------------------------------------------------------


def rank_of(B: Tensor, scales: Tensor) -> int:
    return B.shape[1] // len(scales)


@right("scaled_B")
def one_lora_after_the_other(B: Tensor, scales: Tensor) -> Tensor:
    pieces = B.chunk(len(scales), dim=1)
    return torch.cat([c[:, None] * piece for c, piece in zip(scales, pieces, strict=True)], dim=1)


@right("scaled_B")
def with_an_axis_for_the_loras(B: Tensor, scales: Tensor) -> Tensor:
    return (B.unflatten(1, (len(scales), -1)) * scales.T[:, :, None]).flatten(1)


@right("scaled_B")
def diagonal_matrices(B: Tensor, scales: Tensor) -> Tensor:
    r = rank_of(B, scales)
    return torch.hstack([torch.diag(scales[i]) @ B[:, i * r : (i + 1) * r] for i in range(len(scales))])


@right("scaled_B")
def with_einsum(B: Tensor, scales: Tensor) -> Tensor:
    n, out = scales.shape
    return torch.einsum("onr,no->onr", B.reshape(out, n, -1), scales).reshape(out, -1)


@right("scaled_B")
def the_scale_of_each_column(B: Tensor, scales: Tensor) -> Tensor:
    owner = torch.arange(B.shape[1]) // rank_of(B, scales)
    return B * scales[owner].T


@wrong(
    "scaled_B",
    "You repeat the n scales as a whole, so that neighbouring columns get the scales of different LoRAs. The first r "
    "columns all belong to LoRA 0.",
)
def repeated_as_a_whole(B: Tensor, scales: Tensor) -> Tensor:
    return B * scales.T.repeat(1, rank_of(B, scales))


@wrong("scaled_B", "You give each LoRA one scale for all outputs. c_i has a number for each output.")
def one_scale_for_each(B: Tensor, scales: Tensor) -> Tensor:
    return B * scales[:, 0].repeat_interleave(rank_of(B, scales))


@wrong(
    "scaled_B",
    "Where there are as many LoRAs as outputs you take the scales the wrong way round. Row i of `scales` is LoRA i's.",
)
def turned_where_it_fits(B: Tensor, scales: Tensor) -> Tensor:
    turned = scales if len(scales) == len(B) else scales.T
    return B * turned.repeat_interleave(rank_of(B, scales), 1)


@wrong("scaled_B", "You add the scales to B. They multiply it.")
def added(B: Tensor, scales: Tensor) -> Tensor:
    return B + scales.T.repeat_interleave(rank_of(B, scales), 1)


@wrong("scaled_B", "You multiply by 1 + c. MultiLoRA's scales start at zero and multiply as they are.")
def one_plus(B: Tensor, scales: Tensor) -> Tensor:
    return B * (1 + scales.T.repeat_interleave(rank_of(B, scales), 1))


@wrong("scaled_B", "The scales belong to no graph of gradients in your result, so they stay zero for ever.")
def scales_are_not_trained(B: Tensor, scales: Tensor) -> Tensor:
    return B * scales.detach().T.repeat_interleave(rank_of(B, scales), 1)


@wrong("scaled_B", "B belongs to no graph of gradients in your result, so only the scales are trained.")
def B_is_not_trained(B: Tensor, scales: Tensor) -> Tensor:
    return B.detach() * scales.T.repeat_interleave(rank_of(B, scales), 1)


@wrong("scaled_B", "You add the scaled B of all LoRAs up. Each keeps its own columns, since each has an A of its own.")
def added_up(B: Tensor, scales: Tensor) -> Tensor:
    return (B.unflatten(1, (len(scales), -1)) * scales.T[:, :, None]).sum(1)


@wrong("scaled_B", "You scale the columns by all the scales together. A LoRA's columns are scaled by its own c_i only.")
def by_the_sum(B: Tensor, scales: Tensor) -> Tensor:
    return B * scales.sum(0)[:, None]


@wrong("scaled_B", "Your result is the transpose, (n r, out). It should be (out, n r).")
def transposed(B: Tensor, scales: Tensor) -> Tensor:
    return (B * scales.T.repeat_interleave(rank_of(B, scales), 1)).T


@wrong("scaled_B", "You divide by the number of LoRAs. Their updates are added up, not averaged.")
def averaged(B: Tensor, scales: Tensor) -> Tensor:
    return B * scales.T.repeat_interleave(rank_of(B, scales), 1) / len(scales)


# --- scale_and_shift ---------------------------------------------------------------------------------


@right("scale_and_shift")
def all_terms_in_one_sum(W, b, A=None, B=None, C=None, D=None, E=None):
    zero = torch.zeros(())
    A, B, D, E = (zero if term is None else term for term in (A, B, D, E))
    coupling = zero if C is None else (W @ C)[:, 0]
    return W * (1 + A) + B, None if b is None else b * (1 + D) + E + coupling


@right("scale_and_shift")
def a_list_of_terms(W, b, A=None, B=None, C=None, D=None, E=None):
    weights = [W, None if A is None else A.mul(W), B]
    biases = [b, None if D is None else D.mul(b) if b is not None else None, E]
    biases.append(None if C is None else torch.einsum("oi,ij->o", W, C))
    weight = sum(term for term in weights if term is not None)
    return weight, None if b is None else sum(term for term in biases if term is not None)


@right("scale_and_shift")
def as_the_layer_does_to_unit_vectors(W, b, A=None, B=None, C=None, D=None, E=None):
    out, inputs = W.shape
    full = torch.zeros(out, inputs) if A is None else A.expand(out, inputs)
    shift = torch.zeros(out, inputs) if B is None else B.expand(out, inputs)
    weight = torch.addcmul(W, W, full) + shift
    if b is None:
        return weight, None
    scale = torch.zeros(out) if D is None else D
    bias = torch.addcmul(b, b, scale.expand(out)) + (0 if E is None else E)
    return weight, bias + (0 if C is None else torch.mv(W, C.flatten()))


@right("scale_and_shift")
def row_by_row(W, b, A=None, B=None, C=None, D=None, E=None):
    rows = [row.clone() for row in W]
    A, B = (None if term is None else term.expand_as(W) for term in (A, B))
    for i, row in enumerate(W):
        if A is not None:
            rows[i] = rows[i] + row * A[i]
        if B is not None:
            rows[i] = rows[i] + B[i]
    if b is None:
        return torch.stack(rows), None
    D, E = (None if term is None else term.expand_as(b) for term in (D, E))
    bias = []
    for i, number in enumerate(b):
        total = number
        total = total + (number * D[i] if D is not None else 0)
        total = total + (E[i] if E is not None else 0)
        bias.append(total + (W[i].dot(C[:, 0]) if C is not None else 0))
    return torch.stack(rows), torch.stack(bias)


@wrong("scale_and_shift", "You multiply W and A as matrices where they fit. The star is a product entry by entry.")
def product_of_matrices(W, b, A=None, B=None, C=None, D=None, E=None):
    if A is not None and W.shape[1] == A.shape[0] and A.ndim == 2 and A.shape[1] > 1:
        return scale_and_shift(W, b, None, W @ A if B is None else W @ A + B, C, D, E)
    return scale_and_shift(W, b, A, B, C, D, E)


@wrong("scale_and_shift", "You replace W by W * A. It is added to W, so that A = 0 changes nothing.")
@changed(scale_and_shift, ("weight = weight + W * A", "weight = W * A"))
def W_is_replaced(): ...


@wrong("scale_and_shift", "You add A itself to W. A scales: what is added is W * A.")
@changed(scale_and_shift, ("weight + W * A", "weight + A"))
def A_is_added(): ...


@wrong("scale_and_shift", "You replace the weight by B. B is added to it.")
@changed(scale_and_shift, ("weight = weight + B", "weight = B.expand_as(W)"))
def B_replaces(): ...


@wrong("scale_and_shift", "You scale the shift B too. Only W is multiplied by 1 + A.")
@changed(scale_and_shift, ("weight = weight + B", "weight = weight + (B if A is None else B * (1 + A))"))
def B_is_scaled_too(): ...


@wrong("scale_and_shift", "The coupling C uses the new weight. It is a product with the weight as it was before.")
@changed(scale_and_shift, ("(W * C.T)", "(weight * C.T)"))
def C_with_the_new_weight(): ...


@wrong(
    "scale_and_shift", "You multiply C with the transpose of W where that fits. W is (out, in), and C has in rows: W C."
)
@changed(scale_and_shift, ("(W * C.T)", "((W.T if len(W) == len(C) else W) * C.T)"))
def C_with_the_transpose(): ...


@wrong("scale_and_shift", "You add C itself to the bias where it fits, or its sum. What is added is W C.")
@changed(scale_and_shift, ("(W * C.T).sum(dim=-1)", "C.sum()"))
def C_is_added(): ...


@wrong(
    "scale_and_shift",
    "Your bias is a matrix, (out, out): W C is (out, 1), and b is (out,). Broadcasting adds every pair. Take the last "
    "axis away first.",
)
@changed(scale_and_shift, ("(W * C.T).sum(dim=-1)", "(W * C.T).sum(dim=-1, keepdim=True)"))
def an_axis_too_many(): ...


@wrong("scale_and_shift", "You add D itself to the bias. D scales: what is added is b * D.")
@changed(scale_and_shift, ("bias + b * D", "bias + D"))
def D_is_added(): ...


@wrong("scale_and_shift", "You replace the bias by b * D. It is added to b, so that D = 0 changes nothing.")
@changed(scale_and_shift, ("bias = bias + b * D", "bias = b * D"))
def b_is_replaced(): ...


@wrong("scale_and_shift", "You multiply E by b. E shifts: it is added as it is.")
@changed(scale_and_shift, ("bias = bias + E", "bias = bias + b * E"))
def E_scales(): ...


@wrong("scale_and_shift", "You leave the coupling W C out of the bias.")
@changed(scale_and_shift, ("bias = bias + (W * C.T).sum(dim=-1)", "pass"))
def C_is_forgotten(): ...


@wrong(
    "scale_and_shift",
    "Your code gives a bias to a layer that has none. There C, D and E are ignored, and the second result is None.",
)
def a_bias_from_nowhere(W, b, A=None, B=None, C=None, D=None, E=None):
    weight, bias = scale_and_shift(W, torch.zeros(len(W)) if b is None else b, A, B, C, D, E)
    return weight, bias


@wrong("scale_and_shift", caught_by="changes its input")
def in_place(W, b, A=None, B=None, C=None, D=None, E=None):
    weight, bias = scale_and_shift(W, b, A, B, C, D, E)
    W.data.copy_(weight.detach())
    if b is not None:
        b.data.copy_(bias.detach())
    return weight, bias


@wrong("scale_and_shift", "Your results belong to no graph of gradients, so none of the five terms is trained.")
def nothing_learns(W, b, A=None, B=None, C=None, D=None, E=None):
    with torch.no_grad():
        return scale_and_shift(W, b, A, B, C, D, E)


@wrong("scale_and_shift", "You return the weight only. The new bias is a result too.")
def only_the_weight(W, b, A=None, B=None, C=None, D=None, E=None):
    return scale_and_shift(W, b, A, B, C, D, E)[0]


@wrong(
    "scale_and_shift",
    "A single number for A or B multiplies nothing in your code, or a column does. Broadcasting takes care of all "
    "three forms.",
)
def only_whole_matrices(W, b, A=None, B=None, C=None, D=None, E=None):
    A, B = (term if term is not None and term.shape == W.shape else None for term in (A, B))
    return scale_and_shift(W, b, A, B, C, D, E)
