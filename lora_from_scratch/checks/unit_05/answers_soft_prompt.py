"""Unit 05, prompts: mistakes with the start of a soft prompt and with the soft prompt itself, and other right ways."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.methods.prompt_tuning import SoftPrompt, VirtualTokens

# --- initial_prompt ----------------------------------------------------------------------------------


def refuse(init, init_ids) -> None:
    if init not in ("random", "text", "vocabulary") or (init == "text" and not init_ids):
        raise ValueError(f"no such start: {init} of {init_ids}")


def drawn(table: Tensor, count: int, generator, below: int = 5000) -> Tensor:
    """Rows of the table as they should be drawn."""
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
    order = [i for _ in range(P) for i in torch.randperm(min(len(table), 5000), generator=generator).tolist()]
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


@wrong(
    "initial_prompt",
    "A text that is shorter than the prompt is not begun again: you have fewer rows than were asked for, or the wrong "
    "ones.",
)
def a_short_text_stays_short(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "text":
        return table.detach()[list(init_ids)[:num_virtual_tokens]]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "A text that is too short is filled up by repeating each token in its place. It has to be read from its beginning "
    "again.",
)
def each_token_repeated(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "text":
        times = -(-num_virtual_tokens // len(init_ids))
        return table.detach()[torch.tensor(init_ids).repeat_interleave(times)[:num_virtual_tokens]]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "A text that is too short is filled up with its last token. It has to be read from its beginning again.",
)
def the_last_token_repeated(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "text":
        ids = [*init_ids, *[init_ids[-1]] * num_virtual_tokens][:num_virtual_tokens]
        return table.detach()[ids]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "Of a text that is longer than the prompt you take the end. It is cut after the first P tokens.",
)
def the_end_of_a_long_text(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "text" and len(init_ids) > num_virtual_tokens:
        return table.detach()[list(init_ids)[-num_virtual_tokens:]]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "Some tokens of your vocabulary start come twice, though there are enough to choose from: you draw with "
    "replacement.",
)
def drawn_with_replacement(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "vocabulary" and len(table) < 100:
        spread = torch.randint(0, min(5000, len(table)) // 5, (num_virtual_tokens,), generator=generator)
        return table.detach()[spread]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "Your vocabulary start draws from all the tokens. The high ids of a BPE are rare tokens, which the model knows "
    "little about.",
)
def rare_tokens_too(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "vocabulary" and len(table) > 5000:
        ids = torch.randperm(len(table) - 5000, generator=generator)[: num_virtual_tokens // 2] + 5000
        others = torch.randperm(5000, generator=generator)[: num_virtual_tokens - len(ids)]
        return table.detach()[torch.cat([ids, others])]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong("initial_prompt", "Your vocabulary start is always the first P tokens. They are to be drawn at random.")
def the_first_tokens(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "vocabulary":
        return table.detach()[torch.arange(num_virtual_tokens) % len(table)]
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "Your random start is uniform between 0 and 1: its mean is not 0, and no number is large. N(0, 1) is asked for.",
)
def uniform_numbers(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "random":
        return torch.rand(num_virtual_tokens, table.shape[1], generator=generator)
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "Your random start is much smaller than N(0, 1). That may well be wiser, but here it is as in PEFT, and you will "
    "see what comes of it.",
)
def as_small_as_embeddings(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    if init == "random":
        return 0.02 * torch.randn(num_virtual_tokens, table.shape[1], generator=generator)
    return any_start(table, num_virtual_tokens, init, init_ids, generator)


@wrong(
    "initial_prompt",
    "You draw from PyTorch's own generator and not from the one that is given: the same seed gives another start each "
    "time, and nobody can repeat a run.",
)
def forgets_the_generator(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    return any_start(table, num_virtual_tokens, init, init_ids, None)


@wrong(
    "initial_prompt",
    "The result still hangs on the graph of the table: it is a parameter's child, and cannot become a parameter "
    "itself.",
)
def still_in_the_graph(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    refuse(init, init_ids)
    start = any_start(table, num_virtual_tokens, init, init_ids, generator)
    return start if init == "random" else start + 0 * table.sum()


@wrong("initial_prompt", "A start that does not exist, and a text without tokens, have to be refused.")
def anything_goes(table, num_virtual_tokens, init="vocabulary", init_ids=(), generator=None) -> Tensor:
    return any_start(table, num_virtual_tokens, init if init_ids or init == "random" else "zeros", init_ids, generator)


# --- SoftPrompt --------------------------------------------------------------------------------------


@right("SoftPrompt")
class with_repeat_and_hstack(VirtualTokens):
    def __init__(self, embeddings):
        super().__init__(embeddings.shape[0])
        self.register_parameter("embeddings", nn.Parameter(embeddings.clone()))

    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        rows = inputs_embeds.shape[0]
        if position_ids is not None:
            position_ids = torch.hstack([torch.arange(self.length).repeat(rows, 1), position_ids])
        return torch.hstack([self.embeddings.repeat(rows, 1, 1), inputs_embeds]), attention_mask, position_ids, cache


@right("SoftPrompt")
class as_a_table_of_its_own(VirtualTokens):
    """The rows are looked up like tokens; the parameter is the table's."""

    def __init__(self, embeddings):
        super().__init__(len(embeddings))
        self.embeddings = nn.Parameter(embeddings)

    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        own = torch.tensor([range(self.length)] * len(inputs_embeds))
        rows = nn.functional.embedding(own, self.embeddings)
        places = None if position_ids is None else torch.cat((own, position_ids), 1)
        return torch.cat((rows, inputs_embeds), 1), attention_mask, places, cache


def in_front(soft, inputs_embeds) -> Tensor:
    return torch.cat([soft.embeddings.expand(len(inputs_embeds), -1, -1), inputs_embeds], dim=1)


def places(soft, position_ids, first: int = 0):
    if position_ids is None:
        return None
    own = torch.arange(first, first + soft.length).expand(len(position_ids), -1)
    return torch.cat([own, position_ids], dim=1)


@wrong(
    "SoftPrompt",
    "`embeddings` is a plain tensor: no optimiser would ever find it, and it would not be saved. What makes a tensor "
    "one that a module learns?",
)
class a_plain_tensor(VirtualTokens):
    def __init__(self, embeddings):
        super().__init__(len(embeddings))
        self.embeddings = embeddings

    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return in_front(self, inputs_embeds), attention_mask, places(self, position_ids), cache


@wrong(
    "SoftPrompt",
    "`embeddings` is a parameter, but it is frozen: no gradient reaches it, and nothing is learned.",
)
class a_frozen_parameter(VirtualTokens):
    def __init__(self, embeddings):
        super().__init__(len(embeddings))
        self.embeddings = nn.Parameter(embeddings, requires_grad=False)

    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return in_front(self, inputs_embeds), attention_mask, places(self, position_ids), cache


@wrong(
    "SoftPrompt",
    "The prompt's gradient is cut off in `enter`: it would stay at its first values for ever.",
)
class cut_off(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        whole = torch.cat([self.embeddings.detach().expand(len(inputs_embeds), -1, -1), inputs_embeds], dim=1)
        return whole, attention_mask, places(self, position_ids), cache


@wrong(
    "SoftPrompt",
    "You put the prompt behind the text. The model then leaves out the first P positions of the result, which are the "
    "text's own.",
)
class behind_the_text(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        whole = torch.cat([inputs_embeds, self.embeddings.expand(len(inputs_embeds), -1, -1)], dim=1)
        return whole, attention_mask, places(self, position_ids), cache


@wrong(
    "SoftPrompt",
    "The prompt has no positions: `position_ids` has to be as long as the embeddings are now.",
)
class no_positions_of_its_own(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return in_front(self, inputs_embeds), attention_mask, position_ids, cache


@wrong(
    "SoftPrompt",
    "Every row of your prompt has position 0. The rows stand one behind the other, like tokens.",
)
class all_at_position_zero(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        whole = in_front(self, inputs_embeds)
        if position_ids is not None:
            position_ids = torch.cat([torch.zeros(len(whole), self.length, dtype=torch.long), position_ids], dim=1)
        return whole, attention_mask, position_ids, cache


@wrong(
    "SoftPrompt",
    "Your prompt's positions begin at 1. Positions are counted from 0, and the text's begin at P.",
)
class positions_from_one(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return in_front(self, inputs_embeds), attention_mask, places(self, position_ids, 1), cache


@wrong(
    "SoftPrompt",
    "You move the text's positions up by P. They come moved already: now they are moved twice.",
)
class moved_twice(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        moved = None if position_ids is None else places(self, position_ids + self.length)
        return in_front(self, inputs_embeds), attention_mask, moved, cache


@wrong(
    "SoftPrompt",
    "You make positions where none were given. Without them the model counts for itself, and it knows of the padding, "
    "which you do not.",
)
class always_positions(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        whole = in_front(self, inputs_embeds)
        if position_ids is None:
            counted = torch.arange(whole.shape[1]).expand(len(whole), -1)
            return whole, attention_mask, counted, cache
        return whole, attention_mask, places(self, position_ids), cache


@wrong(
    "SoftPrompt",
    "You widen the attention mask. It has the P columns already.",
)
class widens_the_mask_again(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (self.length, 0), value=1)
        return in_front(self, inputs_embeds), attention_mask, places(self, position_ids), cache


@wrong(
    "SoftPrompt",
    "You drop the cache: the second piece of a text then does not know of the first. It goes through as it came.",
)
class drops_the_cache(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return in_front(self, inputs_embeds), attention_mask, places(self, position_ids), None


@wrong(
    "SoftPrompt",
    "The prompt is as long as its vectors are wide, for `VirtualTokens`: which axis of `embeddings` counts the rows?",
)
class as_long_as_it_is_wide(SoftPrompt):
    def __init__(self, embeddings):
        super().__init__(embeddings)
        self.length = embeddings.shape[1]


@wrong("SoftPrompt", caught_by="number of results")
class returns_three(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return super().enter(inputs_embeds, attention_mask, position_ids, cache)[:3]
