"""Unit 18: mistakes that people make, and other right ways. The layer, the sensitivity, and the scores."""

# mypy: ignore-errors
# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.adalora import AdaLoRALinear
from lora_from_scratch.methods.rank_allocation import smoothed_sensitivity, triplet_scores

# --- AdaLoRALinear -----------------------------------------------------------------------------------


@right("AdaLoRALinear")
class WithADiagonalMatrix(AdaLoRALinear):
    def factors(self):
        return torch.diag(self.lora_E.flatten()) @ self.lora_A, self.lora_B

    def distances_from_orthonormal(self):
        r = self.lora_A.shape[0]
        of_A = torch.norm(self.lora_A @ self.lora_A.T - torch.eye(r), p="fro")
        of_B = torch.norm(self.lora_B.T @ self.lora_B - torch.eye(r), p="fro")
        return torch.cat((of_A.view(1), of_B.view(1)))


@right("AdaLoRALinear")
class WithSumsOfSquares(AdaLoRALinear):
    def factors(self):
        return torch.einsum("ri,ro->ri", self.lora_A, self.lora_E), self.lora_B

    def distances_from_orthonormal(self):
        P = torch.stack([self.lora_A @ self.lora_A.T, self.lora_B.T @ self.lora_B])
        return (P - torch.eye(len(self.lora_E))).square().sum(dim=(1, 2)).sqrt()


@right("AdaLoRALinear")
class TripletByTriplet(AdaLoRALinear):
    def factors(self):
        rows = [e * row for e, row in zip(self.lora_E, self.lora_A)]
        return torch.stack(rows), self.lora_B

    def distances_from_orthonormal(self):
        results = []
        for vectors in (list(self.lora_A), list(self.lora_B.T)):
            total = 0
            for i, u in enumerate(vectors):
                for j, v in enumerate(vectors):
                    total = total + (u @ v - float(i == j)) ** 2
            results.append(total.sqrt())
        return torch.stack(results)


@right("AdaLoRALinear")
class WithTransposes(AdaLoRALinear):
    def factors(self):
        return (self.lora_A.T * self.lora_E.T).T, self.lora_B

    def distances_from_orthonormal(self):
        def distance(columns: Tensor) -> Tensor:
            gram = torch.einsum("ni,nj->ij", columns, columns)
            return torch.dist(gram, torch.eye(columns.shape[1]))

        return torch.hstack([distance(self.lora_A.T), distance(self.lora_B)])


FACTORS = "return self.lora_A * self.lora_E, self.lora_B"
GRAMS = "for gram in (A @ A.T, B.T @ B)"
NORMS = "torch.linalg.matrix_norm(gram - identity)"


@wrong("AdaLoRALinear", "You multiply A's columns by E. E has one entry for each row of A, that is for each triplet.")
class TheColumnsOfA(AdaLoRALinear):
    def factors(self):
        if len(self.lora_E) != self.lora_A.shape[1]:
            return self.lora_A * self.lora_E, self.lora_B
        return self.lora_A * self.lora_E.flatten(), self.lora_B

    def distances_from_orthonormal(self):
        return AdaLoRALinear.distances_from_orthonormal(self)


@wrong("AdaLoRALinear", "E is missing in the factors: the product of A and B alone is LoRA's.")
@changed(AdaLoRALinear, (FACTORS, "return self.lora_A, self.lora_B"))
class WithoutE: ...


@wrong("AdaLoRALinear", "You multiply both A and B by E, so that the product contains its square.")
@changed(AdaLoRALinear, (FACTORS, "return self.lora_A * self.lora_E, self.lora_B * self.lora_E.T"))
class EOnBoth: ...


@wrong("AdaLoRALinear", "You multiply B by E. The product is the same, but `factors` promises diag(E) A and B.")
@changed(AdaLoRALinear, (FACTORS, "return self.lora_A, self.lora_B * self.lora_E.T"))
class EOnB: ...


@wrong("AdaLoRALinear", "You return B first. The pair is diag(E) A and B.")
@changed(AdaLoRALinear, (FACTORS, "return self.lora_B, self.lora_A * self.lora_E"))
class BFirst: ...


@wrong("AdaLoRALinear", "You multiply the factors by the scaling. The layer does that with their product already.")
@changed(AdaLoRALinear, (FACTORS, "return self.scaling * self.lora_A * self.lora_E, self.lora_B"))
class ScaledTwice: ...


@wrong(
    "AdaLoRALinear",
    "You make the remaining triplets stronger when others are cut. The scaling keeps the first rank: cutting one "
    "triplet must not change the others.",
)
class ScaledByTheRankNow(AdaLoRALinear):
    def factors(self):
        left = max(1, int(self.lora_E.count_nonzero()))
        return self.lora_A * self.lora_E * (self.rank / left), self.lora_B

    def distances_from_orthonormal(self):
        return AdaLoRALinear.distances_from_orthonormal(self)


@wrong("AdaLoRALinear", "E gets no gradient in your factors, so no triplet can ever become strong.")
@changed(AdaLoRALinear, (FACTORS, "return self.lora_A * self.lora_E.detach(), self.lora_B"))
class EIsNotTrained: ...


@wrong("AdaLoRALinear", "A or B gets no gradient in your factors: do not detach them, and do not use `.data`.")
@changed(AdaLoRALinear, (FACTORS, "return self.lora_A.detach() * self.lora_E, self.lora_B.detach()"))
class FactorsAreDetached: ...


@wrong("AdaLoRALinear", "You square the norms, as eq. 4 does. The authors' code and the statement do not.")
@changed(AdaLoRALinear, (NORMS, "torch.linalg.matrix_norm(gram - identity).square()"))
class Squared: ...


@wrong("AdaLoRALinear", "The identity is missing: you measure how large A A^T and B^T B are.")
@changed(AdaLoRALinear, (NORMS, "torch.linalg.matrix_norm(gram)"))
class WithoutTheIdentity: ...


@wrong(
    "AdaLoRALinear",
    "You multiply the other way round: A^T A is (in, in) and B B^T is (out, out). They cannot be the identity, since "
    "their rank is r.",
)
@changed(
    AdaLoRALinear,
    ("identity = torch.eye(len(A), dtype=A.dtype, device=A.device)", "identity = 1.0"),
    (GRAMS, "for gram in (A.T @ A, B @ B.T)"),
    (NORMS, "torch.linalg.matrix_norm(gram - torch.eye(len(gram)))"),
)
class TheOtherWayRound: ...


@wrong("AdaLoRALinear", "You take the spectral norm, the largest singular value. What is wanted is the Frobenius norm.")
@changed(AdaLoRALinear, (NORMS, "torch.linalg.matrix_norm(gram - identity, 2)"))
class SpectralNorm: ...


@wrong("AdaLoRALinear", "You compare A and B themselves with the identity. Orthonormal rows mean that A A^T is one.")
class ThemselvesNotTheirProducts(AdaLoRALinear):
    def factors(self):
        return self.lora_A * self.lora_E, self.lora_B

    def distances_from_orthonormal(self):
        A, B = self.lora_A, self.lora_B
        return torch.stack([(A - torch.eye(*A.shape)).norm(), (B - torch.eye(*B.shape)).norm()])


@wrong("AdaLoRALinear", "You include E in the distances. Only A and B are meant to be orthonormal.")
@changed(AdaLoRALinear, ("A, B = self.lora_A, self.lora_B", "A, B = self.lora_A * self.lora_E, self.lora_B"))
class WithEInTheDistances: ...


@wrong("AdaLoRALinear", "You return the mean of the two distances. What is wanted is both, (2,).")
@changed(AdaLoRALinear, ("for gram in (A @ A.T, B.T @ B)])", "for gram in (A @ A.T, B.T @ B)]).mean()"))
class TheirMean: ...


@wrong("AdaLoRALinear", "You return the distance of B first.")
@changed(AdaLoRALinear, (GRAMS, "for gram in (B.T @ B, A @ A.T)"))
class TheDistanceOfBFirst: ...


@wrong(
    "AdaLoRALinear",
    "No gradient flows from your distances: a tensor made of `float` or `.item()` is a constant, and the penalty would "
    "change nothing.",
)
@changed(AdaLoRALinear, (NORMS, "torch.tensor(float(torch.linalg.matrix_norm(gram - identity)))"))
class Numbers: ...


# --- smoothed_sensitivity ----------------------------------------------------------------------------


@right("smoothed_sensitivity")
def moved_towards_the_new(parameter, gradient, sensitivity, uncertainty, beta1, beta2):
    now = torch.abs(parameter) * torch.abs(gradient)
    smoothed = sensitivity + (1 - beta1) * (now - sensitivity)
    return smoothed, uncertainty + (1 - beta2) * ((now - smoothed).abs() - uncertainty)


@right("smoothed_sensitivity")
def with_lerp(parameter, gradient, sensitivity, uncertainty, beta1, beta2):
    now = parameter.mul(gradient).abs()
    smoothed = torch.lerp(now, sensitivity, beta1)
    return smoothed, torch.lerp((now - smoothed).abs(), uncertainty, beta2)


@right("smoothed_sensitivity")
def number_by_number(parameter, gradient, sensitivity, uncertainty, beta1, beta2):
    pairs = []
    for w, g, s, u in zip(*(t.flatten().tolist() for t in (parameter, gradient, sensitivity, uncertainty))):
        mean = beta1 * s + (1 - beta1) * abs(w * g)
        pairs.append((mean, beta2 * u + (1 - beta2) * abs(abs(w * g) - mean)))
    both = torch.tensor(pairs).T
    return both[0].reshape(parameter.shape), both[1].reshape(parameter.shape)


@right("smoothed_sensitivity")
def in_numpy(parameter, gradient, sensitivity, uncertainty, beta1, beta2):
    now = np.abs(parameter.numpy() * gradient.numpy())
    smoothed = np.average(np.stack([sensitivity.numpy(), now]), axis=0, weights=[beta1, 1 - beta1])
    distance = beta1 * np.abs(now - sensitivity.numpy())  # from the new mean, by the share that is left
    return smoothed, beta2 * uncertainty.numpy() + (1 - beta2) * distance


NOW = "now = (parameter * gradient).abs()"
SMOOTHED = "smoothed = (beta1 * sensitivity).add(now, alpha=1 - beta1)"
UNCERTAIN = "(beta2 * uncertainty).add((now - smoothed).abs(), alpha=1 - beta2)"


@wrong("smoothed_sensitivity", "You do not take the absolute value of w g: positive and negative ones would cancel.")
@changed(smoothed_sensitivity, (NOW, "now = parameter * gradient"))
def with_signs(): ...


@wrong(
    "smoothed_sensitivity",
    "You use only the gradient. The smaller a number is, the less is lost by setting it to zero.",
)
@changed(smoothed_sensitivity, (NOW, "now = gradient.abs()"))
def only_the_gradient(): ...


@wrong("smoothed_sensitivity", "You use only the magnitude of w. Its gradient says whether the loss depends on it.")
@changed(smoothed_sensitivity, (NOW, "now = parameter.abs()"))
def only_the_magnitude(): ...


@wrong("smoothed_sensitivity", "You square w g. The sensitivity is its absolute value.")
@changed(smoothed_sensitivity, (NOW, "now = (parameter * gradient).square()"))
def squared(): ...


@wrong("smoothed_sensitivity", "You have beta1 the wrong way round: it is the weight of the old value.")
@changed(smoothed_sensitivity, (SMOOTHED, "smoothed = (1 - beta1) * sensitivity + beta1 * now"))
def the_weights_are_exchanged(): ...


@wrong("smoothed_sensitivity", "You have beta2 the wrong way round: it is the weight of the old value.")
@changed(smoothed_sensitivity, (UNCERTAIN, "(1 - beta2) * uncertainty + beta2 * (now - smoothed).abs()"))
def the_weights_of_the_uncertainty_are_exchanged(): ...


@wrong("smoothed_sensitivity", "The distance is from the *new* smoothed sensitivity, not from the old one.")
@changed(smoothed_sensitivity, (UNCERTAIN, "beta2 * uncertainty + (1 - beta2) * (now - sensitivity).abs()"))
def the_distance_from_the_old_mean(): ...


@wrong("smoothed_sensitivity", "You smooth the uncertainty with beta1. It has a rate of its own, beta2.")
@changed(smoothed_sensitivity, (UNCERTAIN, "(beta1 * uncertainty).add((now - smoothed).abs(), alpha=1 - beta1)"))
def one_beta_for_both(): ...


@wrong("smoothed_sensitivity", "You add the new value with its full weight. Its weight is 1 - beta.")
@changed(smoothed_sensitivity, (SMOOTHED, "smoothed = beta1 * sensitivity + now"))
def not_a_mean(): ...


@wrong("smoothed_sensitivity", "The distance keeps its sign in your uncertainty. It is an absolute value.")
@changed(smoothed_sensitivity, (UNCERTAIN, "(beta2 * uncertainty).add(now - smoothed, alpha=1 - beta2)"))
def the_distance_with_its_sign(): ...


@wrong("smoothed_sensitivity", "You square the distance, as for a variance. It is an absolute value.")
@changed(smoothed_sensitivity, (UNCERTAIN, "(beta2 * uncertainty).add((now - smoothed).square(), alpha=1 - beta2)"))
def a_variance(): ...


@wrong("smoothed_sensitivity", "You forget the old uncertainty: it is a running mean as well.")
@changed(smoothed_sensitivity, (UNCERTAIN, "(now - smoothed).abs()"))
def the_uncertainty_is_not_smoothed(): ...


@wrong("smoothed_sensitivity", "You forget the old sensitivity: what you return is that of this batch alone.")
@changed(smoothed_sensitivity, (SMOOTHED, "smoothed = now"))
def the_sensitivity_is_not_smoothed(): ...


@wrong("smoothed_sensitivity", "You return the uncertainty first.")
@changed(smoothed_sensitivity, ("return smoothed, " + UNCERTAIN, "return " + UNCERTAIN + ", smoothed"))
def the_uncertainty_first(): ...


@wrong("smoothed_sensitivity", "You return the importance, the product of the two. What is wanted is both of them.")
@changed(smoothed_sensitivity, ("return smoothed, " + UNCERTAIN, "return smoothed * " + UNCERTAIN))
def their_product(): ...


@wrong("smoothed_sensitivity", caught_by="changes its input")
def in_place(parameter, gradient, sensitivity, uncertainty, beta1, beta2):
    now = (parameter * gradient).abs()
    sensitivity.mul_(beta1).add_(now, alpha=1 - beta1)
    uncertainty.mul_(beta2).add_((now - sensitivity).abs(), alpha=1 - beta2)
    return sensitivity, uncertainty


# --- triplet_scores ----------------------------------------------------------------------------------

PARTS = ("lora_A", "lora_E", "lora_B")


@right("triplet_scores")
def with_einsum(sensitivity, uncertainty):
    A = torch.einsum("ri,ri->r", sensitivity["lora_A"], uncertainty["lora_A"]) / sensitivity["lora_A"].shape[1]
    B = torch.einsum("or,or->r", sensitivity["lora_B"], uncertainty["lora_B"]) / len(sensitivity["lora_B"])
    return A + B + (sensitivity["lora_E"] * uncertainty["lora_E"])[:, 0]


@right("triplet_scores")
def triplet_by_triplet(sensitivity, uncertainty):
    scores = []
    for i in range(len(sensitivity["lora_E"])):
        score = float(sensitivity["lora_E"][i] * uncertainty["lora_E"][i])
        score += float((sensitivity["lora_A"][i] * uncertainty["lora_A"][i]).mean())
        score += float((sensitivity["lora_B"][:, i] * uncertainty["lora_B"][:, i]).mean())
        scores.append(score)
    return torch.tensor(scores)


@right("triplet_scores")
def every_part_with_triplets_in_its_rows(sensitivity, uncertainty):
    rows = [sensitivity[part] * uncertainty[part] for part in PARTS]
    rows[2] = rows[2].T
    return torch.stack([one.sum(dim=1) / one.shape[1] for one in rows]).sum(dim=0)


@right("triplet_scores")
def in_numpy_(sensitivity, uncertainty):
    importance = {part: sensitivity[part].numpy() * uncertainty[part].numpy() for part in PARTS}
    return importance["lora_E"].ravel() + np.mean(importance["lora_A"], axis=1) + np.mean(importance["lora_B"], axis=0)


PRODUCT = "sensitivity[part] * uncertainty[part]"
TOTAL = "E.flatten() + A.mean(dim=1) + B.mean(dim=0)"


@wrong("triplet_scores", "You add up the importances of a row and of a column. Of A and B the *mean* counts.")
@changed(triplet_scores, (TOTAL, "E.flatten() + A.sum(dim=1) + B.sum(dim=0)"))
def sums(): ...


@wrong("triplet_scores", "You take the largest importance of a row and of a column. Their mean counts.")
@changed(triplet_scores, (TOTAL, "E.flatten() + A.amax(dim=1) + B.amax(dim=0)"))
def maxima(): ...


@wrong(
    "triplet_scores",
    "You take the mean over the rows of B, or the columns of A, where the shapes allow it: mind the axes.",
)
@changed(
    triplet_scores,
    (
        TOTAL,
        "E.flatten() + (A.mean(dim=0) + B.mean(dim=1) if len(A) == A.shape[1] == len(B) else A.mean(1) + B.mean(0))",
    ),
)
def the_other_axes(): ...


@wrong("triplet_scores", "E is missing: a triplet's own strength is part of its score.")
@changed(triplet_scores, (TOTAL, "A.mean(dim=1) + B.mean(dim=0)"))
def without_E(): ...


@wrong("triplet_scores", "You use only E. The row of A and the column of B count as well.")
@changed(triplet_scores, (TOTAL, "E.flatten()"))
def only_E(): ...


@wrong("triplet_scores", "You use the sensitivity alone. The importance is its product with the uncertainty.")
@changed(triplet_scores, (PRODUCT, "sensitivity[part]"))
def only_the_sensitivity(): ...


@wrong("triplet_scores", "You add sensitivity and uncertainty. The importance is their product.")
@changed(triplet_scores, (PRODUCT, "sensitivity[part] + uncertainty[part]"))
def added(): ...


@wrong("triplet_scores", "You divide by the uncertainty. The importance is the product of the two (eq. 11).")
@changed(triplet_scores, (PRODUCT, "sensitivity[part] / uncertainty[part]"))
def divided(): ...


@wrong("triplet_scores", "You multiply the means. First comes the product for each number, then the mean.")
def the_product_of_means(sensitivity, uncertainty):
    def means(table):
        return torch.stack([table["lora_E"][:, 0], table["lora_A"].mean(dim=1), table["lora_B"].mean(dim=0)])

    return (means(sensitivity) * means(uncertainty)).sum(dim=0)


@wrong("triplet_scores", "You multiply the three parts. The score is their sum.")
@changed(triplet_scores, (TOTAL, "E.flatten() * A.mean(dim=1) * B.mean(dim=0)"))
def multiplied(): ...


@wrong("triplet_scores", "You take one mean over A and B together. Each has a mean of its own.")
@changed(triplet_scores, (TOTAL, "E.flatten() + (A.sum(dim=1) + B.sum(dim=0)) / (A.shape[1] + len(B))"))
def one_mean(): ...


@wrong("triplet_scores", "Your scores are (r, r): E is (r, 1), and adding (r,) to it makes a table. Flatten E first.")
@changed(triplet_scores, (TOTAL, "E + A.mean(dim=1) + B.mean(dim=0)"))
def a_table(): ...


@wrong("triplet_scores", "You return the mean of the three parts. The score is their sum.")
@changed(triplet_scores, (TOTAL, "(E.flatten() + A.mean(dim=1) + B.mean(dim=0)) / 3"))
def a_third(): ...


@wrong("triplet_scores", "Your scores are (r, 1). They should be (r,).")
@changed(triplet_scores, (TOTAL, "E + (A.mean(dim=1) + B.mean(dim=0))[:, None]"))
def a_column(): ...
