"""Unit 19, merging into four bits: the cases of its exercises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_from_scratch.checks.exercise import Case, Draw
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_19.splits import FAULTY, SOUND

# --- quantize_groups ---------------------------------------------------------------------------------


def away_from_midpoints(draw: Draw, rows: int, columns: int, bits: int, group_size: int) -> Tensor:
    """A weight in which every group has both ends, and no weight is near the middle between two codes."""
    most = 2**bits - 1
    groups: list[Tensor] = []
    for start in range(0, columns, group_size):
        width = min(group_size, columns - start)
        codes = draw.integers(0, most, rows, width) + 0.4 * (2 * torch.rand(rows, width, generator=draw.generator) - 1)
        codes = codes.clamp(0, most)
        codes[:, 0], codes[:, -1] = most, 0
        codes = torch.stack([row[draw.permutation(width)] for row in codes])
        scale, zero = 0.05 + torch.rand(rows, 1, generator=draw.generator), 3 * draw.normal(rows, 1)
        groups.append(scale * codes + zero)
    return torch.cat(groups, dim=1)


def without_midpoints(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Replace what rounding has brought near the midpoint of two codes by the smallest weight of its group."""
    groups = weight.double().unflatten(1, (-1, group_size))
    low, high = groups.aminmax(dim=2, keepdim=True)
    codes = (groups - low) / (high - low) * (2**bits - 1)
    return torch.where((codes.frac() - 0.5).abs() < 0.05, low, groups).flatten(1).to(weight.dtype)


def quantize_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, weight: Tensor, bits: int, group_size: int, *sentences: str) -> Case:
        return Case(name, {"weight": weight, "bits": bits, "group_size": group_size}, sentences=sentences)

    close, group, short = "Min-max quantisation", "A group is `group_size` neighbours", "the last one of a row"
    ends, nearest, equal = "The zero of a group", "Each weight gets the code", "If the weights of a group"
    weight, half, single = "weight: (out, in)", "float32, float16 or", "The computation runs in"
    codes, scales, b, g = "The codes (out, in)", "The scales and the zeros", "bits: b", "group_size: g"
    four = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-2.0, 4.0, 1.9, 0.1]])
    yield case("two rows, one group each, 2 bits", four, 2, 4, close, ends, nearest, codes, scales)
    negative = torch.tensor([[-1.0, -4.0, -3.1, -1.9]])
    yield case("a group of negative weights, 2 bits", negative, 2, 4, ends, nearest, close)
    two = away_from_midpoints(draw, 3, 16, 3, 8)
    yield case("a 3 x 16 weight in groups of 8, 3 bits", two, 3, 8, group, scales, ends, weight, g)
    square = away_from_midpoints(draw, 4, 4, 2, 2)
    yield case("a 4 x 4 weight in groups of 2, 2 bits", square, 2, 2, group, weight, codes, g)
    yield case("a 2 x 12 weight in groups of 6, 4 bits", away_from_midpoints(draw, 2, 12, 4, 6), 4, 6, b, nearest)
    yield case("8 bits", away_from_midpoints(draw, 2, 8, 8, 8), 8, 8, b, codes)
    yield case("10 inputs in groups of 4", away_from_midpoints(draw, 3, 10, 2, 4), 2, 4, short, scales)
    yield case("groups larger than a row", away_from_midpoints(draw, 3, 5, 3, 32), 3, 32, short, scales)
    same = away_from_midpoints(draw, 2, 8, 2, 4)
    same[:, :4] = 0.7
    yield case("a group of equal weights", same, 2, 4, equal, close)
    yield case("groups of one weight", draw.normal(2, 3), 4, 1, equal, g)
    low = away_from_midpoints(draw, 3, 8, 3, 4)
    yield case("in bfloat16", without_midpoints(low.bfloat16(), 3, 4), 3, 4, half, single)
    low = away_from_midpoints(draw, 3, 8, 2, 4)
    yield case("in float16", without_midpoints(low.half(), 2, 4), 2, 4, half, single)


# --- sum_groups, merge_into_zeros --------------------------------------------------------------------


def sum_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, x: Tensor, group_size: int, *sentences: str) -> Case:
        return Case(name, {"x": x, "group_size": group_size}, sentences=sentences)

    sums, group, short = "P x, the sum of each group", "A group is `group_size` neighbours", "the last group may be"
    plain, axes, g = "No group is averaged", "x: (..., in)", "group_size: g"
    shape, flow = "(..., G), with G", "Gradients flow to x"
    six = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    yield case("(1, 2, 3, 4, 5, 6) in groups of 2", six, 2, sums, group, plain, shape)
    yield case("5 inputs of 12 numbers, groups of 4", draw.normal(5, 12), 4, sums, plain, shape, flow, g)
    yield case("3 inputs of 9 numbers, groups of 3: as many as in a group", draw.normal(3, 9), 3, group, plain, g)
    yield case("two texts of 3 tokens, 8 numbers each, groups of 2", draw.normal(2, 3, 8), 2, axes, group, flow)
    yield case("a single vector", draw.normal(8), 4, axes, sums, flow)
    yield case("groups of one", draw.normal(3, 4), 1, g, shape)
    yield case("10 numbers in groups of 4", draw.normal(3, 10), 4, short, plain, shape)
    yield case("5 numbers in groups of 32", draw.normal(2, 5), 32, short, shape)
    yield case("in float64", draw.normal(2, 8, dtype=torch.float64), 4, shape, plain)


def merge_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, out: int, groups: int, rank: int, scaling: float, *sentences: str, **more: Tensor) -> Case:
        given: dict[str, Data] = {"zero": draw.normal(out, groups), "A": draw.normal(rank, groups)}
        given |= {"B": draw.normal(out, rank), "scaling": scaling, **more}
        return Case(name, given, sentences=sentences)

    zeros, law, zero = "The zeros of the merged weight", "With these zeros in place", "zero: (out, G)"
    A, single, B, s, result = (
        "A: (r, G)",
        "All is computed in float32",
        "B: (out, r)",
        "scaling: s",
        "(out, G), float32:",
    )
    hand = {
        "zero": torch.tensor([[0.5, -1.0], [0.0, 2.0]]),
        "A": torch.tensor([[1.0, 2.0]]),
        "B": torch.tensor([[3.0], [-1.0]]),
    }
    yield case("two outputs, two groups, rank 1, s = 2", 2, 2, 1, 2.0, zeros, law, s, result, **hand)
    yield case("three outputs, four groups, rank 2, s = 0.5", 3, 4, 2, 0.5, law, s, zero, A, B, result)
    yield case("three outputs, three groups, rank 3, s = 8", 3, 3, 3, 8.0, law, s, A, B)
    yield case("B is zero, as at the start", 3, 4, 2, 8.0, law, B, zero, B=torch.zeros(3, 2))
    yield case("the zeros are zero", 3, 4, 2, 1.0, law, zero, zero=torch.zeros(3, 4))
    fine = (draw.normal(2, 4) + 0.01).bfloat16(), (draw.normal(3, 2) + 0.01).bfloat16()
    yield case("A and B in bfloat16", 3, 4, 2, 1.3, single, A, B, result, A=fine[0], B=fine[1])
    yield case("A in float16, B in float32", 3, 4, 2, 0.7, A, single, A=draw.normal(2, 4).half())


# --- split, test_split -------------------------------------------------------------------------------


def with_errors(draw: Draw, out: int, inputs: int, sizes: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A weight with a few strong directions, and the error of each iteration, of these norms."""
    U, V = (torch.linalg.qr(draw.normal(n, 4, dtype=torch.float64))[0] for n in (out, inputs))
    W = (U * torch.tensor([20.0, 14.0, 9.0, 5.0], dtype=torch.float64)) @ V.T
    errors = draw.normal(len(sizes), out, inputs)
    return W.float(), errors / errors.flatten(1).norm(dim=1)[:, None, None] * torch.tensor(sizes)[:, None, None]


def split_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, sizes: Sequence[float], iterations: int | None, *sentences: str, **more: Data) -> Case:
        W, errors = with_errors(draw, 7, 9, sizes)
        given: dict[str, Data] = {"W": W, "rank": 2, "errors": errors, "iterations": iterations}
        return Case(name, given | more, sentences=sentences)

    close, order, size = "Find Q, A (r, in)", "Starting from Q = 0", "Its error is the `squared_error`"
    ends, best, weight, single = (
        "After the first iteration",
        "The best iteration",
        "W: (out, in)",
        "The computation runs",
    )
    rank, quantize, once, most = "rank: r", "quantize: maps", "It is called once", "iterations: the largest"
    weighting, all_of, given = "weighting: passed on", "Q, A and B, all of", "Q is what `quantize` returned"
    yield case("one iteration", [1.0], 1, order, close, once, most, quantize, given)
    yield case(
        "two iterations, the second is better", [1.0, 0.5], 2, order, best, all_of, once, close, "None: no weighting"
    )
    yield case("three iterations, each better", [1.0, 0.8, 0.5], 3, order, size, most, all_of, quantize)
    yield case("the third iteration is worse", [1.0, 0.5, 0.8], 3, best, all_of, given)
    yield case("the second is worse, the third would be best", [0.8, 1.0, 0.2, 0.1], 4, ends, best, once)
    yield case("the fourth is worse than the third", [1.0, 0.7, 0.5, 0.9, 0.4], 6, ends, best, all_of)
    yield case("the fifth and sixth would be better", [1.0, 0.9, 0.8, 0.7, 0.6, 0.5], 4, most, once)
    yield case("no number of iterations given: five", [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], None, most)
    yield case("rank 1", [1.0, 0.5], 2, rank, close, rank=1)
    yield case("rank 3", [1.0, 0.5, 0.7], 3, rank, order, rank=3)
    W, errors = with_errors(draw, 7, 9, [0.5, 0.3])
    yield case("W in bfloat16", [], 2, single, weight, W=W.bfloat16(), errors=errors)
    yield case("W is a parameter", [0.5, 0.3], 2, "perhaps a parameter", weight, parameter=True)
    W, errors = with_errors(draw, 7, 9, [0.5, 0.5, 0.5])
    errors[0, 3:], errors[1, :3] = 0, 0  # the first is in rows that count, the second in others, and larger
    row, column = torch.tensor([2.0] * 3 + [0.5] * 4), 0.7 + 0.6 * torch.rand(9, generator=draw.generator)
    errors = errors / errors.flatten(1).norm(dim=1)[:, None, None] * torch.tensor([0.5, 0.9, 3.0])[:, None, None]
    more: dict[str, Data] = {"W": W, "errors": errors, "row": row, "column": column}
    yield case("weighted errors: they fall, unweighted they rise", [], 3, weighting, size, **more)
    more |= {"errors": errors.flip(0)[1:], "row": row, "column": column}
    yield case("weighted errors: they rise, unweighted they fall", [], 2, weighting, size, best, **more)
    one: dict[str, Data] = {"row": 0.5 + torch.rand(7, generator=draw.generator), "column": column}
    yield case("weighted, one iteration", [0.4], 1, weighting, close, **one)


def test_cases(draw: Draw) -> Iterator[Case]:
    earlier, mixed, one = "an iteration that is worse than", "Q is of another iteration", "does only one iteration"
    sentences = {
        "it stops when the error rises, and returns the last iteration": earlier,
        "it does all iterations, and returns the last": earlier,
        "it does all iterations, and returns the first": earlier,
        "it returns the iteration with the largest error": earlier,
        "Q is of the first iteration, A and B of the best": mixed,
        "Q is of the best iteration, A and B are from another one": mixed,
        "it always does one iteration": one,
        "it does one iteration more than it may": "does more iterations than it may",
        "the rank of B A is one larger than it may be": "has a larger rank",
        "B A is subtracted from the given W": "changes W",
    }
    for name in SOUND:
        quotes = ("A sound function passes", "It may stop when")
        yield Case(f"a sound function: {name}", {"function": name}, sentences=quotes)
    for name in FAULTY:
        yield Case(f"a faulty function: {name}", {"function": name}, sentences=(sentences[name], "A test of a"))


# --- allocate_greedily -------------------------------------------------------------------------------


def greedy_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, errors: list | Tensor, sizes: list | Tensor, budget: float, *sentences: str) -> Case:
        tables = {"errors": torch.as_tensor(errors).double(), "sizes": torch.as_tensor(sizes).double()}
        return Case(name, {**tables, "budget": float(budget)}, sentences=sentences)

    choose, start, change = "Choose a configuration", "Start with the smallest", "A change replaces"
    skip, value, go = "it may skip choices", "Its value is the decrease", "Of all changes"
    tables, more, budget = "errors, sizes: (matrices", "More size need not", "budget: the largest"
    used, result, refused = "It may be used up", "The index of the choice", "ValueError: even"
    sizes = [[2, 3, 4], [2, 3, 4]]
    falling = [[9.0, 5.0, 3.5], [4.0, 2.0, 1.5]]
    yield case("two matrices, nothing but the smallest fits", falling, sizes, 4.5, start, result, budget)
    yield case("the same, one change fits", falling, sizes, 5, value, go, used, choose)
    yield case("the same, two changes fit", falling, sizes, 6.5, value, go, change)
    yield case("the same, everything fits", falling, sizes, 100, go, result, tables)
    wide = [[8.0, 6.5, 1.0], [5.0, 4.0, 3.9]]
    yield case("the large step has the larger value", wide, sizes, 6, skip, value, go)
    yield case("the large step does not fit", wide, sizes, 5, go, used, budget)
    costly = [[10.0, 2.0], [6.0, 3.0]], [[1, 9], [1, 2]]
    yield case("the largest decrease is not the largest value", *costly, 10, value, change)
    yield case("with a matrix of another size", [[10.0, 2.0], [6.0, 5.0]], [[4, 8], [1, 2]], 9, value, tables)
    first = [[9.0, 1.0], [5.0, 2.0]], [[1, 5], [1, 3]]
    yield case("the change with the largest value does not fit", *first, 4, go, budget)
    rising = [[5.0, 6.0, 3.0], [4.0, 4.5, 4.2]], [[2, 3, 4], [2, 3, 4]]
    yield case("more size, more error", *rising, 100, more, change, result)
    mixed = [[1.0, 9.0, 4.0], [2.0, 3.0, 8.0]], [[8, 2, 4], [8, 4, 2]]
    yield case("the choices are in no order", *mixed, 12, start, result, tables, choose)
    yield case(
        "a larger choice first, then a smaller one is no change", [[9.0, 2.0, 1.9]], [[1, 2, 8]], 8, change, used
    )
    errors = draw.normal(6, 5).abs().double().cumsum(dim=1).flip(1) + 0.05 * torch.arange(5, 0, -1)
    errors *= 1 + 3 * torch.rand(6, 1, generator=draw.generator)
    table = draw.integers(1, 4, 6, 5).cumsum(dim=1)
    for share in (0.3, 0.6):
        least, most = int(table[:, 0].sum()), int(table[:, -1].sum())
        limit = least + round(share * (most - least))
        yield case(f"six matrices, five choices, {share:.0%} of the way", errors, table, limit, value, go, choose)
    yield case("one matrix, one choice", [[2.0]], [[3]], 3, used, start)
    yield case("the smallest choices do not fit", falling, sizes, 3.9, refused, budget)
