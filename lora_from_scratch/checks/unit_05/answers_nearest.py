"""Unit 05, prompts, reading one: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.checks.bank import right, wrong

# --- nearest_tokens ----------------------------------------------------------------------------------


@right("nearest_tokens")
def in_numpy_by_einsum(prompt: Tensor, table: Tensor) -> np.ndarray:
    rows, tokens = prompt.double().numpy(), table.double().numpy()
    products = np.einsum("pd,vd->pv", rows, tokens)
    lengths = np.sqrt((rows**2).sum(1))[:, None] * np.sqrt((tokens**2).sum(1))[None]
    return (products / lengths).argmax(axis=1)


@right("nearest_tokens")
def row_after_row(prompt: Tensor, table: Tensor) -> Tensor:
    return torch.stack([F.cosine_similarity(row[None], table, dim=1).argmax() for row in prompt])


@right("nearest_tokens")
def by_the_distance_on_the_sphere(prompt: Tensor, table: Tensor) -> Tensor:
    rows = prompt.double() / prompt.double().norm(dim=1, keepdim=True)
    tokens = table.double() / table.double().norm(dim=1, keepdim=True)
    return (rows[:, None] - tokens[None]).square().sum(-1).argmin(1)


@right("nearest_tokens")
def with_a_loop_over_the_tokens(prompt: Tensor, table: Tensor) -> Tensor:
    nearest = []
    for row in prompt.double():
        best, found = -2.0, 0
        for token, embedding in enumerate(table.double()):
            cosine = float(row @ embedding / (row.norm() * embedding.norm()))
            if cosine > best:
                best, found = cosine, token
        nearest.append(found)
    return torch.tensor(nearest)


@right("nearest_tokens")
def only_the_table_normalised_and_sorted(prompt: Tensor, table: Tensor) -> Tensor:
    products = torch.einsum("pd,vd->vp", prompt, table / torch.linalg.vector_norm(table, dim=1, keepdim=True))
    return products.sort(dim=0, descending=True).indices[0]


@wrong(
    "nearest_tokens",
    "Your search starts with 0 as the best cosine so far. Where all cosines are negative nothing is larger than 0, and "
    "the largest of them is not found.",
)
def the_best_starts_at_zero(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).clamp(min=0).argmax(dim=-1)


@wrong(
    "nearest_tokens",
    "You take the largest product. A long embedding has large products with everything, whatever its "
    "direction: normalise the embeddings.",
)
def by_the_product(prompt: Tensor, table: Tensor) -> Tensor:
    return (prompt @ table.T).argmax(dim=-1)


@wrong(
    "nearest_tokens",
    "You take the smallest distance. Then a row that is longer than the embeddings is close to the longest ones, "
    "whatever their direction.",
)
def by_the_distance(prompt: Tensor, table: Tensor) -> Tensor:
    return torch.cdist(prompt, table).argmin(dim=-1)


@wrong("nearest_tokens", "You find the most distant token, the one with the smallest cosine.")
def the_furthest(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).argmin(dim=-1)


@wrong(
    "nearest_tokens",
    "You find the nearest row of the prompt for each token. The question is the other way round.",
)
def along_the_other_axis(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).argmax(dim=0)


@wrong(
    "nearest_tokens",
    "You normalise the columns, that is, one feature over all tokens. Normalise each token's vector instead.",
)
def columns_of_length_one(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=0) @ F.normalize(table, dim=0).T).argmax(dim=-1)


@wrong(
    "nearest_tokens",
    "You ignore the sign of the cosine: a token that points in the opposite direction is not close.",
)
def without_the_sign(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).abs().argmax(dim=-1)


@wrong("nearest_tokens", "You return the largest cosines. Which tokens are they?")
def the_cosines_themselves(prompt: Tensor, table: Tensor) -> Tensor:
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).amax(dim=-1)


@wrong("nearest_tokens", "You return the embeddings of the nearest tokens. Return their ids.")
def the_embeddings_themselves(prompt: Tensor, table: Tensor) -> Tensor:
    return table[(F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).argmax(dim=-1)]
