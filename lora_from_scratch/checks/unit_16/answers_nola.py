"""Unit 16, fewer numbers than rank one: mistakes that people make, and other right ways. NOLA's combinations."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong


def drawn(k: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """The matrices U, (k, *shape)."""
    return (2 * torch.rand(k, *shape, generator=torch.Generator().manual_seed(seed)) - 1) / math.sqrt(k)


# --- random_combination ----------------------------------------------------------------------------------


@right("random_combination")
def all_at_once(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    return torch.einsum("k,kij->ij", coefficients, drawn(len(coefficients), shape, seed).to(coefficients.dtype))


@right("random_combination")
def one_matrix_at_a_time(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator()
    generator.manual_seed(seed)
    total = torch.zeros(shape, dtype=coefficients.dtype)
    for c in coefficients:
        total = total + c * (2 * torch.rand(shape, generator=generator) - 1)
    return total / len(coefficients) ** 0.5


@right("random_combination")
def a_product_with_rows(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    k, rows, columns = len(coefficients), *shape
    U = torch.empty(k, rows * columns)
    U.uniform_(-1, 1, generator=torch.Generator(device="cpu").manual_seed(seed))
    return (coefficients @ U.to(coefficients) / k**0.5).reshape(rows, columns)


@right("random_combination")
def the_global_generator_put_back(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        R = torch.rand(len(coefficients), *shape)
    U = (2 * R - 1).mul(len(coefficients) ** -0.5)
    return (coefficients[:, None, None] * U.to(coefficients.dtype)).sum(0)


@wrong(
    "random_combination",
    "This is the fault of the code above: after every call the global generator has another seed. It may take no part.",
)
def another_seed_afterwards(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    afterwards = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    U = (2 * torch.rand(len(coefficients), *shape) - 1) / math.sqrt(len(coefficients))
    torch.manual_seed(afterwards)
    return torch.einsum("k,kij->ij", coefficients, U.to(coefficients.dtype))


@wrong(
    "random_combination",
    "You seed the global generator and leave it so. After every call the rest of the program gets the same random "
    "numbers again: the same dropout masks in every step.",
)
def the_seed_is_left(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    torch.manual_seed(seed)
    U = (2 * torch.rand(len(coefficients), *shape) - 1) / math.sqrt(len(coefficients))
    return torch.einsum("k,kij->ij", coefficients, U.to(coefficients.dtype))


@wrong(
    "random_combination",
    "You give the global generator back the seed that it had. Its state is then that of its beginning, not the one in "
    "which you found it.",
)
def the_old_seed_afterwards(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    before = torch.initial_seed()
    torch.manual_seed(seed)
    U = (2 * torch.rand(len(coefficients), *shape) - 1) / math.sqrt(len(coefficients))
    torch.manual_seed(before)
    return torch.einsum("k,kij->ij", coefficients, U.to(coefficients.dtype))


@wrong("random_combination", "You make a generator and do not pass it to `torch.rand`, which uses the global one.")
def the_generator_is_not_used(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    torch.Generator().manual_seed(seed)
    U = (2 * torch.rand(len(coefficients), *shape) - 1) / math.sqrt(len(coefficients))
    return torch.einsum("k,kij->ij", coefficients, U.to(coefficients.dtype))


@wrong("random_combination", "You make a generator and do not seed it: all seeds give the same matrices.")
def the_seed_is_not_used(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    U = (2 * torch.rand(len(coefficients), *shape, generator=torch.Generator()) - 1) / math.sqrt(len(coefficients))
    return torch.einsum("k,kij->ij", coefficients, U.to(coefficients.dtype))


@wrong("random_combination", "You do not divide by sqrt(k).")
def without_the_root_of_k(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    return all_at_once(coefficients, shape, seed) * math.sqrt(len(coefficients))


@wrong("random_combination", "You divide by k, as for a mean. It is sqrt(k): the variance of a sum grows with k.")
def divided_by_k(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    return all_at_once(coefficients, shape, seed) / math.sqrt(len(coefficients))


@wrong("random_combination", "Your random numbers are between 0 and 1. The entries of U are on both sides of 0.")
def not_centred(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    R = torch.rand(len(coefficients), *shape, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("k,kij->ij", coefficients, R.to(coefficients.dtype)) / math.sqrt(len(coefficients))


@wrong("random_combination", "You draw from a normal distribution (`randn`). The entries of U are uniform.")
def normal_numbers(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    U = torch.randn(len(coefficients), *shape, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("k,kij->ij", coefficients, U.to(coefficients.dtype)) / math.sqrt(len(coefficients))


@wrong(
    "random_combination", "Every coefficient multiplies the same matrix: you start the generator again for each one."
)
def seeded_for_each_matrix(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    return coefficients.sum() * drawn(len(coefficients), shape, seed)[0].to(coefficients.dtype)


@wrong(
    "random_combination", "You take seed + i for matrix i. All k matrices come from one generator, one after the other."
)
def a_seed_for_each_matrix(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    parts = [c * drawn(1, shape, seed + i)[0].to(c.dtype) for i, c in enumerate(coefficients)]
    return torch.stack(parts).sum(0) / math.sqrt(len(coefficients))


@wrong(
    "random_combination", "You draw the matrices in the dtype of the coefficients. float64 takes other random numbers."
)
def drawn_in_the_dtype_of_the_coefficients(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    R = torch.rand(len(coefficients), *shape, generator=generator, dtype=coefficients.dtype)
    return torch.einsum("k,kij->ij", coefficients, 2 * R - 1) / math.sqrt(len(coefficients))


@wrong("random_combination", "The result is in float32, whatever the dtype of the coefficients.")
def in_single_precision(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    return all_at_once(coefficients.float(), shape, seed)


@wrong("random_combination", "You draw the numbers in another order: one number of every matrix, then the next one.")
def k_is_the_last_axis(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    R = torch.rand(*shape, len(coefficients), generator=torch.Generator().manual_seed(seed))
    return ((2 * R - 1).to(coefficients) @ coefficients) / math.sqrt(len(coefficients))


@wrong("random_combination", "You return the k products without adding them up.")
def not_added_up(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    return coefficients[:, None, None] * drawn(len(coefficients), shape, seed).to(coefficients.dtype)


# --- coefficient_gradient --------------------------------------------------------------------------------


@right("coefficient_gradient")
def products_summed(gradient: Tensor, k: int, seed: int) -> Tensor:
    return (drawn(k, gradient.shape, seed).to(gradient.dtype) * gradient).sum(dim=(1, 2))


@right("coefficient_gradient")
def traces(gradient: Tensor, k: int, seed: int) -> Tensor:
    return torch.stack([torch.trace(U.to(gradient.dtype).T @ gradient) for U in drawn(k, gradient.shape, seed)])


@right("coefficient_gradient")
def by_autograd(gradient: Tensor, k: int, seed: int) -> Tensor:
    c = torch.zeros(k, dtype=gradient.dtype, requires_grad=True)
    result = torch.tensordot(c, drawn(k, gradient.shape, seed).to(gradient.dtype), dims=1)
    result.backward(gradient)
    assert c.grad is not None
    return c.grad


@right("coefficient_gradient")
def one_matrix_after_the_other(gradient: Tensor, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = gradient.new_empty(k)
    for i in range(k):
        U = torch.rand(gradient.shape, generator=generator).sub(0.5).mul(2 / math.sqrt(k))
        found[i] = torch.dot(U.to(gradient.dtype).flatten(), gradient.flatten())
    return found


@wrong(
    "coefficient_gradient",
    "You seed the global generator. The backward pass may not change the random numbers of the rest of the program "
    "either.",
)
def the_global_generator(gradient: Tensor, k: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    U = (2 * torch.rand(k, *gradient.shape) - 1) / math.sqrt(k)
    return (U.to(gradient.dtype) * gradient).sum(dim=(1, 2))


@wrong(
    "coefficient_gradient",
    "You do not seed a generator, so the matrices are others than in the forward pass, and in every call others.",
)
def other_matrices(gradient: Tensor, k: int, seed: int) -> Tensor:
    U = (2 * torch.rand(k, *gradient.shape) - 1) / math.sqrt(k)
    return (U.to(gradient.dtype) * gradient).sum(dim=(1, 2))


@wrong("coefficient_gradient", "You take the mean of the products. The gradient is their sum.")
def the_mean(gradient: Tensor, k: int, seed: int) -> Tensor:
    return products_summed(gradient, k, seed) / gradient.numel()


@wrong("coefficient_gradient", "You leave out the division by sqrt(k), which is a part of U.")
def k_is_left_out(gradient: Tensor, k: int, seed: int) -> Tensor:
    return products_summed(gradient, k, seed) * math.sqrt(k)


@wrong("coefficient_gradient", "You divide by sqrt(k) twice.")
def the_root_of_k_twice(gradient: Tensor, k: int, seed: int) -> Tensor:
    return products_summed(gradient, k, seed) / math.sqrt(k)


@wrong("coefficient_gradient", "Your matrices have entries between 0 and 1. Those of the forward pass are around 0.")
def between_0_and_1(gradient: Tensor, k: int, seed: int) -> Tensor:
    R = torch.rand(k, *gradient.shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(k)
    return (R.to(gradient.dtype) * gradient).sum(dim=(1, 2))


@wrong("coefficient_gradient", "You add up along one axis only. Each coefficient has one number as its gradient.")
def one_axis_only(gradient: Tensor, k: int, seed: int) -> Tensor:
    return (drawn(k, gradient.shape, seed).to(gradient.dtype) * gradient).sum(dim=1)


@wrong("coefficient_gradient", "You add up over the matrices too. Each coefficient has a gradient of its own.")
def over_the_matrices_too(gradient: Tensor, k: int, seed: int) -> Tensor:
    return products_summed(gradient, k, seed).sum()


@wrong("coefficient_gradient", "Your result is (k, 1). It has one axis, as the coefficients have.")
def a_column(gradient: Tensor, k: int, seed: int) -> Tensor:
    return products_summed(gradient, k, seed)[:, None]


@wrong(
    "coefficient_gradient",
    "You draw matrices of the transposed shape, or compare them with G in another order of entries than the forward "
    "pass.",
)
def transposed(gradient: Tensor, k: int, seed: int) -> Tensor:
    U = drawn(k, tuple(reversed(gradient.shape)), seed).to(gradient.dtype)
    return (U * gradient.T).sum(dim=(1, 2))


@wrong(
    "coefficient_gradient",
    "You draw the matrices in the dtype of G. In float64 the generator gives other numbers than in the forward pass.",
)
def drawn_in_the_dtype_of_G(gradient: Tensor, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    R = torch.rand(k, *gradient.shape, generator=generator, dtype=gradient.dtype)
    return ((2 * R - 1) / math.sqrt(k) * gradient).sum(dim=(1, 2))


@wrong("coefficient_gradient", "The result is in float32, whatever the dtype of G.")
def in_float32(gradient: Tensor, k: int, seed: int) -> Tensor:
    return products_summed(gradient.float(), k, seed)


@wrong(
    "coefficient_gradient",
    "You read G as it is stored, and not by its rows. A gradient need not be contiguous; a transposed one is not.",
)
def as_it_is_stored(gradient: Tensor, k: int, seed: int) -> Tensor:
    flat = torch.as_strided(gradient, (gradient.numel(),), (1,))
    return drawn(k, gradient.shape, seed).to(gradient.dtype).flatten(1) @ flat


@wrong("coefficient_gradient", "`view` needs a contiguous tensor. A gradient may be the transpose of one: `reshape`.")
def viewed(gradient: Tensor, k: int, seed: int) -> Tensor:
    return drawn(k, gradient.shape, seed).to(gradient.dtype).flatten(1) @ gradient.view(-1)


@wrong(
    "coefficient_gradient", "You use the same matrix for every coefficient: the generator starts again for each one."
)
def the_first_matrix_for_all(gradient: Tensor, k: int, seed: int) -> Tensor:
    first = drawn(k, gradient.shape, seed)[0].to(gradient.dtype)
    return (first * gradient).sum().repeat(k)
