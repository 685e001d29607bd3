"""For exercises whose result has to be a new tensor: changing it later must not change what was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.checks.explaining import Explanation
from lora_from_scratch.checks.observation import Data

NOT_NEW = "not-new"


def new_tensor(answer: Callable[..., Any], given: Tensor, *others: Any) -> Any:
    """What the answer returns; `NOT_NEW` if that is `given` itself or a view of it, with the numbers it had before."""
    before = given.clone()
    result = answer(given, *others)
    if not isinstance(result, Tensor) or not result.numel() or result.device != given.device:
        return result
    shares = result.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return NOT_NEW if shares and torch.equal(before, given) else result


def not_new(seen: Data) -> Explanation:
    """What to say of a result that shares its memory with what was given."""
    if seen != NOT_NEW:
        return None
    return "not a new tensor", "Your result shares its memory with the tensor that is given. It should be a new tensor."
