"""Unit 21: mistakes that people make, and other right ways. Edits of hidden states, and where to edit."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.loreft import orthonormal_rows, prompt_positions, reft_change

# --- orthonormal_rows --------------------------------------------------------------------------------


@right("orthonormal_rows")
def by_the_root_of_the_gram_matrix(R):
    """(R R^T)^(-1/2) R."""
    values, vectors = torch.linalg.eigh(R.double() @ R.double().T)
    return ((vectors * values.rsqrt()) @ vectors.T @ R.double()).to(R.dtype)


@right("orthonormal_rows")
def by_iteration(R):
    """Newton and Schulz's iteration, which brings all singular values to 1."""
    Q = R.double() / R.double().norm()
    for _ in range(60):
        Q = 1.5 * Q - 0.5 * Q @ Q.T @ Q
    return Q.to(R.dtype)


@right("orthonormal_rows")
def in_numpy_with_a_sum_of_pairs(R):
    U, _, Vh = np.linalg.svd(R.double().numpy(), full_matrices=False)
    return torch.from_numpy(sum(np.outer(U[:, i], Vh[i]) for i in range(len(R)))).to(R.dtype)


@right("orthonormal_rows")
def by_qr_and_the_svd_of_a_small_matrix(R):
    Q, L = torch.linalg.qr(R.float().T)  # R^T = Q L
    U, _, Vh = torch.linalg.svd(L)
    return (Q @ U @ Vh).T.contiguous().to(R.dtype)


@wrong(
    "orthonormal_rows",
    "Your rows come from QR or Gram-Schmidt. They are orthonormal, but the first one keeps its direction and the "
    "others bear the whole change: another matrix is nearer to R.",
)
def gram_schmidt(R):
    rows = []
    for row in R.double():
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / row.norm())
    return torch.stack(rows).to(R.dtype)


@wrong("orthonormal_rows", "The signs of `torch.linalg.qr` are arbitrary: your rows may point the other way.")
def qr_without_its_signs(R):
    return torch.linalg.qr(R.float().T).Q.T.contiguous().to(R.dtype)


@wrong("orthonormal_rows", "Your rows have length 1, but they are not orthogonal to each other.")
def only_normalised(R):
    return F.normalize(R.float(), dim=1).to(R.dtype)


@wrong("orthonormal_rows", "You divide R by one number. That leaves its singular values different from each other.")
def divided_by_the_norm(R):
    return (R.float() / torch.linalg.matrix_norm(R.float(), 2)).to(R.dtype)


@wrong(
    "orthonormal_rows",
    "You return V^T. Its rows are orthonormal and span the right subspace, but they are turned against those of R.",
)
@changed(orthonormal_rows, ("(U @ Vh)", "Vh"))
def without_U(): ...


@wrong("orthonormal_rows", "U and V^T are multiplied in the wrong way: one of them is transposed.")
@changed(orthonormal_rows, ("(U @ Vh)", "(U.T @ Vh)"))
def U_transposed(): ...


@wrong(
    "orthonormal_rows",
    "You divide by the squares of the singular values: (R R^T)^-1 R is the pseudo-inverse, transposed. What is wanted "
    "divides by the singular values themselves.",
)
def without_the_root(R):
    return (torch.linalg.inv(R.float() @ R.float().T) @ R.float()).to(R.dtype)


@wrong(
    "orthonormal_rows",
    "You make the determinant positive, as for a rotation. A reflection is allowed, and may be nearer.",
)
def a_rotation(R):
    U, _, Vh = torch.linalg.svd(R.float(), full_matrices=False)
    if len(R) == R.shape[1]:
        U[:, -1] *= torch.det(U @ Vh).sign()
    return (U @ Vh).to(R.dtype)


@wrong("orthonormal_rows", "You take one step towards the nearest matrix. The rows are not orthonormal yet.")
def one_step_of_an_iteration(R):
    Q = R.float() / torch.linalg.matrix_norm(R.float(), 2)
    return (1.5 * Q - 0.5 * Q @ Q.T @ Q).to(R.dtype)


@wrong("orthonormal_rows", "Your result is float32 whatever the dtype of R is.")
@changed(orthonormal_rows, (".to(R.dtype)", ""))
def always_float32(): ...


@wrong("orthonormal_rows", "PyTorch has no singular value decomposition of 16-bit numbers: compute in float32.")
@changed(orthonormal_rows, ("R.float()", "R"))
def in_the_dtype_of_R(): ...


@wrong("orthonormal_rows", "If the rows are orthonormal already, your result is R itself, not a new tensor.")
def R_itself(R):
    Q = orthonormal_rows(R)
    return R if torch.allclose(Q.float(), R.float(), atol=1e-5) else Q


@wrong("orthonormal_rows", caught_by="changes its input")
def written_into_R(R):
    return R.copy_(orthonormal_rows(R))


# --- reft_change -------------------------------------------------------------------------------------


@right("reft_change")
def with_einsum(h, R, W, b, where=None, variant="loreft"):
    z = torch.einsum("btd,rd->btr", h, W) + b
    if variant == "loreft":
        z = z - torch.einsum("btd,rd->btr", h, R)
    change = torch.einsum("btr,rd->btd", z, R)
    return change if where is None else change * where


@right("reft_change")
def one_token_at_a_time(h, R, W, b, where=None, variant="loreft"):
    texts = []
    for i, text in enumerate(h):
        rows = []
        for j, x in enumerate(text):
            z = W @ x + b - (R @ x if variant == "loreft" else 0)
            edited = where is None or bool(where[i, j])
            rows.append(R.T @ z if edited else 0 * (R.T @ z))
        texts.append(torch.stack(rows))
    return torch.stack(texts)


@right("reft_change")
def what_h_becomes_minus_h(h, R, W, b, where=None, variant="loreft"):
    """In LoReFT h loses its part in the subspace and gets R^T (W h + b) instead."""
    kept = torch.eye(h.shape[-1]) - R.T @ R if variant == "loreft" else torch.eye(h.shape[-1])
    change = h @ kept + (h @ W.T + b) @ R - h
    return change if where is None else torch.where(where, change, 0.0)


@right("reft_change")
def one_square_matrix(h, R, W, b, where=None, variant="loreft"):
    square = R.T @ (W - R if variant == "loreft" else W)
    change = F.linear(h, square, R.T @ b)
    return change if where is None else change.masked_fill(~where, 0.0)


@wrong("reft_change", "R h is not subtracted: that is DiReFT. LoReFT adds only what its coordinates are to change by.")
@changed(reft_change, ('W - R if variant == "loreft" else W', "W"))
def never_subtracted(): ...


@wrong("reft_change", "R h is subtracted in DiReFT too. Its formula is R^T (W h + b).")
@changed(reft_change, ('W - R if variant == "loreft" else W', "W - R"))
def always_subtracted(): ...


@wrong("reft_change", "You return h + the change. The change alone is wanted, since two edits can meet in one block.")
def with_h(h, R, W, b, where=None, variant="loreft"):
    return h + reft_change(h, R, W, b, where, variant)


@wrong("reft_change", "You leave out b.")
@changed(reft_change, ("F.linear(h, down, b)", "F.linear(h, down)"))
def without_b(): ...


@wrong("reft_change", "You go back by W^T instead of R^T: the change has to lie in the subspace of R's rows.")
@changed(reft_change, ("F.linear(z, R.T)", "F.linear(z, W.T)"))
def back_by_W(): ...


@wrong("reft_change", "You change all positions: `where` is not used.")
@changed(reft_change, ("if where is not None", "if False"))
def everywhere(): ...


@wrong("reft_change", "You change the positions that `where` does not mark.")
@changed(reft_change, ("where.to(z.dtype)", "(~where).to(z.dtype)"))
def the_other_positions(): ...


@wrong(
    "reft_change",
    "You set h to zero where it is not edited, but then W h + b is still b: the change is not zero there.",
)
def h_is_masked(h, R, W, b, where=None, variant="loreft"):
    return reft_change(h if where is None else h * where, R, W, b, None, variant)


@wrong("reft_change", "b is subtracted too: the brackets are W h + b - R h.")
@changed(reft_change, ("F.linear(h, down, b)", 'F.linear(h, down, -b if variant == "loreft" else b)'))
def b_is_subtracted(): ...


@wrong("reft_change", "The sign of R h and W h is reversed: the change leads away from W h + b.")
@changed(reft_change, ("W - R if", "R - W if"))
def the_wrong_way(): ...


@wrong("reft_change", "No gradient reaches R through one of its two places: nothing may be detached.")
@changed(reft_change, ("F.linear(z, R.T)", "F.linear(z, R.T.detach())"))
def R_is_detached(): ...


@wrong("reft_change", "The gradient does not reach h, so the blocks before this one would learn nothing from it.")
@changed(reft_change, ("F.linear(h, down, b)", "F.linear(h.detach(), down, b)"))
def h_is_detached(): ...


# --- prompt_positions --------------------------------------------------------------------------------


@right("prompt_positions")
def one_text_at_a_time(input_ids, place, first, last, end_id):
    starts, ends = torch.zeros_like(input_ids, dtype=torch.bool), torch.zeros_like(input_ids, dtype=torch.bool)
    for row, (ids, places) in enumerate(zip(input_ids.tolist(), place.tolist())):
        tokens = [column for column, where in enumerate(places) if where >= 0]
        for column in tokens:
            starts[row, column] = places[column] < first
        end = next((number for number, column in enumerate(tokens) if ids[column] == end_id), -1)
        for column in tokens[max(0, end + 1 - last) : end + 1]:
            ends[row, column] = True
    return starts, ends


@right("prompt_positions")
def by_counting_ends(input_ids, place, first, last, end_id):
    text = place >= 0
    is_end = (input_ids == end_id) & text
    before = is_end.int().cumsum(dim=1) - is_end.int()  # ends to the left
    prompt = text & (before == 0) & is_end.any(dim=1, keepdim=True)
    from_the_right = prompt.int().flip(1).cumsum(dim=1).flip(1)  # 1 at the end of the prompt
    return text & (place < first), prompt & (from_the_right <= last)


@right("prompt_positions")
def with_the_column_of_the_end(input_ids, place, first, last, end_id):
    text = place >= 0
    is_end = (input_ids == end_id) & text
    column = is_end.int().argmax(dim=1, keepdim=True)  # the first True; 0 if there is none
    end = place.gather(1, column)
    ending = (place <= end) & (place > end - last) & text & is_end.any(dim=1)[:, None]
    return (place < first) & text, ending


@right("prompt_positions")
def in_numpy(input_ids, place, first, last, end_id):
    ids, places = input_ids.numpy(), place.numpy()
    ends = [p[(i == end_id) & (p >= 0)] for i, p in zip(ids, places)]
    end = np.array([found.min() if len(found) else -10_000 for found in ends])[:, None]
    inside = (places >= 0) & (places <= end) & (places > end - last)
    return torch.from_numpy((places >= 0) & (places < first)), torch.from_numpy(inside)


@wrong("prompt_positions", "You count columns, not places: with padding on the left the first tokens are elsewhere.")
def columns(input_ids, place, first, last, end_id):
    here = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    starts = (here < first) & (place >= 0)
    return starts, prompt_positions(input_ids, place, first, last, end_id)[1]


@wrong("prompt_positions", "Padding is in the mask of the first tokens: its place is negative, and so below p.")
@changed(prompt_positions, ("(place >= 0) & (place < first)", "place < first"))
def padding_is_first(): ...


@wrong("prompt_positions", "Padding is in the mask of the last tokens, when the prompt is shorter than s.")
@changed(prompt_positions, ("(place >= 0) & (before_end >= 0)", "(before_end >= 0)"))
def padding_is_last(): ...


@wrong("prompt_positions", "You take padding for the end of a prompt when it consists of the token `end_id`.")
@changed(prompt_positions, ("(input_ids == end_id) & (place >= 0)", "input_ids == end_id"))
def padding_ends_the_prompt(): ...


@wrong("prompt_positions", "You take the last `end_id` of a text. The prompt ends with the first one.")
@changed(
    prompt_positions,
    ("torch.iinfo(place.dtype).max", "-1"),
    ("amin(", "amax("),
)
def the_last_end(): ...


@wrong("prompt_positions", "The token `end_id` itself belongs to the prompt: it is the last of its tokens.")
@changed(prompt_positions, ("(before_end >= 0) & (before_end < last)", "(before_end >= 1) & (before_end <= last)"))
def without_the_end_itself(): ...


@wrong("prompt_positions", "Your last s tokens are those of the whole text. It is the prompt that they end.")
def of_the_text(input_ids, place, first, last, end_id):
    longest = place.amax(dim=1, keepdim=True)
    return prompt_positions(input_ids, place, first, 0, end_id)[0], (place >= 0) & (place > longest - last)


@wrong(
    "prompt_positions", "A text without `end_id` has no last positions. Yours are at the end of the text, or anywhere."
)
def the_end_of_a_text_without_end(input_ids, place, first, last, end_id):
    starts, ends = prompt_positions(input_ids, place, first, last, end_id)
    none = ~((input_ids == end_id) & (place >= 0)).any(dim=1, keepdim=True)
    return starts, torch.where(none, of_the_text(input_ids, place, first, last, end_id)[1], ends)


@wrong(
    "prompt_positions",
    "You go on behind the end of the prompt: the last s tokens lie before its end, and not after it.",
)
@changed(prompt_positions, ("(before_end >= 0) & (before_end < last)", "(before_end.abs() < last)"))
def behind_the_end_too(): ...


@wrong("prompt_positions", "A token can be in both masks if the prompt is short. You take it out of one of them.")
def in_one_mask_only(input_ids, place, first, last, end_id):
    starts, ends = prompt_positions(input_ids, place, first, last, end_id)
    return starts, ends & ~starts


@wrong(
    "prompt_positions",
    "Your mask of the first tokens stops at the end of the prompt. It counts the tokens of the text.",
)
def first_of_the_prompt(input_ids, place, first, last, end_id):
    starts, _ = prompt_positions(input_ids, place, first, last, end_id)
    prompt = prompt_positions(input_ids, place, 0, 1000, end_id)[1]
    return starts & (prompt | ~prompt.any(dim=1, keepdim=True)), prompt_positions(input_ids, place, 0, last, end_id)[1]


@wrong("prompt_positions", "Your masks are one too long: the places 0 to p - 1 are the first p.")
@changed(prompt_positions, ("place < first", "place <= first"), ("before_end < last", "before_end <= last"))
def one_too_many(): ...


@wrong("prompt_positions", "You return a single mask. Two are wanted, since each can have an edit of its own.")
def both_in_one(input_ids, place, first, last, end_id):
    starts, ends = prompt_positions(input_ids, place, first, last, end_id)
    return starts | ends
