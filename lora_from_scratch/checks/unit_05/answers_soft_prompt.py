"""Unit 05, prompts, the module: common mistakes, and alternative right answers."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_from_scratch.checks.bank import right, wrong
from lora_from_scratch.methods.prompt_tuning import SoftPrompt, VirtualTokens, prepend_prompt

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
    """The rows are looked up like tokens; the parameter belongs to the lookup table."""

    def __init__(self, embeddings):
        super().__init__(len(embeddings))
        self.embeddings = nn.Parameter(embeddings)

    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        own = torch.tensor([range(self.length)] * len(inputs_embeds))
        rows = nn.functional.embedding(own, self.embeddings)
        places = None if position_ids is None else torch.cat((own, position_ids), 1)
        return torch.cat((rows, inputs_embeds), 1), attention_mask, places, cache


@right("SoftPrompt")
class written_into_larger_tensors(VirtualTokens):
    def __init__(self, embeddings):
        super().__init__(embeddings.size(0))
        self.embeddings = nn.Parameter(torch.empty_like(embeddings))
        with torch.no_grad():
            self.embeddings.copy_(embeddings)

    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        whole = nn.functional.pad(inputs_embeds, (0, 0, self.length, 0))
        whole[:, : self.length] += self.embeddings
        if position_ids is not None:
            position_ids = nn.functional.pad(position_ids, (self.length, 0))
            position_ids[:, : self.length] = torch.arange(self.length)
        return whole, attention_mask, position_ids, cache


@right("SoftPrompt")
class row_by_row_with_the_library_s_function(VirtualTokens):
    def __init__(self, embeddings):
        super().__init__(len(embeddings))
        self.embeddings = nn.Parameter(embeddings.detach().clone())

    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        if position_ids is None:
            return prepend_prompt(self.embeddings, inputs_embeds), attention_mask, None, cache
        longer = [[*range(self.length), *row] for row in position_ids.tolist()]
        return prepend_prompt(self.embeddings, inputs_embeds), attention_mask, torch.tensor(longer), cache


@wrong(
    "SoftPrompt",
    "`embeddings` does not start with the values that were given: a prompt that was initialised with care would be "
    "lost.",
)
class other_initial_values(SoftPrompt):
    def __init__(self, embeddings):
        super().__init__(torch.zeros_like(embeddings))


@wrong(
    "SoftPrompt",
    "Mask and positions are exchanged in what you return. The order is that of the arguments: embeddings, mask, "
    "positions, cache.",
)
class in_another_order(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return in_front(self, inputs_embeds), places(self, position_ids), attention_mask, cache


def in_front(soft, inputs_embeds) -> Tensor:
    return torch.cat([soft.embeddings.expand(len(inputs_embeds), -1, -1), inputs_embeds], dim=1)


def places(soft, position_ids, first: int = 0):
    if position_ids is None:
        return None
    own = torch.arange(first, first + soft.length).expand(len(position_ids), -1)
    return torch.cat([own, position_ids], dim=1)


@wrong(
    "SoftPrompt",
    "`embeddings` is a plain tensor: an optimiser would not find it, and it would not be saved. What makes a tensor a "
    "trainable part of a module?",
)
class a_plain_tensor(VirtualTokens):
    def __init__(self, embeddings):
        super().__init__(len(embeddings))
        self.embeddings = embeddings

    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return in_front(self, inputs_embeds), attention_mask, places(self, position_ids), cache


@wrong(
    "SoftPrompt",
    "`embeddings` is a parameter, but it is frozen: it gets no gradient, and nothing is trained.",
)
class a_frozen_parameter(VirtualTokens):
    def __init__(self, embeddings):
        super().__init__(len(embeddings))
        self.embeddings = nn.Parameter(embeddings, requires_grad=False)

    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return in_front(self, inputs_embeds), attention_mask, places(self, position_ids), cache


@wrong(
    "SoftPrompt",
    "You detach the prompt in `enter`: it would keep its initial values for ever.",
)
class cut_off(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        whole = torch.cat([self.embeddings.detach().expand(len(inputs_embeds), -1, -1), inputs_embeds], dim=1)
        return whole, attention_mask, places(self, position_ids), cache


@wrong(
    "SoftPrompt",
    "You append the prompt to the text. The model omits the first P positions of the result, which are then the "
    "text's own.",
)
class behind_the_text(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        whole = torch.cat([inputs_embeds, self.embeddings.expand(len(inputs_embeds), -1, -1)], dim=1)
        return whole, attention_mask, places(self, position_ids), cache


@wrong(
    "SoftPrompt",
    "The prompt has no positions: `position_ids` has to be as long as the extended embeddings.",
)
class no_positions_of_its_own(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return in_front(self, inputs_embeds), attention_mask, position_ids, cache


@wrong(
    "SoftPrompt",
    "Every row of your prompt has position 0. The rows have consecutive positions, like tokens.",
)
class all_at_position_zero(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        whole = in_front(self, inputs_embeds)
        if position_ids is not None:
            position_ids = torch.cat([torch.zeros(len(whole), self.length, dtype=torch.long), position_ids], dim=1)
        return whole, attention_mask, position_ids, cache


@wrong(
    "SoftPrompt",
    "The positions of your prompt start at 1. Positions are counted from 0, and those of the text start at P.",
)
class positions_from_one(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return in_front(self, inputs_embeds), attention_mask, places(self, position_ids, 1), cache


@wrong(
    "SoftPrompt",
    "You add P to the positions of the text. They have already been shifted when `enter` gets them.",
)
class moved_twice(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        moved = None if position_ids is None else places(self, position_ids + self.length)
        return in_front(self, inputs_embeds), attention_mask, moved, cache


@wrong(
    "SoftPrompt",
    "You create positions although none were given. In that case the model computes them itself, and takes padding "
    "into account.",
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
    "You extend the attention mask. It already has the P additional columns.",
)
class widens_the_mask_again(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (self.length, 0), value=1)
        return in_front(self, inputs_embeds), attention_mask, places(self, position_ids), cache


@wrong(
    "SoftPrompt",
    "You drop the cache: the second piece of a text then does not see the first. Pass it on unchanged.",
)
class drops_the_cache(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return in_front(self, inputs_embeds), attention_mask, places(self, position_ids), None


@wrong(
    "SoftPrompt",
    "You tell `VirtualTokens` the width of the vectors instead of the length of the prompt: which axis of "
    "`embeddings` counts the rows?",
)
class as_long_as_it_is_wide(SoftPrompt):
    def __init__(self, embeddings):
        super().__init__(embeddings)
        self.length = embeddings.shape[1]


@wrong("SoftPrompt", caught_by="number of results")
class returns_three(SoftPrompt):
    def enter(self, inputs_embeds, attention_mask, position_ids, cache):
        return super().enter(inputs_embeds, attention_mask, position_ids, cache)[:3]
