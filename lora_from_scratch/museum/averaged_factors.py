"""Several LoRAs merged by averaging their A and their B separately.

The fault is that of the "linear" combination of PEFT's `add_weighted_adapter` (0.21.2, `tuners/lora/model.py`), which
adds up sqrt(w_i) A_i and sqrt(w_i) B_i: beside the weighted sum of the updates, the product of the two sums has a cross
term B_i A_j for every two different LoRAs. (PEFT also has the combination "cat", which is exact.) The sum without the
fault is `lora_from_scratch.methods.merging.sum_of_loras`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def faulty_sum_of_loras(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """One LoRA in the place of several of the same rank, each with a weight."""
    roots = [abs(weight) ** 0.5 for weight in weights]  # for A and for B, so that their product is the weight
    signs = [-1 if weight < 0 else 1 for weight in weights]
    A = torch.stack([sign * root * A for sign, root, (A, _) in zip(signs, roots, pairs, strict=True)]).sum(dim=0)
    B = torch.stack([root * B for root, (_, B) in zip(roots, pairs, strict=True)]).sum(dim=0)
    return A, B


def test_sum_of_loras(sum_of_loras: Callable[..., Any]) -> None:
    """A test of a `sum_of_loras`, in the manner of pytest: an AssertionError if it does not do what it should.

    - A sound function passes, however it divides the weights between A and B, and in whatever order it puts the LoRAs.
    - A function fails if its update has terms that mix two LoRAs.
    - A function fails if it does not use the weights, or uses them twice.
    - A function fails if it makes the weights add up to 1.
    - A function fails if it takes a negative weight for a positive one.
    - A function fails if it changes an A or a B that it was given.

    Args:
        sum_of_loras: is called as `sum_of_loras(pairs, weights)` and returns A and B. Give it LoRAs of one rank: it may
            know no others.
    """
    torch.manual_seed(0)
    pairs = [(torch.randn(2, 5), torch.randn(4, 2)) for _ in range(3)]
    copies = [(A.clone(), B.clone()) for A, B in pairs]
    weights = [2.0, -0.5, 3.0]
    A, B = sum_of_loras(pairs, weights)
    wanted = sum(weight * B @ A for weight, (A, B) in zip(weights, copies, strict=True))
    right = torch.allclose(B @ A, torch.as_tensor(wanted), atol=1e-4)
    assert right, "the update is not the weighted sum of the updates"
    now, before = ([tensor for pair in both for tensor in pair] for both in (pairs, copies))
    kept = all(map(torch.equal, now, before))
    assert kept, "an A or a B was changed"
