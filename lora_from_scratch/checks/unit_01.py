"""Unit 01, rank: what is checked."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.rank import row_echelon

TITLE = "Rank"
COUNTING = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.float64)


def echelon_cases(draw: Draw) -> Iterator[Case]:
    yield Case("the matrix [[1, 2, 3], [4, 5, 6], [7, 8, 9]]", {"matrix": COUNTING}, "elimination")
    yield Case("a random 4 x 4 matrix", {"matrix": draw.normal(4, 4, dtype=torch.float64)}, "elimination")
    zero_first = draw.normal(3, 3, dtype=torch.float64)
    zero_first[0, 0] = 0
    yield Case("a matrix with 0 in the corner", {"matrix": zero_first}, "elimination")
    yield Case("a wide 3 x 6 matrix of rank 2", {"matrix": draw.low_rank(3, 6, 2)}, "what counts as zero")
    yield Case("a tall 6 x 3 matrix of rank 1", {"matrix": draw.low_rank(6, 3, 1)}, "what counts as zero")
    yield Case("zeros", {"matrix": torch.zeros(2, 3)}, "what counts as zero")


EXERCISES = [
    Exercise(
        row_echelon,
        idea="rank",
        difficulty=4,
        minutes=25,
        points=5,
        hints=(
            "Take the steps of the docstring one by one: find the entry, swap rows, swap columns, subtract.",
            "`echelon[k:, k:].abs().argmax()` counts in a block of n - k columns: `divmod` gives row and column.",
            "All rows below are cleared at once: an outer product of their multiples with row k is subtracted.",
        ),
        cases=echelon_cases,
    ),
]
PREDICTIONS: list[Prediction] = []
