"""Prompts: hard prompts, written by hand, and soft prompts, which are learned.

A hard prompt consists of tokens: an instruction, some solved examples, then the question. Nothing is trained.

A soft prompt (Lester et al. 2021, arXiv:2104.08691) learns embedding vectors directly instead of using words. P rows E
are prepended to the embeddings of every text, and only they are trained:

    h_0 = [E; wte(x)] + wpe(0 ... P + T - 1),      E: (P, d)

Nothing inside the model changes: to the frozen blocks, the P rows are tokens like any others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, IGNORE_INDEX, KVCache
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.methods.method import LearningRates, Method, hyperparameter
from lora_from_scratch.methods.prompt_peft import virtual_tokens_from_peft, virtual_tokens_to_peft
from lora_from_scratch.support.tape import Tape, TensorSize

INITS = ("vocabulary", "text", "random")
COMMON_TOKENS = 5000  # "vocabulary" samples from the most common tokens (Lester et al., section 3.2)

# --- Hard prompts --------------------------------------------------------------------------------------


def few_shot_prompt(examples: Sequence[tuple[str, str]], mr: str, instruction: str = "") -> str:
    """A hard prompt: an instruction, solved examples and the card to be solved, separated by empty lines.

    A solved example is its card, a line break, and its text. The card to be solved has the same format, up to where its
    text would begin: the prompt ends with the line break after that card.

    Args:
        examples: (card, text) pairs, the shots, in the order in which they appear; without any, this is a zero-shot
            prompt.
        mr: the card whose text is wanted.
        instruction: a description of the task, which comes first. Empty: there is no instruction and no empty line for
            it.

    Returns:
        The text of the prompt.
    """
    shots = [f"{card}\n{text}" for card, text in examples]
    return "\n\n".join([*([instruction] if instruction else []), *shots, f"{mr}\n"])


# --- Soft prompts: the arithmetic ----------------------------------------------------------------------


def prepend_prompt(embeddings: Tensor, inputs: Tensor) -> Tensor:
    """`[E; X]`: prepend the same soft prompt to every row of the batch.

    Args:
        embeddings: (P, d), the soft prompt E; gradients must flow to it.
        inputs: (B, T, d), the token embeddings X, B rows of T tokens each.

    Returns:
        (B, P + T, d).
    """
    return torch.cat([embeddings.expand(len(inputs), -1, -1), inputs], dim=1)


def prompt_labels(labels: Tensor, num_virtual_tokens: int) -> Tensor:
    """Labels for logits that include the virtual positions: P labels are prepended to every row.

    A virtual token is not in the vocabulary, so it cannot be predicted, and the loss must ignore it: its label is -100
    (`IGNORE_INDEX`). The text's own labels are unchanged; the loss shifts them, not this function.

    Args:
        labels: (B, T) of int64, token ids or -100; not modified.
        num_virtual_tokens: P.

    Returns:
        (B, P + T) of int64.
    """
    return F.pad(labels, (num_virtual_tokens, 0), value=IGNORE_INDEX)


def extend_mask(attention_mask: Tensor, num_virtual_tokens: int) -> Tensor:
    """Extend an attention mask by the virtual tokens, which every text sees: (B, S) to (B, P + S), P ones first."""
    return F.pad(attention_mask, (num_virtual_tokens, 0), value=1)


def initial_prompt(
    table: Tensor,
    num_virtual_tokens: int,
    init: str = "vocabulary",
    init_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    """The initial values of a soft prompt (Lester et al. compare several in section 3.2).

    Args:
        table: (V, d), the token embeddings.
        num_virtual_tokens: P.
        init: one of
            "random": samples from N(0, 1), as in PEFT; much larger than the embeddings of a GPT-2;
            "vocabulary": the rows of P random tokens among the `COMMON_TOKENS` = 5,000 lowest ids, which are roughly
            the most common tokens of a BPE. No token is used twice unless P exceeds their number;
            "text": the rows of `init_ids`, in order, truncated to P rows or repeated until there are P.
        init_ids: the token ids of that text; see `text_ids`.
        generator: the random number generator (for `torch.randn` and `torch.randperm`); None: PyTorch's own.

    Returns:
        (P, d), a new tensor, detached from any graph: later changes to it do not affect the table.

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
        repeats = -(-num_virtual_tokens // common)  # above 1 only if the prompt is longer than the common vocabulary
        ids = torch.cat([torch.randperm(common, generator=generator) for _ in range(repeats)])[:num_virtual_tokens]
    return table.detach()[ids.to(table.device)].clone()


def text_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The `init_ids` of a text: `PromptTuning(init="text", init_ids=text_ids("Tell the tale:", tokenizer))`."""
    return tuple(tokenizer.encode(text))


def nearest_tokens(prompt: Tensor, table: Tensor) -> Tensor:
    """For each row of a soft prompt, the token whose embedding is closest in direction, to interpret the prompt.

    The closest token is the one with the largest cosine similarity, so the norms of the row and of the embeddings,
    which differ considerably, do not matter.

    Args:
        prompt: (P, d), without all-zero rows.
        table: (V, d), the token embeddings.

    Returns:
        (P,) token ids, 0 to V - 1.
    """
    return (F.normalize(prompt, dim=-1) @ F.normalize(table, dim=-1).T).argmax(dim=-1)


# --- The modules ---------------------------------------------------------------------------------------


class VirtualTokens(nn.Module):
    """P virtual tokens before every text: the common part of prompt tuning and prefix tuning.

    While one of these modules is the model's `virtual_tokens`, `GPT2.hidden_states` runs on its output and drops the
    virtual positions from the result, so that the logits stay aligned with `input_ids`. The masks and positions that
    callers pass do not include the virtual tokens; the text's positions start at P. Meanwhile the context in the
    model's config is P tokens shorter, since that is the room left for text.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length  # P
        self.base_config: GPT2Config | None = None  # while in a model: the model's original config

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, KVCache | None]:
        """Add the virtual tokens to the arguments of `GPT2.hidden_states`.

        Raises:
            ValueError: the text and the virtual tokens together do not fit into the context.
        """
        cached = len(cache) if cache is not None else 0  # includes the virtual tokens after the first call
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
        """Insert the virtual tokens at the beginning of a text."""
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
        del model.virtual_tokens  # removes the submodule, so that the name can be a plain attribute again
        model.virtual_tokens = None

    def _check_room(self, tokens: int) -> None:
        context = self.base_config.n_positions if self.base_config else None
        if context is not None and tokens + self.length > context:
            raise ValueError(
                f"{tokens} tokens and the {self.length} virtual tokens before them exceed the model's context of "
                f"{context}"
            )


class SoftPrompt(VirtualTokens):
    """P learned embeddings, prepended to the embeddings of every text.

    `VirtualTokens` does what does not depend on the kind of virtual token: it adds them to the model, checks that there
    is room, and drops their positions from the result. Its `__init__(length)` takes P. The soft prompt itself has:

    - `self.embeddings` (P, d), a parameter, initialised with the given values;
    - `enter`, which the model calls at the beginning of a text. At that point `attention_mask` already has P more
      columns, `position_ids` are already shifted by P, and the cache is empty or None. It returns the four in the order
      of its arguments: `inputs_embeds` (B, P + T, d), with the prompt before every row; the mask, unchanged;
      `position_ids` (B, P + T), whose first P are 0 to P - 1 in every row, or None if it was None; and the cache,
      unchanged.

    Args:
        embeddings: (P, d), the initial values.
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
    """Prompt tuning (Lester et al. 2021); see `initial_prompt` for the initialisations.

    Raises:
        ValueError: a hyperparameter is out of range, or, in `adapt`, one does not fit the model.
    """

    num_virtual_tokens: int = hyperparameter(20, "number of virtual tokens prepended to the text")
    init: str = hyperparameter(
        "vocabulary", "initial embeddings of the virtual tokens: vocabulary (of common tokens), text, or random"
    )
    init_ids: Sequence[int] = ()  # for init="text": the text's token ids
    seed: int = 0  # of the initial values
    init_text: str = hyperparameter(  # `for_tokenizer` converts it to init_ids
        "", "text for --init text; it is repeated if it has fewer tokens than there are virtual tokens"
    )

    name: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-1, 1e-1, "a guess; Lester et al. 2021 have 0.3, but with Adafactor"
    )
    position: ClassVar[float] = 50
    use_when: ClassVar[str] = (
        "many tasks share one frozen model in one batch, and a few kilobytes of learned vectors are all that you "
        "can give each; it learns slowly"
    )
    needs_gpt2: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        try:
            object.__setattr__(self, "init_ids", tuple(int(token) for token in self.init_ids))
        except (TypeError, ValueError):
            raise ValueError(f"init_ids must be token ids (integers), got {self.init_ids!r}") from None
        if (self.init == "text") != bool(self.init_ids or self.init_text):
            given = f"init_text={self.init_text!r}" if self.init_text else f"{len(self.init_ids)} init_ids"
            raise ValueError(
                f'init="text" requires init_text or init_ids (the token ids of the text), and they require it; '
                f"got init={self.init!r} and {given}"
            )

    def for_tokenizer(self, tokenizer: Tokenizer) -> PromptTuning:
        """A copy with the `init_ids` of `init_text`. A text shorter than the prompt is repeated."""
        if not self.init_text:
            return self
        ids = text_ids(self.init_text, tokenizer)
        if len(ids) > self.num_virtual_tokens:
            raise ValueError(
                f"init_text has {len(ids)} tokens but the prompt only {self.num_virtual_tokens}: "
                f"shorten the text, or set num_virtual_tokens to {len(ids)} or more"
            )
        return replace(self, init_ids=ids)

    def _install(self, model: GPT2) -> None:
        check_context(self.num_virtual_tokens, model.config)
        if self.init_text and not self.init_ids:
            raise ValueError("init_text has not been tokenised: adapt with method.for_tokenizer(tokenizer)")
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
        """PEFT's fields and key."""
        embeddings = self.state_dict(model)["virtual_tokens.embeddings"]
        return virtual_tokens_to_peft(self.peft_type, self.num_virtual_tokens, embeddings, model.config)

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: GPT2
    ) -> tuple[PromptTuning, dict[str, Tensor]]:
        length, embeddings = virtual_tokens_from_peft(config, tensors, model.config)
        return cls(num_virtual_tokens=length), {"virtual_tokens.embeddings": embeddings}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> PromptTuning:
        return cls(rng.randint(1, 4), init=rng.choice(["random", "vocabulary"]))


def check_count(name: str, value: Any) -> None:
    """Raise an error unless the value is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_context(num_virtual_tokens: int, config: GPT2Config) -> None:
    """Raise an error if a prompt leaves no room for a text."""
    if num_virtual_tokens >= config.n_positions:
        raise ValueError(
            f"num_virtual_tokens must be between 1 and {config.n_positions - 1}, to leave room for text in the model's "
            f"context of {config.n_positions}, got {num_virtual_tokens}"
        )


# --- Memory accounting: what it keeps for the backward pass ---------------------------------------------


@activations.forward.register
def _(module: SoftPrompt, x: TensorSize, tape: Tape) -> TensorSize:
    tape.tokens += module.length
    return tape.add([x], TensorSize(tape.rows, x.columns, x.width), trained=[module.embeddings])
