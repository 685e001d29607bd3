"""Unit 09, LoRA's arithmetic and its start: mistakes that people make, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong

# --- delta_weight ---------------------------------------------------------------------------------


@right("delta_weight")
def a_sum_of_outer_products(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return sum(torch.outer(scaling * B[:, k], A[k]) for k in range(len(A)))


@right("delta_weight")
def by_einstein_with_the_scaling_inside(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return torch.einsum("or,ri->oi", scaling * B, A)


@right("delta_weight")
def what_it_does_to_each_unit_vector(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return (F.linear(F.linear(torch.eye(A.shape[1]), A), B) * scaling).T


@right("delta_weight")
def column_by_column(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return torch.stack([scaling * torch.mv(B, A[:, i]) for i in range(A.shape[1])], dim=1)


@right("delta_weight")
def one_kernel_with_alpha(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return torch.addmm(A.new_zeros(len(B), A.shape[1]), B, A, beta=0, alpha=scaling)


@wrong("delta_weight", "The scaling is missing: your change does not depend on alpha.")
def without_the_scaling(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return B @ A


@wrong(
    "delta_weight",
    "Your result contains the scaling twice. If both factors are scaled, their product contains its square.",
)
def scaled_twice(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return (scaling * B) @ (scaling * A)


@wrong(
    "delta_weight",
    "You divide by the rank once more, or take the mean over the r terms of the product. They are added up, and the "
    "given scaling already includes the division by r.",
)
def divided_by_the_rank_again(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return scaling / len(A) * (B @ A)


@wrong(
    "delta_weight",
    "A scaling of 0 is taken as if none had been given: `scaling or 1` is 1 for it. At 0 nothing should change.",
)
def zero_means_one(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return (scaling or 1.0) * (B @ A)


@wrong(
    "delta_weight",
    "You use only the first column of B and the first row of A. The product adds up one such term for each of the r.",
)
def only_the_first_pair(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return scaling * B[:, :1] * A[:1]


@wrong("delta_weight", "You divide by the scaling. A larger alpha has to make the change larger.")
def divided_by_the_scaling(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return B @ A / scaling


@wrong(
    "delta_weight",
    "Your result is (in, out). The weight of a Linear is (out, in): it has as many rows as B and as many columns as A.",
)
def turned_round(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return scaling * (A.T @ B.T)


@wrong(
    "delta_weight",
    "The values are right, but no gradient reaches A and B, which are all that LoRA trains. Where do they leave the "
    "graph?",
)
def outside_the_graph(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return (scaling * (B @ A)).detach()


@wrong("delta_weight", "Gradients reach B but not A: both factors are trained.")
def a_gradient_for_b_only(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return scaling * (B @ A.detach())


@wrong("delta_weight", "You add the scaling to the product. The product is multiplied by it.")
def scaling_added(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return B @ A + scaling


# --- initial_factors ------------------------------------------------------------------------------


def possible(in_features: int, out_features: int, rank: int) -> None:
    if not 0 < rank <= min(in_features, out_features):
        raise ValueError(f"no LoRA of rank {rank} fits")


def uniform(rows: int, columns: int, bound: float, generator: torch.Generator | None) -> Tensor:
    return (2 * torch.rand(rows, columns, generator=generator) - 1) * bound


@right("initial_factors")
def scaled_from_zero_to_one(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return uniform(rank, in_features, in_features**-0.5, generator), torch.zeros(out_features, rank)


@right("initial_factors")
def in_float64_row_by_row(in_features: int, out_features: int, rank: int, generator=None) -> list[Tensor]:
    possible(in_features, out_features, rank)
    bound = 1 / math.sqrt(in_features)
    rows = [torch.empty(in_features).double().uniform_(-bound, bound, generator=generator) for _ in range(rank)]
    return [torch.stack(rows).float(), torch.zeros(out_features, rank)]


@right("initial_factors")
def numpy_with_a_seed_from_the_generator(in_features: int, out_features: int, rank: int, generator=None) -> tuple:
    possible(in_features, out_features, rank)
    numbers = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    A = numbers.uniform(-1, 1, (rank, in_features)) / np.sqrt(in_features)
    return torch.from_numpy(A.astype(np.float32)), torch.from_numpy(np.zeros((out_features, rank), np.float32))


@right("initial_factors")
def sizes_and_signs(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    sizes = torch.rand(in_features, rank, generator=generator).mul(in_features**-0.5)
    signs = 2 * torch.randint(2, (in_features, rank), generator=generator) - 1
    return (sizes * signs).T, sizes.new_zeros((out_features, rank))


@wrong(
    "initial_factors",
    "Both factors are zero. Each gradient then contains the other, zero, factor, so neither ever gets a gradient.",
)
def both_zero(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    uniform(rank, in_features, 1, generator)
    return torch.zeros(rank, in_features), torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "Both factors are random. Then B A is not zero, and the model you adapt is no longer the one you loaded.",
)
def both_random(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    A = uniform(rank, in_features, in_features**-0.5, generator)
    return A, uniform(out_features, rank, rank**-0.5, generator)


@wrong(
    "initial_factors",
    "Your A is zero and your B is random. That also starts as the base model, and it learns, but more slowly: the "
    "docstring asks for the reverse.",
)
def the_other_one_is_zero(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return torch.zeros(rank, in_features), uniform(out_features, rank, rank**-0.5, generator)


@wrong(
    "initial_factors",
    "The range of A is computed from r. Each row of A is multiplied with all the inputs of the layer, so their number "
    "sets the range. (This happens when A is stored transposed and PyTorch takes the wrong axis for the inputs.)",
)
def spread_by_the_rank(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    A = nn.init.kaiming_uniform_(torch.empty(in_features, rank), a=math.sqrt(5), generator=generator).T
    return A, torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "The range of A is computed from the number of outputs of the layer. A is multiplied with its inputs.",
)
def spread_by_the_outputs(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return uniform(rank, in_features, out_features**-0.5, generator), torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "A is drawn from a normal distribution with standard deviation 1, whatever the layer. The wider the layer, the "
    "more such numbers are added up: the range has to shrink with the width.",
)
def standard_normal(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return torch.randn(rank, in_features, generator=generator), torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "A is normal and not uniform: some of its entries exceed the bound. (The paper uses a Gaussian as well; here the "
    "initialisation follows loralib and PEFT.)",
)
def a_narrow_gaussian(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    A = torch.randn(rank, in_features, generator=generator) / math.sqrt(3 * in_features)
    return A, torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "The range of A is more than twice as wide as it should be: `kaiming_uniform_` has a parameter `a`, and its "
    "default is not the right one here.",
)
def kaiming_by_default(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return nn.init.kaiming_uniform_(torch.empty(rank, in_features), generator=generator), torch.zeros(
        out_features, rank
    )


@wrong(
    "initial_factors",
    "The smallest rank or the largest is refused: r may be 1, and it may be as large as the smaller side of W.",
)
def the_largest_rank_is_refused(in_features: int, out_features: int, rank: int, generator=None) -> tuple:
    if not 0 < rank < min(in_features, out_features):
        raise ValueError
    return uniform(rank, in_features, in_features**-0.5, generator), torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "You compare the rank with the number of outputs only. A rank above the number of inputs does not fit either.",
)
def compares_with_the_outputs(in_features: int, out_features: int, rank: int, generator=None) -> tuple:
    possible(out_features, out_features, rank)
    return uniform(rank, in_features, in_features**-0.5, generator), torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "You compare the rank with the number of inputs only. A rank above the number of outputs does not fit either.",
)
def compares_with_the_inputs(in_features: int, out_features: int, rank: int, generator=None) -> tuple:
    possible(in_features, in_features, rank)
    return uniform(rank, in_features, in_features**-0.5, generator), torch.zeros(out_features, rank)


@wrong("initial_factors", "A rank of 0 or less is not refused: only one that is too large.")
def refuses_only_large_ranks(in_features: int, out_features: int, rank: int, generator=None) -> tuple:
    if rank > min(in_features, out_features):
        raise ValueError
    return uniform(max(rank, 0), in_features, in_features**-0.5, generator), torch.zeros(out_features, max(rank, 0))


@wrong(
    "initial_factors",
    "Two calls with one generator give the same A: you go back to the generator's seed. Draw from it as it is, so that "
    "each layer gets other numbers.",
)
def goes_back_to_the_seed(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    if generator is not None:
        generator.manual_seed(generator.initial_seed())
    return uniform(rank, in_features, in_features**-0.5, generator), torch.zeros(out_features, rank)


@wrong("initial_factors", "Without a generator your A is the same each time. Then PyTorch's own generator is used.")
def a_seed_of_its_own_for_none(in_features: int, out_features: int, rank: int, generator=None) -> tuple:
    possible(in_features, out_features, rank)
    generator = generator or torch.Generator().manual_seed(0)
    return uniform(rank, in_features, in_features**-0.5, generator), torch.zeros(out_features, rank)


@wrong("initial_factors", "All rows of A are the same. Each entry is drawn by itself.")
def one_row_for_all(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    A = uniform(1, in_features, in_features**-0.5, generator).repeat(rank, 1)
    return A, torch.zeros(out_features, rank)


@wrong("initial_factors", caught_by="dtype")
def in_float64(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    A = uniform(rank, in_features, in_features**-0.5, generator)
    return A.double(), torch.zeros(out_features, rank).double()


@wrong("initial_factors", "No entry of A is negative: the range has to be symmetric around zero.")
def never_negative(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    A = torch.rand(rank, in_features, generator=generator) / math.sqrt(in_features)
    return A, torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "You draw from PyTorch's global generator and not from the given one: the same seed gives different numbers each "
    "time, so a run cannot be reproduced.",
)
def forgets_the_generator(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return uniform(rank, in_features, in_features**-0.5, None), torch.zeros(out_features, rank)


@wrong("initial_factors", "The factors are the same whatever the generator: a seed is set inside the function.")
def a_seed_of_its_own(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    own = torch.Generator().manual_seed(0)
    return uniform(rank, in_features, in_features**-0.5, own), torch.zeros(out_features, rank)


@wrong(
    "initial_factors",
    "Reject a rank that does not fit the layer with a ValueError: 0, or more than the smaller side of W.",
)
def any_rank(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    return uniform(rank, in_features, in_features**-0.5, generator), torch.zeros(out_features, rank)


@wrong("initial_factors", caught_by="transposed")
def each_turned_round(in_features: int, out_features: int, rank: int, generator=None) -> tuple[Tensor, Tensor]:
    possible(in_features, out_features, rank)
    return uniform(in_features, rank, in_features**-0.5, generator), torch.zeros(rank, out_features)
