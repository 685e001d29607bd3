"""Prompts: the text in front of the text, written by hand (hard) or learned (soft).

A hard prompt is tokens: an instruction, some solved examples, then the question. Nothing is trained.

A soft prompt (Lester et al. 2021, arXiv:2104.08691) skips the words and learns the vectors themselves. P rows
E are put in front of the embeddings of every text, and they are all that is trained:

    h_0 = [E; wte(x)] + wpe(0 ... P + T - 1),      E: (P, d)

Nothing inside the model changes: the frozen blocks read P tokens that nobody can type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, IGNORE_INDEX, KVCache
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.method import Method

INITS = ("vocabulary", "text", "random")
COMMON_TOKENS = 5000  # "vocabulary" draws from the most common ones (Lester et al., section 3.2)

# --- Hard prompts --------------------------------------------------------------------------------------


def few_shot_prompt(examples: Sequence[tuple[str, str]], mr: str, instruction: str = "") -> str:
    """A hard prompt: an instruction, solved examples, and the card to be solved, with an empty line between two.

    A solved example is its card, a line break, and its text. The card to be solved looks the same, up to where its
    text would begin: the prompt ends with the line break behind that card, and with nothing after it.

    Args:
        examples: (card, text) pairs, the shots, in the order in which they shall stand; without one this is a
            zero-shot prompt.
        mr: the card whose text is wanted.
        instruction: what to do, in words; it comes first. Empty: there is none, and no empty line for it either.

    Returns:
        The text of the prompt.
    """
    shots = [f"{card}\n{text}" for card, text in examples]
    return "\n\n".join([*([instruction] if instruction else []), *shots, f"{mr}\n"])


# --- Soft prompts: the arithmetic ----------------------------------------------------------------------


def prepend_prompt(embeddings: Tensor, inputs: Tensor) -> Tensor:
    """[E; X]: the same soft prompt in front of every row of the batch.

    Args:
        embeddings: (P, d), the soft prompt E, which gradients shall reach.
        inputs: (B, T, d), the token embeddings X, B rows of T tokens each.

    Returns:
        (B, P + T, d).
    """
    return torch.cat([embeddings.expand(len(inputs), -1, -1), inputs], dim=1)


def prompt_labels(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    """Labels for logits that include the virtual positions: P labels more, in front of every row.

    A virtual token is no token: there is nothing to predict at its place, and the loss must not count it. So its label
    is -100 (`IGNORE_INDEX`). The text's own labels stay as they are; the loss shifts them, not this function.

    Args:
        labels: (B, T) of int64, token ids or -100; left as it is.
        num_virtual_tokens: P.

    Returns:
        (B, P + T) of int64.
    """
    return F.pad(labels, (num_virtual_tokens, 0), value=IGNORE_INDEX)


def extend_mask(attention_mask: Tensor, num_virtual_tokens: int) -> Tensor:
    """An attention mask with the virtual tokens, which every text sees: (B, S) to (B, P + S), 1 in front."""
    return F.pad(attention_mask, (num_virtual_tokens, 0), value=1)


def initial_prompt(
    table: Tensor,
    num_virtual_tokens: int,
    init: str = "vocabulary",
    init_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The first values of a soft prompt (Lester et al., section 3.2 compares them).

    Args:
        table: (V, d), the token embeddings.
        num_virtual_tokens: P.
        init: one of
            "random": numbers from N(0, 1), as in PEFT; much larger than the embeddings of a GPT-2;
            "vocabulary": the rows of P random tokens among the `COMMON_TOKENS` = 5,000 lowest ids, which are the most
            common tokens of a BPE, about. No token comes twice, unless P is larger than their number;
            "text": the rows of `init_ids`, in their order: cut after P of them, or begun again until there are P.
        init_ids: the token ids of that text; see `text_ids`.
        generator: where random numbers come from (`torch.randn` and `torch.randperm` take it); None: PyTorch's own.

    Returns:
        (P, d), a new tensor outside of any graph: nothing that happens to it later reaches the table.

    Raises:
        ValueError: `init` is none of the three, or it is "text" and there are no ids.
    """
    if init not in INITS or (init == "text" and not len(init_ids)):
        raise ValueError(f"init must be one of {', '.join(INITS)}, and text needs init_ids; got {init!r}, {init_ids}")
    if init == "random":
        return torch.randn(num_virtual_tokens, table.shape[1], generator=generator).to(table)
    if init == "text":
        repeats = -(-num_virtual_tokens // len(init_ids))
        ids = torch.tensor([*init_ids] * repeats)[:num_virtual_tokens]
    else:
        common = min(COMMON_TOKENS, len(table))
        repeats = -(-num_virtual_tokens // common)  # above 1 only where the prompt is longer than the vocabulary
        ids = torch.cat([torch.randperm(common, generator=generator) for _ in range(repeats)])[:num_virtual_tokens]
    return table.detach()[ids.to(table.device)].clone()


def text_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The `init_ids` of a text: `PromptTuning(init="text", init_ids=text_ids("Tell the tale:", tokenizer))`."""
    return tuple(tokenizer.encode(text))


def nearest_tokens(prompt: Tensor, table: Tensor) -> Tensor:
    """For each row of a soft prompt the token whose embedding points most nearly the same way: what it "says".

    The nearest is the one with the largest cosine, so that neither the length of the row matters nor those of the
    embeddings, which differ a lot.

    Args:
        prompt: (P, d), no row all zeros.
        table: (V, d), the token embeddings.

    Returns:
        (P,) token ids, 0 to V - 1.
    """
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).argmax(dim=-1)


# --- The modules ---------------------------------------------------------------------------------------


class VirtualTokens(nn.Module):
    """P virtual tokens in front of every text: what prompt tuning and prefix tuning have in common.

    While one of these is the model's `virtual_tokens`, `GPT2.hidden_states` runs on what it returns and leaves out the
    virtual positions of the result, so that logits stay aligned with `input_ids`. The masks and the
    positions that callers give know nothing of the virtual tokens; the text's positions begin at P. The model's config
    says that the context is P tokens shorter meanwhile: that is the room that is left for text.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length  # P
        self.base_config: GPT2Config | None = None  # while in a model: its config before

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, KVCache | None]:
        """The arguments of `GPT2.hidden_states`, without and with the virtual tokens.

        Raises:
            ValueError: the text does not fit into the context beside them.
        """
        cached = len(cache) if cache is not None else 0  # virtual tokens included: they are in from the first call on
        self._check_room(inputs_embeds.shape[1] + max(0, cached - self.length))
        if attention_mask is not None:
            attention_mask = extend_mask(attention_mask, self.length)  # (B, P + S)
        if position_ids is not None:
            position_ids = position_ids + self.length
        if cached:
            return inputs_embeds, attention_mask, position_ids, cache
        return self.enter(inputs_embeds, attention_mask, position_ids, cache)

    def enter(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, KVCache | None]:
        """Put the virtual tokens in, at the beginning of a text."""
        raise NotImplementedError

    def put_into(self, model: GPT2) -> None:
        self.base_config = model.config
        model.config = replace(model.config, n_positions=model.config.n_positions - self.length)
        model.virtual_tokens = self

    @staticmethod
    def take_out_of(model: GPT2) -> None:
        assert isinstance(model.virtual_tokens, VirtualTokens)
        assert model.virtual_tokens.base_config is not None
        model.config = model.virtual_tokens.base_config
        del model.virtual_tokens  # as a submodule; then it is the attribute again that it was before
        model.virtual_tokens = None

    def _check_room(self, tokens: int) -> None:
        context = self.base_config.n_positions if self.base_config else None
        if context is not None and tokens + self.length > context:
            raise ValueError(
                f"{tokens} tokens and the {self.length} virtual tokens in front of them are more than the model's "
                f"context of {context}"
            )


class SoftPrompt(VirtualTokens):
    """P learned embeddings in front of the embeddings of every text.

    `VirtualTokens` does what does not depend on the kind of virtual token: it tells the model of them, checks that
    there is room, and leaves their positions out of the result. Its `__init__(length)` wants to know P. What is the
    soft prompt's own:

    - `self.embeddings` (P, d), a parameter, which begins with the values that are given;
    - `enter`, which the model calls where a text begins. `attention_mask` has P columns more already, `position_ids`
      are moved up by P already, and the cache is empty or None. It returns the four of them, in this order:
      `inputs_embeds` (B, P + T, d), with the prompt in front of every row; the mask and the cache as they came; and
      `position_ids` (B, P + T), whose first P are 0 ... P - 1 in every row, or None if it came as None.

    Args:
        embeddings: (P, d), the first values.
    """

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__(len(embeddings))
        self.embeddings = nn.Parameter(embeddings)  # (P, d)

    def enter(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, KVCache | None]:
        if position_ids is not None:
            own = torch.arange(self.length, device=position_ids.device).expand(len(position_ids), -1)
            position_ids = torch.cat([own, position_ids], dim=1)  # (B, P + T)
        return prepend_prompt(self.embeddings, inputs_embeds), attention_mask, position_ids, cache


# --- The method ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptTuning(Method):
    """Prompt tuning (Lester et al. 2021); see `initial_prompt` for the ways to begin.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; or one that does not fit the model, in `adapt`.
    """

    num_virtual_tokens: int = 20
    init: str = "vocabulary"
    init_ids: Sequence[int] = ()  # for init="text": the text's token ids
    seed: int = 0  # of the first values
    init_text: str = ""  # for init="text": the text; `for_tokenizer` turns it into init_ids

    name: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        try:
            object.__setattr__(self, "init_ids", tuple(int(token) for token in self.init_ids))
        except (TypeError, ValueError):
            raise ValueError(f"init_ids must be token ids, whole numbers, got {self.init_ids!r}") from None
        if (self.init == "text") != bool(self.init_ids or self.init_text):
            given = f"init_text={self.init_text!r}" if self.init_text else f"{len(self.init_ids)} init_ids"
            raise ValueError(
                f'init="text" and init_text, or init_ids, the token ids of the text, go together; '
                f"got init={self.init!r} and {given}"
            )

    def for_tokenizer(self, tokenizer: Tokenizer) -> PromptTuning:
        """With the `init_ids` of `init_text`. A text that is shorter than the prompt is repeated."""
        if not self.init_text:
            return self
        ids = text_ids(self.init_text, tokenizer)
        if len(ids) > self.num_virtual_tokens:
            raise ValueError(
                f"init_text has {len(ids)} tokens and the prompt only {self.num_virtual_tokens}: "
                f"shorten the text, or set num_virtual_tokens to {len(ids)} or more"
            )
        return replace(self, init_ids=ids)

    def _install(self, model: GPT2) -> None:
        check_context(self.num_virtual_tokens, model.config)
        if self.init_text and not self.init_ids:
            raise ValueError("init_text is words, and the model reads tokens: adapt by method.for_tokenizer(tokenizer)")
        if self.init_ids and not 0 <= min(self.init_ids) <= max(self.init_ids) < model.config.vocab_size:
            raise ValueError(
                f"init_ids must be token ids from 0 to {model.config.vocab_size - 1}, "
                f"got {min(self.init_ids)} to {max(self.init_ids)}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        table = model.transformer.wte.weight.detach()
        first = initial_prompt(table, self.num_virtual_tokens, self.init, self.init_ids, generator)
        SoftPrompt(first).put_into(model)

    def _uninstall(self, model: GPT2) -> None:
        VirtualTokens.take_out_of(model)

    def to_adapter(self, model: GPT2) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and key."""
        embeddings = self.state_dict(model)["virtual_tokens.embeddings"]
        return peft_format.virtual_tokens_to_peft(self.peft_type, self.num_virtual_tokens, embeddings, model.config)

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: GPT2
    ) -> tuple[PromptTuning, dict[str, Tensor]]:
        length, embeddings = peft_format.virtual_tokens_from_peft(config, tensors, model.config)
        return cls(num_virtual_tokens=length), {"virtual_tokens.embeddings": embeddings}


def check_count(name: str, value: Any) -> None:
    """Refuse what is not a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_context(num_virtual_tokens: int, config: GPT2Config) -> None:
    """Refuse a prompt that leaves no room for a text."""
    if num_virtual_tokens >= config.n_positions:
        raise ValueError(
            f"num_virtual_tokens must be between 1 and {config.n_positions - 1}, so that text fits into the model's "
            f"context of {config.n_positions} beside them, got {num_virtual_tokens}"
        )
