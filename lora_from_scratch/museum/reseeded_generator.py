"""NOLA's matrices are drawn from a seed that is given to PyTorch's global generator.

The authors' code (UCDvision/NOLA, `gpt/src/model_nola.py`) draws the random matrices of a factor in this way in every
forward and every backward pass. Everything else that is random comes from the same generator: the masks of dropout, the
order of the examples, the sampling of tokens. Mended, it is `lora_from_scratch.methods.nola.random_combination`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def faulty_random_combination(coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    """The sum of k random matrices of a seed, each multiplied by its coefficient."""
    k = len(coefficients)
    afterwards = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    U = (2 * torch.rand(k, *shape) - 1) / math.sqrt(k)
    torch.manual_seed(afterwards)
    return torch.einsum("k,kij->ij", coefficients, U.to(coefficients.dtype))


def test_random_combination(random_combination: Callable[[Tensor, tuple[int, int], int], Tensor]) -> None:
    """Test an implementation of `random_combination(coefficients, shape, seed)`.

    The test ends without an error if the implementation does the following, and fails if it does not:

    - The same arguments give the same result, whatever happens to PyTorch's global generator between the calls.
    - Another seed gives another result.
    - After every call the state of PyTorch's global generator is the same as before it.

    Where the random matrices come from and how they are distributed is up to the implementation.

    Args:
        random_combination: what is tested, a function.

    Raises:
        AssertionError: the implementation has a fault.
    """
    coefficients, shape = torch.ones(3), (2, 4)
    results = []
    for global_seed, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(global_seed)
        torch.rand(1)  # so that its state is not the one right after seeding
        before = torch.get_rng_state()
        results.append(random_combination(coefficients, shape, seed))
        assert torch.equal(torch.get_rng_state(), before), "the global generator has another state after the call"
    first, again, other = results
    assert torch.equal(again, first), "the same seed gives another result"
    assert not torch.equal(other, first), "another seed gives the same result"
