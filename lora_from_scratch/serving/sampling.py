"""Sampling the next token of each request, with its own settings and its own random number generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_from_scratch.gpt2.generation import sample_next_token


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of a request.

    Attributes:
        temperature, top_k, top_p: see `sample_next_token`; temperature 0 is greedy decoding.
        seed: the seed of the request's random numbers, which do not depend on the rest of the batch.

    Raises:
        ValueError: a setting is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number of at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")

    def for_prompt(self, number: int) -> Sampling:
        """The settings for one of several prompts in the same request; each prompt has its own random numbers."""
        return replace(self, seed=(self.seed + number) % 2**63)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def choose_tokens(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> list[int | None]:
    """The next token of each row, or None if its largest logit is not finite, because its adapter is damaged.

    Args:
        logits: (rows, V).
        samplings, generators: one for each row.
    """
    largest = logits.max(dim=-1)  # NaN if the row contains a NaN
    tokens: list[int | None] = list(largest.indices.tolist())
    for row, (value, sampling) in enumerate(zip(largest.values.tolist(), samplings, strict=True)):
        if not math.isfinite(value):
            tokens[row] = None
        elif sampling.temperature > 0:
            settings = sampling.temperature, sampling.top_k, sampling.top_p
            tokens[row] = sample_next_token(logits[row], *settings, generators[row])
    return tokens
