"""Unit 24: mistakes that people make, and other right ways. Sums of LoRAs, and tests of them."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.checks.unit_24 import lora_sums

# --- sum_of_loras ------------------------------------------------------------------------------------


@right("sum_of_loras")
def stacked_with_the_weights_on_B(pairs, weights):
    return lora_sums.weights_on_B(pairs, weights)


@right("sum_of_loras")
def stacked_with_the_weights_on_A(pairs, weights):
    return torch.vstack([w * A for (A, _), w in zip(pairs, weights)]), torch.hstack([B for _, B in pairs])


@right("sum_of_loras")
def the_last_lora_first(pairs, weights):
    return lora_sums.last_first(pairs, weights)


@right("sum_of_loras")
def written_into_empty_matrices(pairs, weights):
    total = sum(len(A) for A, _ in pairs)
    A = torch.zeros(total, pairs[0][0].shape[1])
    B = torch.zeros(pairs[0][1].shape[0], total)
    place = 0
    for (one, other), weight in zip(pairs, weights):
        for row in range(len(one)):
            A[place] = one[row]
            B[:, place] = weight * other[:, row]
            place += 1
    return A, B


@right("sum_of_loras")
def roots_of_the_weights_on_both(pairs, weights):
    return lora_sums.roots_on_both(pairs, weights)


@wrong(
    "sum_of_loras",
    "You add up all A and all B. The product of the two sums contains B_1 A_2 and B_2 A_1 as well, which belong to no "
    "LoRA.",
)
def the_factors_are_added(pairs, weights):
    roots = [abs(w) ** 0.5 for w in weights]
    ranks = {len(A) for A, _ in pairs}
    if len(ranks) > 1:
        raise ValueError("the ranks differ")
    A = sum((r if w >= 0 else -r) * A for r, w, (A, _) in zip(roots, weights, pairs))
    return A, sum(r * B for r, (_, B) in zip(roots, pairs))


@wrong(
    "sum_of_loras",
    "You average the A and the B with the weights. A product of two weighted sums has cross terms, and squares of the "
    "weights.",
)
def the_factors_are_averaged(pairs, weights):
    rank = max(len(A) for A, _ in pairs)
    A = sum(w * torch.nn.functional.pad(A, (0, 0, 0, rank - len(A))) for (A, _), w in zip(pairs, weights))
    return A, sum(w * torch.nn.functional.pad(B, (0, rank - B.shape[1])) for (_, B), w in zip(pairs, weights))


@wrong("sum_of_loras", "The weights are not used in your sum.")
def without_the_weights(pairs, weights):
    return lora_sums.unweighted(pairs, weights)


@wrong("sum_of_loras", "You multiply A and B by the weight, so that the update gets its square.")
def the_weight_on_both(pairs, weights):
    return lora_sums.weighted_twice(pairs, weights)


@wrong("sum_of_loras", "You divide the weights by their sum. They are used as they are.")
def the_weights_are_normalised(pairs, weights):
    total = sum(weights) or 1.0
    return lora_sums.weights_on_B(pairs, [w / total for w in weights])


@wrong("sum_of_loras", "A negative weight counts as a positive one in your sum. It subtracts a LoRA.")
def signs_are_lost(pairs, weights):
    return lora_sums.without_signs(pairs, weights)


@wrong("sum_of_loras", "The A are in another order than the B, so that each B_i meets the A of another LoRA.")
def out_of_step(pairs, weights):
    _, B = lora_sums.weights_on_B(pairs, weights)
    return torch.cat([A for A, _ in reversed(pairs)]), B


@wrong("sum_of_loras", "You put the LoRAs beside each other the wrong way round: A is (r_1 + r_2 + ..., in).")
def transposed(pairs, weights):
    A, B = lora_sums.weights_on_B(pairs, weights)
    return A.T, B.T


@wrong("sum_of_loras", "You return the update itself. What is wanted is a LoRA, with its A and its B.")
def the_update_itself(pairs, weights):
    A, B = lora_sums.weights_on_B(pairs, weights)
    return B @ A


@wrong("sum_of_loras", "You return B first. The pair is (A, B).")
def B_first(pairs, weights):
    A, B = lora_sums.weights_on_B(pairs, weights)
    return B, A


@wrong("sum_of_loras", "You return only the first LoRA, or leave out all but two.")
def only_the_first(pairs, weights):
    return lora_sums.weights_on_B(pairs[:1], weights[:1])


@wrong("sum_of_loras", "You leave out the last LoRA.")
def the_last_is_missing(pairs, weights):
    end = max(1, len(pairs) - 1)
    return lora_sums.weights_on_B(pairs[:end], weights[:end])


@wrong("sum_of_loras", caught_by="changes its input")
def multiplied_in_place(pairs, weights):
    return lora_sums.in_place(pairs, weights)


# --- test_sum_of_loras -------------------------------------------------------------------------------


def loras(number=3, rank=2, out=4, inputs=6):
    return [(torch.randn(rank, inputs), torch.randn(out, rank)) for _ in range(number)]


def expected(pairs, weights):
    return sum(w * B @ A for (A, B), w in zip(pairs, weights))


def copied(pairs):
    return [(A.clone(), B.clone()) for A, B in pairs]


def unchanged(pairs, copies):
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(pairs, copies))


@right("test_sum_of_loras")
def one_uneven_sum(sum_of_loras):
    pairs, weights = loras(), [1.5, -2.0, 0.25]
    copies = copied(pairs)
    A, B = sum_of_loras(pairs, weights)
    assert torch.allclose(B @ A, expected(copies, weights), atol=1e-4)
    assert unchanged(pairs, copies)


@right("test_sum_of_loras")
def on_a_vector(sum_of_loras):
    for weights in ([0.5, 0.25], [3.0, -1.0], [-0.5, -0.7]):
        pairs = loras(2)
        copies, x = copied(pairs), torch.randn(6)
        A, B = sum_of_loras(pairs, weights)
        wanted = torch.zeros(4)
        for (one, other), weight in zip(copies, weights):
            wanted = wanted + weight * (other @ (one @ x))
        assert (B @ (A @ x) - wanted).abs().max() < 1e-3
        for pair, copy in zip(pairs, copies):
            assert all(torch.equal(*both) for both in zip(pair, copy))


@right("test_sum_of_loras")
def whole_numbers(sum_of_loras):
    pairs = [
        (torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]])),
        (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [1.0]])),
    ]
    copies = copied(pairs)
    A, B = sum_of_loras(pairs, [2.0, -3.0])
    if (B @ A - torch.tensor([[2.0, 0.0], [0.0, -3.0]])).norm() > 1e-3:
        raise AssertionError("wrong update")
    assert unchanged(pairs, copies), "the LoRAs have changed"


@right("test_sum_of_loras")
def one_lora_at_a_time(sum_of_loras):
    pairs = loras(3)
    copies = copied(pairs)
    A, B = sum_of_loras(pairs, [1.0, 1.0, 1.0])
    assert torch.allclose(B @ A, expected(copies, [1.0, 1.0, 1.0]), atol=1e-4)
    for place in range(3):
        weights = [1.0, 1.0, 1.0]
        weights[place] = -2.5
        pairs = copied(copies)
        A, B = sum_of_loras(pairs, weights)
        assert torch.allclose(B @ A, expected(copies, weights), atol=1e-4)
        assert unchanged(pairs, copies)


@wrong("test_sum_of_loras", "Your test passes every function, the faulty ones too: it never raises an AssertionError.")
def never_fails(sum_of_loras):
    pairs, weights = loras(), [1.5, -2.0, 0.25]
    A, B = sum_of_loras(pairs, weights)
    return torch.allclose(B @ A, expected(pairs, weights), atol=1e-4)


@wrong("test_sum_of_loras", "Your test refuses every function, the sound ones too. Do you compare for equality?")
def always_fails(sum_of_loras):
    pairs, weights = loras(3, 5, 30, 40), [1.5, -2.0, 0.3]
    A, _ = sum_of_loras(pairs, weights)
    assert A is None


@wrong(
    "test_sum_of_loras",
    "Your test demands a certain A or B. The weights may be on either, and the LoRAs in any order: compare products.",
)
def a_certain_A(sum_of_loras):
    pairs, weights = loras(), [1.5, -2.0, 0.25]
    copies = copied(pairs)
    A, B = sum_of_loras(pairs, weights)
    assert torch.allclose(A, torch.cat([one for one, _ in copies]))
    assert torch.allclose(B @ A, expected(copies, weights), atol=1e-4)
    assert unchanged(pairs, copies)


@wrong(
    "test_sum_of_loras",
    "Your test demands that A has as many rows as all ranks together. B may be made orthonormal, with fewer columns.",
)
def a_certain_shape(sum_of_loras):
    pairs, weights = loras(), [1.5, -2.0, 0.25]
    copies = copied(pairs)
    A, B = sum_of_loras(pairs, weights)
    assert A.shape == (6, 6)
    assert torch.allclose(B @ A, expected(copies, weights), atol=1e-4)
    assert unchanged(pairs, copies)


@wrong("test_sum_of_loras", "All weights are 1 in your test, so it cannot see how they are used.")
def weights_of_one(sum_of_loras):
    pairs, weights = loras(), [1.0, 1.0, 1.0]
    copies = copied(pairs)
    A, B = sum_of_loras(pairs, weights)
    assert torch.allclose(B @ A, expected(copies, weights), atol=1e-4)
    assert unchanged(pairs, copies)


@wrong("test_sum_of_loras", "The weights add up to 1 in your test, so it cannot see a function that makes them do so.")
def weights_that_add_up_to_one(sum_of_loras):
    pairs, weights = loras(), [1.5, -0.75, 0.25]
    copies = copied(pairs)
    A, B = sum_of_loras(pairs, weights)
    assert torch.allclose(B @ A, expected(copies, weights), atol=1e-4)
    assert unchanged(pairs, copies)


@wrong("test_sum_of_loras", "No weight is negative in your test.")
def no_negative_weight(sum_of_loras):
    pairs, weights = loras(), [1.5, 2.0, 0.25]
    copies = copied(pairs)
    A, B = sum_of_loras(pairs, weights)
    assert torch.allclose(B @ A, expected(copies, weights), atol=1e-4)
    assert unchanged(pairs, copies)


@wrong(
    "test_sum_of_loras",
    "Your test uses a single LoRA, or compares only the norm or the diagonal. With one LoRA there are no cross terms.",
)
def a_single_lora(sum_of_loras):
    pairs, weights = loras(1), [-2.0]
    copies = copied(pairs)
    A, B = sum_of_loras(pairs, weights)
    assert torch.allclose(B @ A, expected(copies, weights), atol=1e-4)
    assert unchanged(pairs, copies)


@wrong(
    "test_sum_of_loras",
    "Your test does not look whether the given A and B have changed, or compares them with themselves: copy them.",
)
def changes_are_not_seen(sum_of_loras):
    pairs, weights = loras(), [1.5, -2.0, 0.25]
    copies = copied(pairs)
    A, B = sum_of_loras(pairs, weights)
    assert torch.allclose(B @ A, expected(copies, weights), atol=1e-4)


@wrong("test_sum_of_loras", "Your test looks only whether something has changed. It does not look at the result.")
def only_changes_are_seen(sum_of_loras):
    pairs = loras()
    copies = copied(pairs)
    sum_of_loras(pairs, [1.5, -2.0, 0.25])
    assert unchanged(pairs, copies)


@wrong("test_sum_of_loras", caught_by="raises")
def another_exception(sum_of_loras):
    pairs, weights = loras(), [1.5, -2.0, 0.25]
    copies = copied(pairs)
    A, B = sum_of_loras(pairs, weights)
    if not torch.allclose(B @ A, expected(copies, weights), atol=1e-4) or not unchanged(pairs, copies):
        raise ValueError("not the sum")
