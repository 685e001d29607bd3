"""The numbers of a small wrong row, next to the right ones."""

from __future__ import annotations

import torch

from lora_from_scratch.checks.shown_rows import first_wrong


def test_the_first_wrong_row_is_shown_with_what_it_should_be() -> None:
    right = torch.tensor([[1.0, 2.0], [0.5, -3.0], [0.0, 1.0]])
    wrong = right.clone()
    wrong[1:] *= 2
    assert first_wrong(wrong, right, "text") == " For text 1 it should be (0.5, -3), but yours is (1, -6)."


def test_long_rows_and_right_ones_are_not_shown() -> None:
    assert first_wrong(torch.zeros(2, 9), torch.ones(2, 9), "row") == ""
    assert first_wrong(torch.ones(2, 3), torch.ones(2, 3), "row") == ""
