"""Unit 11, what is forgotten, and what an update is made of: mistakes that people make, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.linear_algebra.rank import require_matrix

# --- kl_divergence -----------------------------------------------------------------------------------


def logs(base_logits: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return F.log_softmax(base_logits.float(), dim=-1), F.log_softmax(logits.float(), dim=-1)


@right("kl_divergence")
def by_torchs_own(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits, logits)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@right("kl_divergence")
def with_logsumexp_in_numpy(base_logits: Tensor, logits: Tensor) -> np.ndarray:
    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    log_p, log_q = log_softmax(base_logits.double().numpy()), log_softmax(logits.double().numpy())
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


@right("kl_divergence")
def cross_entropy_minus_entropy(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits.double(), logits.double())
    return -(log_p.exp() * log_q).sum(-1) + (log_p.exp() * log_p).sum(-1)


@right("kl_divergence")
def by_torch_distributions(base_logits: Tensor, logits: Tensor) -> Tensor:
    p, q = (torch.distributions.Categorical(logits=one.double()) for one in (base_logits, logits))
    return torch.distributions.kl_divergence(p, q)


@right("kl_divergence")
def position_by_position(base_logits: Tensor, logits: Tensor) -> Tensor:
    result = torch.zeros(base_logits.shape[:-1])
    for place in np.ndindex(*result.shape):
        one, other = base_logits[place].double().tolist(), logits[place].double().tolist()
        ln_p, ln_q = (
            [x - max(row) - math.log(sum(math.exp(y - max(row)) for y in row)) for x in row] for row in (one, other)
        )
        result[place] = sum(math.exp(a) * (a - b) for a, b in zip(ln_p, ln_q, strict=True))
    return result


@wrong(
    "kl_divergence",
    "You compute in the dtype of the logits: in half precision the result is off by far more than rounding in float32 "
    "would be. Convert the logits first.",
)
def in_half_precision(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(base_logits, dim=-1), F.log_softmax(logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@wrong(
    "kl_divergence", "You do not weight the terms. A token counts as much as the base model expects it: multiply by p."
)
def without_weights(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits, logits)
    return (log_p - log_q).sum(-1)


@wrong("kl_divergence", "You add up over the positions too. Return one divergence for each position.")
def sum_over_the_positions(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits, logits)
    return (log_p.exp() * (log_p - log_q)).sum()


@wrong("kl_divergence", "You return the terms of the sum. Add them up over the vocabulary.")
def terms_not_summed(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits, logits)
    return log_p.exp() * (log_p - log_q)


@wrong(
    "kl_divergence",
    "That is the entropy of p with the opposite sign. The logarithm of q, by which the two models differ, is missing.",
)
def only_p(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, _ = logs(base_logits, logits)
    return (log_p.exp() * log_p).sum(-1)


@wrong(
    "kl_divergence",
    "You weight by the other model's probabilities and not by the base model's: that is the divergence in the other "
    "direction. It hardly counts what the base model expects and the new one has forgotten.",
)
def the_other_direction(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits, logits)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@wrong("kl_divergence", "You take the mean over the vocabulary. p already weights the tokens: take the sum.")
def mean_over_the_vocabulary(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits, logits)
    return (log_p.exp() * (log_p - log_q)).mean(-1)


@wrong(
    "kl_divergence",
    "That is the cross-entropy. It is not 0 when both predictions are the same: subtract the entropy of p.",
)
def only_the_cross_entropy(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits, logits)
    return -(log_p.exp() * log_q).sum(-1)


@wrong("kl_divergence", "Your divergence is in bits. Use natural logarithms to get nats.")
def in_bits(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits, logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1) / math.log(2)


@wrong(
    "kl_divergence",
    "You subtract the raw logits. Logits are log-probabilities only up to a constant, and the constant differs between "
    "the two models.",
)
def without_normalising(base_logits: Tensor, logits: Tensor) -> Tensor:
    return (base_logits.softmax(-1) * (base_logits - logits)).sum(-1)


@wrong(
    "kl_divergence",
    "You take the logarithm of a softmax. If a probability is too small for a float, that is the logarithm of 0; use a "
    "function that computes the logarithms directly.",
)
def logarithm_of_a_softmax(base_logits: Tensor, logits: Tensor) -> Tensor:
    p, q = base_logits.softmax(-1), logits.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


@wrong("kl_divergence", "You return a single number. Return one divergence for each position.")
def mean_over_the_positions(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits, logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@wrong(
    "kl_divergence",
    "Your softmax is along the first axis. Probabilities add up to 1 over the vocabulary, the last axis.",
)
def softmax_along_the_first_axis(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(base_logits, dim=0), F.log_softmax(logits, dim=0)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@wrong("kl_divergence", "You add up both directions. Return only the one weighted by p.")
def both_directions(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits, logits)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


@wrong(
    "kl_divergence", "You have ln(q / p) in the sum: the sign of your result is wrong. A divergence is never negative."
)
def q_over_p(base_logits: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = logs(base_logits, logits)
    return (log_p.exp() * (log_q - log_p)).sum(-1)


# --- effective_rank ----------------------------------------------------------------------------------


def values_of(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(require_matrix(matrix)).double()


def entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum()


@right("effective_rank")
def in_numpy(matrix: Tensor) -> float:
    values = np.linalg.svd(require_matrix(matrix).double().numpy(), compute_uv=False)
    p = values[values > 0] / max(values.sum(), 1e-300)
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


@right("effective_rank")
def a_product_of_powers(matrix: Tensor) -> float:
    S = values_of(matrix).tolist()
    total, result = sum(S), 1.0
    if total == 0:
        return 0.0
    for one in S:
        result *= (one / total) ** -(one / total) if one > 0 else 1.0
    return result


@right("effective_rank")
def by_torch_distributions_entropy(matrix: Tensor) -> Tensor:
    S = values_of(matrix)
    return torch.distributions.Categorical(probs=S).entropy().exp() if S.any() else torch.tensor(0.0)


@right("effective_rank")
def with_the_logarithm_of_the_sum(matrix: Tensor) -> float:
    matrix = require_matrix(matrix).double()
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    S = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()  # eigenvalues of the smaller Gram matrix
    if not S.any():
        return 0.0
    total = S.sum()
    return float((total.log() - torch.special.xlogy(S, S).sum() / total).exp())


@wrong(
    "effective_rank",
    "You raise no error for a vector or another tensor that is not a matrix. `require_matrix` does that for you.",
)
def of_anything(matrix: Tensor) -> float:
    S = torch.linalg.svdvals(torch.atleast_2d(matrix).double())
    return float(entropy(S / S.sum()).exp()) if S[0] > 0 else 0.0


@wrong(
    "effective_rank",
    "You leave out singular values that are small beside the largest. A small one has a small share; no tolerance is "
    "needed.",
)
def with_a_tolerance(matrix: Tensor) -> float:
    S = values_of(matrix)
    S = S[S > 0.05 * S[0]]
    return float(entropy(S / S.sum()).exp()) if len(S) else 0.0


@wrong(
    "effective_rank",
    "You add a small number to the sum of the singular values. It is not small beside those of a small matrix: handle "
    "the zero matrix by itself.",
)
def a_little_in_the_sum(matrix: Tensor) -> float:
    S = values_of(matrix)
    return float(entropy(S / (S.sum() + 1e-8)).exp()) if S[0] > 0 else 0.0


@wrong("effective_rank", "You divide by the number of singular values: take the sum of -p ln p, not its mean.")
def mean_of_the_terms(matrix: Tensor) -> float:
    S = values_of(matrix)
    return float(torch.special.entr(S / S.sum()).mean().exp()) if S[0] > 0 else 0.0


@wrong(
    "effective_rank",
    "You use the squares of the singular values, the energies, as weights. Here the singular values themselves are "
    "the weights.",
)
def of_the_energies(matrix: Tensor) -> float:
    S = values_of(matrix).square()
    return float(entropy(S / S.sum()).exp()) if S[0] > 0 else 0.0


@wrong("effective_rank", "You return the entropy. A rank is a number of directions: one step is missing.")
def the_entropy_itself(matrix: Tensor) -> float:
    S = values_of(matrix)
    return float(entropy(S / S.sum())) if S[0] > 0 else 0.0


@wrong("effective_rank", "Your entropy is in bits, but the exponential is to base e: use natural logarithms.")
def with_bits_in_e(matrix: Tensor) -> float:
    S = values_of(matrix)
    return float((entropy(S / S.sum()) / math.log(2)).exp()) if S[0] > 0 else 0.0


@wrong(
    "effective_rank",
    "You count the singular values that are not zero. Here a small one has to count less than a large one.",
)
def the_rank_of_unit_01(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_rank(require_matrix(matrix)))


@wrong(
    "effective_rank",
    "That is the participation ratio, the squared sum over the sum of squares. It is another smooth rank, with a "
    "different value: the docstring uses the entropy.",
)
def the_participation_ratio(matrix: Tensor) -> float:
    S = values_of(matrix)
    return float(S.sum() ** 2 / S.square().sum()) if S[0] > 0 else 0.0


@wrong("effective_rank", "A singular value of 0 makes your result NaN: 0 ln 0 has to count as 0.")
def zero_times_minus_infinity(matrix: Tensor) -> float:
    S = values_of(matrix)
    p = S / S.sum()
    return float((-(p * p.log()).sum()).exp()) if S[0] > 0 else 0.0


@wrong("effective_rank", "You divide by the largest singular value. Shares have to add up to 1.")
def shares_of_the_largest(matrix: Tensor) -> float:
    S = values_of(matrix)
    return float(entropy(S / S[0]).exp()) if S[0] > 0 else 0.0


@wrong(
    "effective_rank", "The zero matrix has no direction at all: its effective rank is 0, but you return another value."
)
def one_for_the_zero_matrix(matrix: Tensor) -> float:
    S = values_of(matrix)
    return float(entropy(S / S.sum().clamp(min=1e-30)).exp())


@wrong(
    "effective_rank", "You do not divide the singular values by their sum: your result depends on the matrix's scale."
)
def without_shares(matrix: Tensor) -> float:
    S = values_of(matrix)
    return float(entropy(S).exp()) if S[0] > 0 else 0.0
