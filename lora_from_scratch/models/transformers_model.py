"""Wrappers that give a causal language model of transformers and its tokenizer the interface of our GPT-2."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_from_scratch.support.wrapped import Wrapper

CONTEXT = 2048  # the context length if the configuration does not limit it


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that training and generation need, under GPT-2's names."""

    vocab_size: int
    n_positions: int  # the context: the maximum number of tokens
    n_embd: int  # the width of the hidden states

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the sizes from a configuration of transformers."""
        text = config.get_text_config()
        context = getattr(text, "max_position_embeddings", None) or CONTEXT
        return cls(text.vocab_size, context, text.hidden_size)


class TransformersModel(Wrapper):
    """A causal language model of transformers with the interface of our GPT-2.

    Methods adapt the wrapped model, whose modules keep their names. Therefore saved adapters have the same parameter
    names as adapters that PEFT saves.

    Args:
        inside: any `AutoModelForCausalLM`.
    """

    def __init__(self, inside: Any) -> None:
        super().__init__(inside)
        self.config = Shape.of(inside.config)
        self._checkpointing = False
        self._takes_positions = "position_ids" in inspect.signature(inside.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: TransformersCache | None = None
    ) -> Tensor:
        """Map token ids (B, T) to logits (B, T, V).

        Args:
            input_ids: (B, T).
            attention_mask: (B, S), 1 for a token and 0 for padding. S includes the cached tokens and the T new ones.
            cache: from `new_cache`; the keys and values of the new tokens are added to it.
        """
        options: dict[str, Any] = {}
        if attention_mask is not None and self._takes_positions:  # positions do not count padding
            positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (B, S)
            options["position_ids"] = positions[:, -input_ids.shape[1] :]
        if cache is not None:
            options["past_key_values"] = cache.past
        output = self.inside(input_ids, attention_mask=attention_mask, use_cache=cache is not None, **options)
        logits: Tensor = output.logits
        return logits

    def new_cache(self) -> TransformersCache:
        """An empty cache of keys and values, for generation."""
        return TransformersCache(self.inside.config)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass, which saves memory but takes more time."""
        return self._checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        if on != self._checkpointing:
            new = hasattr(self.inside, "activation_checkpointing_enable")  # its name in newer releases
            switch = f"{'activation' if new else 'gradient'}_checkpointing_{'enable' if on else 'disable'}"
            getattr(self.inside, switch)(*([{"use_reentrant": False}] if on else []))
            self._checkpointing = on


class TransformersCache:
    """The key-value cache of transformers, with the interface that `gpt2.generation` uses."""

    def __init__(self, config: Any) -> None:
        from transformers import DynamicCache

        self.past: Any = DynamicCache(config=config)

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order. Rows may be dropped or repeated."""
        self.past.reorder_cache(rows)


class TransformersTokenizer:
    """A tokenizer of transformers with the interface of `gpt2.Tokenizer`.

    Args:
        inside: any tokenizer with an end-of-text token.
    """

    def __init__(self, inside: Any) -> None:
        self.inside = inside
        self.eos_id: int = inside.eos_token_id
        self.end: str = inside.eos_token
        self.vocab_size: int = len(inside)
        self._word: list[int] = self.encode("a")

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without added special tokens."""
        ids: list[int] = self.inside.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, including special tokens.

        Some tokenizers drop the space before the first word of a text. Since `ids` may continue another text, they are
        decoded after a word, which is then removed.
        """
        return self._decode([*self._word, *ids]).removeprefix(self._decode(self._word))

    def _decode(self, ids: list[int]) -> str:
        text: str = self.inside.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
