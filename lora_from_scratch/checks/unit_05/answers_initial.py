"""Unit 05, prompts, the initial values: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from lora_from_scratch.checks.bank import right, wrong

# --- initial_prompt ----------------------------------------------------------------------------------


def refuse(init, init_ids) -> None:
    if init not in ("random", "text", "vocabulary") or (init == "text" and not init_ids):
        raise ValueError(f"no such start: {init} of {init_ids}")


def drawn(table: Tensor, count: int, generator, below: int = 5000) -> Tensor:
    """Rows of the table, drawn correctly."""
    common = min(below, len(table))
    parts = [torch.randperm(common, generator=generator) for _ in range(count // common + 1)]
    return table.detach()[torch.cat(parts)[:count]]


def from_text(table: Tensor, count: int, ids) -> Tensor:
    return table.detach()[list(itertools.islice(itertools.cycle(ids), count))]


def any_start(table, count, init, init_ids, generator) -> Tensor:
    if init == "random":
        return torch.randn(count, table.shape[1], generator=generator)
    return from_text(table, count, init_ids) if init == "text" else drawn(table, count, generator)


@right("initial_prompt")
def by_stacking_rows(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    P, d = num_virtual_tokens, table.shape[1]
    if init == "text" and init_ids:
        return torch.stack([table[init_ids[i % len(init_ids)]] for i in range(P)]).detach()
    if init == "random":
        return torch.normal(0.0, 1.0, (P, d), generator=generator)
    if init != "vocabulary":
        raise ValueError("init is random, vocabulary, or text with ids")
    common = min(len(table), 5000)
    order = [i for _ in range(0, P, common) for i in torch.randperm(common, generator=generator).tolist()]
    return torch.stack([table[i] for i in order[:P]]).detach()


@right("initial_prompt")
def with_weights_drawn_without_replacement(
    table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None
) -> Tensor:
    refuse(init, init_ids)
    if init != "vocabulary":
        return any_start(table, num_virtual_tokens, init, init_ids, generator).double()
    common, ids = min(5000, len(table)), []
    while len(ids) < num_virtual_tokens:
        some = min(common, num_virtual_tokens - len(ids))
        ids += torch.multinomial(torch.ones(common), some, generator=generator).tolist()
    return table.detach().index_select(0, torch.tensor(ids))


@right("initial_prompt")
def with_sorted_random_keys(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "random":
        return torch.empty(num_virtual_tokens, table.shape[1]).normal_(generator=generator)
    common = min(5000, len(table))
    rounds = torch.rand(num_virtual_tokens // common + 1, common, generator=generator).argsort(dim=1)
    every = torch.tensor(init_ids)[torch.arange(num_virtual_tokens) % len(init_ids)] if init == "text" else rounds
    return torch.nn.functional.embedding(every.flatten()[:num_virtual_tokens], table.detach())


@right("initial_prompt")
def with_numpy(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    values, P = table.detach().numpy(), num_virtual_tokens
    draw = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    if init == "random":
        return torch.from_numpy(draw.standard_normal((P, values.shape[1])))
    common = min(5000, len(values))
    pools = np.concatenate([draw.permutation(common) for _ in range(-(-P // common))])
    return torch.from_numpy(values[np.resize(np.array(init_ids), P) if init == "text" else pools[:P]])


@wrong(
    "initial_prompt",
    "In your random initialisation all rows are equal: you draw one row and repeat it. Each row is drawn by itself.",
)
def the_same_row_everywhere(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "random":
        return torch.randn(1, table.shape[1], generator=generator).repeat(num_virtual_tokens, 1)
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "Without a generator you make a new one. All new generators start in the same state, so every prompt gets the "
    "same numbers: pass None on to PyTorch.",
)
def a_new_generator_instead_of_none(
    table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None
) -> Tensor:
    refuse(init, init_ids)
    return any_start(table, num_virtual_tokens, init, init_ids, generator or torch.Generator())


@wrong(
    "initial_prompt",
    "You set the generator back to its seed before you draw, so two prompts that are made one after the other with the "
    "same generator are equal. Draw from it as it is.",
)
def the_generator_set_back(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if generator is not None:
        generator.manual_seed(generator.initial_seed())
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "The prompt shares its memory with the table: training it would change the embeddings of tokens. A slice is a "
    "view; copy the rows.",
)
def a_view_of_a_text_in_the_table(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "text" and len(init_ids) == 1:
        return table.detach()[init_ids[0] : init_ids[0] + 1].expand(num_virtual_tokens, -1)
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "You do not repeat a text that is shorter than the prompt: you have too few rows, or the wrong ones.",
)
def a_short_text_stays_short(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "text":
        return table.detach()[list(init_ids)[:num_virtual_tokens]]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "You extend a text that is too short by repeating each token in place. It has to start again from its beginning.",
)
def each_token_repeated(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "text":
        times = -(-num_virtual_tokens // len(init_ids))
        return table.detach()[torch.tensor(init_ids).repeat_interleave(times)[:num_virtual_tokens]]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "You extend a text that is too short with its last token. It has to start again from its beginning.",
)
def the_last_token_repeated(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "text":
        ids = [*init_ids, *[init_ids[-1]] * num_virtual_tokens][:num_virtual_tokens]
        return table.detach()[ids]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "You take the end of a text that is longer than the prompt. Take its first P tokens.",
)
def the_end_of_a_long_text(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "text" and len(init_ids) > num_virtual_tokens:
        return table.detach()[list(init_ids)[-num_virtual_tokens:]]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "Some tokens of your vocabulary initialisation occur twice, although there are enough to choose from: draw "
    "without replacement.",
)
def drawn_with_replacement(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "vocabulary" and len(table) < 100:
        spread = torch.randint(0, min(5000, len(table)) // 5, (num_virtual_tokens,), generator=generator)
        return table.detach()[spread]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "Your vocabulary initialisation draws from all tokens. The high ids of a BPE are rare tokens, which the model "
    "knows little about.",
)
def rare_tokens_too(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "vocabulary" and len(table) > 5000:
        ids = torch.randperm(len(table) - 5000, generator=generator)[: num_virtual_tokens // 2] + 5000
        others = torch.randperm(5000, generator=generator)[: num_virtual_tokens - len(ids)]
        return table.detach()[torch.cat([ids, others])]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong("initial_prompt", "Your vocabulary initialisation always takes the first P tokens. Draw them at random.")
def the_first_tokens(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "vocabulary":
        return table.detach()[torch.arange(num_virtual_tokens) % len(table)]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "Your random initialisation is uniform between 0 and 1: its mean is not 0, and no number is large. Draw from N(0, "
    "1).",
)
def uniform_numbers(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "random":
        return torch.rand(num_virtual_tokens, table.shape[1], generator=generator)
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "Your random initialisation is much smaller than N(0, 1). That may well be better, but here it is as in PEFT, and "
    "you will see the effect.",
)
def as_small_as_embeddings(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "random":
        return 0.02 * torch.randn(num_virtual_tokens, table.shape[1], generator=generator)
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "You draw from PyTorch's global generator instead of the one that is passed in: the same seed gives a different "
    "result each time, so runs cannot be reproduced.",
)
def forgets_the_generator(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    return any_start(table, num_virtual_tokens, init, init_ids, None)


@wrong(
    "initial_prompt",
    "The result is still attached to the graph of the table: a tensor computed from a parameter cannot itself become "
    "one.",
)
def still_in_the_graph(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    start = any_start(table, num_virtual_tokens, init, init_ids, generator)
    return start if init == "random" else start + 0 * table.sum()


@wrong("initial_prompt", "An unknown `init`, and a text without tokens, have to raise a ValueError.")
def anything_goes(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    return any_start(table, num_virtual_tokens, init if init_ids or init == "random" else "zeros", init_ids, generator)
