"""Unit 16, fewer numbers than rank one: mistakes that people make, and other right ways. VeRA."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.methods.vera import draw_projections, vera_delta_weight

# --- draw_projections ------------------------------------------------------------------------------------


@right("draw_projections")
def one_long_draw(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    numbers = torch.rand(rank * (in_features + out_features), generator=torch.Generator().manual_seed(seed))
    A, B = numbers.split([rank * in_features, rank * out_features])
    a, b = math.sqrt(6 / in_features), math.sqrt(6 / rank)
    return (2 * a * A - a).view(rank, in_features), (2 * b * B - b).view(out_features, rank)


@right("draw_projections")
def kaiming_for_relu(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cpu")
    generator.manual_seed(seed)
    A = nn.init.kaiming_uniform_(torch.empty(rank, in_features), nonlinearity="relu", generator=generator)
    B = nn.init.kaiming_uniform_(torch.empty(out_features, rank), nonlinearity="relu", generator=generator)
    return A, B


@right("draw_projections")
def the_global_generator_put_back(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    before = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        A = (torch.rand(rank, in_features) - 0.5) * 2 * math.sqrt(6 / in_features)
        B = (torch.rand(out_features, rank) - 0.5) * 2 * math.sqrt(6 / rank)
    finally:
        torch.set_rng_state(before)
    return A, B


@right("draw_projections")
def one_number_at_a_time(rank: int, in_features: int, out_features: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for rows, columns in ((rank, in_features), (out_features, rank)):
        bound = (6 / columns) ** 0.5
        numbers = [[torch.rand((), generator=generator) for _ in range(columns)] for _ in range(rows)]
        result.append(torch.stack([torch.stack(row) for row in numbers]).mul(2).sub(1).mul(bound))
    return result


@wrong(
    "draw_projections",
    "You seed PyTorch's global generator. Every dropout mask and every shuffle after this call is then another one.",
)
def seeds_the_global_generator(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    a, b = math.sqrt(6 / in_features), math.sqrt(6 / rank)
    return torch.empty(rank, in_features).uniform_(-a, a), torch.empty(out_features, rank).uniform_(-b, b)


@wrong("draw_projections", "You draw B first. The sequence of random numbers begins with A.")
def B_before_A(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = math.sqrt(6 / in_features), math.sqrt(6 / rank)
    B = torch.empty(out_features, rank).uniform_(-b, b, generator=generator)
    return torch.empty(rank, in_features).uniform_(-a, a, generator=generator), B


@wrong(
    "draw_projections",
    "You start the sequence again for B, so its first numbers are those of A: the two matrices are not independent.",
)
def seeded_twice(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    a, b = math.sqrt(6 / in_features), math.sqrt(6 / rank)
    A = torch.empty(rank, in_features).uniform_(-a, a, generator=torch.Generator().manual_seed(seed))
    return A, torch.empty(out_features, rank).uniform_(-b, b, generator=torch.Generator().manual_seed(seed))


@wrong(
    "draw_projections",
    "You use another seed for B. One generator gives the numbers of both matrices, one after the other.",
)
def the_next_seed_for_B(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    a, b = math.sqrt(6 / in_features), math.sqrt(6 / rank)
    A = torch.empty(rank, in_features).uniform_(-a, a, generator=torch.Generator().manual_seed(seed))
    return A, torch.empty(out_features, rank).uniform_(-b, b, generator=torch.Generator().manual_seed(seed + 1))


@wrong(
    "draw_projections",
    "The fan-in of B is not its number of outputs. B multiplies what A gives: r numbers are added up for each output.",
)
def outputs_as_fan_in_of_B(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = math.sqrt(6 / in_features), math.sqrt(6 / out_features)
    A = torch.empty(rank, in_features).uniform_(-a, a, generator=generator)
    return A, torch.empty(out_features, rank).uniform_(-b, b, generator=generator)


@wrong("draw_projections", "Your bound is the standard deviation. A uniform distribution reaches sqrt(3) times as far.")
@changed(
    draw_projections,
    ("-math.sqrt(6 / shape[1]), math.sqrt(6 / shape[1])", "-((2 / shape[1]) ** 0.5), (2 / shape[1]) ** 0.5"),
)
def the_standard_deviation() -> None: ...


@wrong(
    "draw_projections",
    "You take the bound of LoRA's A, 1/sqrt(in). The statement gives another one, sqrt(6) times as large.",
)
@changed(
    draw_projections, ("-math.sqrt(6 / shape[1]), math.sqrt(6 / shape[1])", "-(shape[1] ** -0.5), shape[1] ** -0.5")
)
def the_bound_of_lora() -> None: ...


@wrong("draw_projections", "You draw from a normal distribution. The statement asks for a uniform one.")
def normal_numbers(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, in_features, generator=generator) * math.sqrt(2 / in_features)
    return A, torch.randn(out_features, rank, generator=generator) * math.sqrt(2 / rank)


@wrong("draw_projections", "Your numbers are between 0 and the bound. They should be on both sides of zero.")
@changed(draw_projections, ("uniform_(-math.sqrt(6 / shape[1]), ", "uniform_(0, "))
def positive_numbers() -> None: ...


@wrong("draw_projections", "B has the shape (r, out). As in LoRA, B is (out, r).")
def B_is_transposed(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    A, B = one_long_draw(rank, in_features, out_features, seed)
    return A, B.T


@wrong("draw_projections", "You make a generator, but do not seed it: every seed gives the same matrices.")
@changed(draw_projections, ("generator = torch.Generator().manual_seed(seed)", "generator = torch.Generator()"))
def a_generator_without_the_seed() -> None: ...


@wrong(
    "draw_projections",
    "You make a generator and seed it, but the tensors are drawn from the global one: pass `generator=` to each draw.",
)
@changed(draw_projections, (", generator=generator", ""))
def the_generator_is_not_passed_on() -> None: ...


@wrong("draw_projections", "You draw in float64: that takes other random numbers from the generator than float32.")
@changed(draw_projections, ("torch.empty(shape)", "torch.empty(shape, dtype=torch.float64)"))
def in_double_precision() -> None: ...


# --- vera_delta_weight -----------------------------------------------------------------------------------


@right("vera_delta_weight")
def diagonal_matrices(A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor, in_features: int) -> Tensor:
    out_features = lambda_b.shape[0]
    return torch.diag(lambda_b) @ B[:out_features, :] @ torch.diag(lambda_d) @ A[:, :in_features]


@right("vera_delta_weight")
def one_einsum(A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor, in_features: int) -> Tensor:
    return torch.einsum("o,or,r,ri->oi", lambda_b, B.narrow(0, 0, len(lambda_b)), lambda_d, A.narrow(1, 0, in_features))


@right("vera_delta_weight")
def one_rank_after_the_other(A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor, in_features: int) -> Tensor:
    total = torch.zeros(len(lambda_b), in_features)
    for row, column, scale in zip(A, B.T, lambda_d, strict=True):
        total = total + scale * torch.outer(lambda_b * column[: len(lambda_b)], row[:in_features])
    return total


@right("vera_delta_weight")
def the_output_of_unit_vectors(A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor, in_features: int) -> Tensor:
    x = torch.eye(in_features, A.shape[1])  # one input after the other, padded with zeros
    y = nn.functional.linear(nn.functional.linear(x, A) * lambda_d, B)
    return (y[:, : len(lambda_b)] * lambda_b).T


@right("vera_delta_weight")
def cut_at_the_end(A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor, in_features: int) -> Tensor:
    whole = B @ (lambda_d.unsqueeze(1) * A)
    return lambda_b.unsqueeze(1) * whole[: lambda_b.numel(), :in_features]


@wrong("vera_delta_weight", "lambda_d is missing: it scales what is between A and B.")
@changed(vera_delta_weight, ("(B * lambda_d)", "B"))
def without_d() -> None: ...


@wrong("vera_delta_weight", "lambda_b is missing: it scales the outputs.")
@changed(vera_delta_weight, ("lambda_b[:, None] * (B * lambda_d)", "(B * lambda_d)"))
def without_b() -> None: ...


@wrong(
    "vera_delta_weight",
    "You scale the rows of B with lambda_d and its columns with lambda_b. Which of the two has one number per output?",
)
def vectors_exchanged(A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor, in_features: int) -> Tensor:
    return lambda_d[:, None] * (B[: len(lambda_b)] * lambda_b) @ A[:, :in_features]


@wrong(
    "vera_delta_weight",
    "lambda_b scales the columns of the product, which belong to the inputs. It has one number per output.",
)
def b_on_the_inputs(A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor, in_features: int) -> Tensor:
    return ((B[: len(lambda_b)] * lambda_d) @ A[:, :in_features]) * lambda_b


@wrong(
    "vera_delta_weight",
    "You use A and B whole. A layer that is smaller than the largest one uses a part of each.",
)
@changed(vera_delta_weight, ("A[:, :in_features], B[: len(lambda_b)]", "A, B"))
def the_whole_matrices() -> None: ...


@wrong("vera_delta_weight", "You take the last columns of A. Every layer uses the first ones.")
@changed(vera_delta_weight, ("A[:, :in_features]", "A[:, -in_features:]"))
def the_last_columns() -> None: ...


@wrong("vera_delta_weight", "You take the last rows of B. Every layer uses the first ones.")
@changed(vera_delta_weight, ("B[: len(lambda_b)]", "B[-len(lambda_b) :]"))
def the_last_rows() -> None: ...


@wrong("vera_delta_weight", "You return (in, out). As everywhere in this course, a change is (out, in).")
def transposed(A: Tensor, B: Tensor, lambda_d: Tensor, lambda_b: Tensor, in_features: int) -> Tensor:
    return one_einsum(A, B, lambda_d, lambda_b, in_features).T


@wrong("vera_delta_weight", "The vectors come out without gradients: your result is cut off from the graph.")
@changed(
    vera_delta_weight, ("lambda_b[:, None] * (B * lambda_d) @ A", "(lambda_b[:, None] * (B * lambda_d) @ A).detach()")
)
def detached() -> None: ...


@wrong("vera_delta_weight", "lambda_d gets no gradient: it is detached, or only its values are used.")
@changed(vera_delta_weight, ("(B * lambda_d)", "(B * lambda_d.detach())"))
def d_detached() -> None: ...


@wrong("vera_delta_weight", "A diagonal matrix multiplies once. You apply lambda_d to A and to B.")
@changed(vera_delta_weight, ("(B * lambda_d) @ A", "(B * lambda_d) @ (lambda_d[:, None] * A)"))
def d_twice() -> None: ...


@wrong("vera_delta_weight", "You add the vectors. A diagonal matrix multiplies.")
@changed(vera_delta_weight, ("lambda_b[:, None] * (B * lambda_d)", "(lambda_b[:, None] + (B + lambda_d))"))
def added() -> None: ...
