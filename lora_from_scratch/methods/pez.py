"""PEZ (Wen et al. 2023, arXiv:2302.03668): a prompt of real tokens, found by gradient descent.

The rows of a soft prompt are not embeddings of tokens, so it cannot be read, and the prompt of their nearest tokens
behaves differently. PEZ optimises soft rows P but computes the loss with their nearest tokens (algorithm 1). In each
step

    E_i = wte[t_i],   t_i = argmax over tokens t of cos(P_i, wte[t])        P, E: (p, d), wte: (V, d)
    g = gradient of the loss at E
    P = P - update(g)                                                       by the optimiser, here AdamW

so the loss is always that of real tokens, and the updates of P add up until a row is nearer to another token.

The last prompt is not necessarily the best, so the best one is kept, as in the authors' code. They compare losses on
all data; here the prompt is evaluated every few steps on the first few batches of the training data.

The result is a list of tokens. It can be used elsewhere as a text, although a tokenizer may split that text into
different tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, KVCache, next_token_loss
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.methods.adapter_files import WEIGHTS_FILE
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.prompt_peft import virtual_tokens_from_peft, virtual_tokens_to_peft
from lora_from_scratch.methods.prompt_tuning import (
    PromptTuning,
    SoftPrompt,
    VirtualTokens,
    check_count,
    nearest_tokens,
    prepend_prompt,
)
from lora_from_scratch.support.wrapped import unwrapped

SEARCH = "pez_search"  # attribute of an adapted model: its `Search`


def project(prompt: Tensor, table: Tensor) -> Tensor:
    """The embeddings of the nearest tokens; their gradient is passed on to the prompt unchanged (straight-through).

    Args:
        prompt: P (p, d).
        table: (V, d), the token embeddings.

    Returns:
        E (p, d), rows of the table bit for bit.
    """
    with torch.no_grad():
        nearest = table[nearest_tokens(prompt, table)].to(prompt.dtype)
    return nearest + (prompt - prompt.detach())  # the term in brackets is zero, but its gradient is not


def hard_prompt_search(
    loss_of: Callable[[Tensor], Tensor], prompt: Tensor, table: Tensor, steps: int, optimizer: torch.optim.Optimizer
) -> tuple[Tensor, float]:
    """PEZ for any loss: look for a prompt of real tokens by gradients (Wen et al. 2023, algorithm 1).

    Each step replaces the rows of P by the embeddings E of their nearest tokens (by cosine similarity), computes the
    loss of E and its gradient with respect to E, and lets the optimiser change P with that gradient. The best prompt of
    tokens is kept, the one whose E had the lowest loss; of equally good ones, the first.

    Args:
        loss_of: the loss of a prompt, given its embeddings (p, d). A step calls it once.
        prompt: P (p, d), the parameter of the optimiser.
        table: (V, d), the token embeddings.
        steps: their number, at least 1.
        optimizer: changes P.

    Returns:
        The ids (p,) of the best prompt, and its loss, a number.
    """
    seen = []
    for _ in range(steps):
        tokens = nearest_tokens(prompt.detach(), table)
        E = table[tokens].detach().requires_grad_()
        loss = loss_of(E)
        seen.append((tokens, loss.item()))
        (prompt.grad,) = torch.autograd.grad(loss, E)
        optimizer.step()
    return min(seen, key=lambda one: one[1])


class HardPrompt(SoftPrompt):
    """p soft rows that are used as their nearest tokens.

    Args:
        embeddings: P (p, d), the initial values.
        vocabulary: the token embeddings, which are not registered as a submodule.
    """

    def __init__(self, embeddings: Tensor, vocabulary: nn.Embedding) -> None:
        super().__init__(embeddings)
        self.vocabulary = (vocabulary,)  # in a tuple, where nn.Module does not look for modules

    @property
    def table(self) -> Tensor:
        return self.vocabulary[0].weight

    @torch.no_grad()
    def tokens(self) -> Tensor:
        """The ids (p,) of the tokens that the prompt consists of."""
        return nearest_tokens(self.embeddings, self.table)

    def enter(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, KVCache | None]:
        _, mask, positions, cache = super().enter(inputs_embeds, attention_mask, position_ids, cache)
        return prepend_prompt(project(self.embeddings, self.table), inputs_embeds), mask, positions, cache


class Search:
    """The best prompt of a run so far.

    Attributes:
        steps: of the run.
        tokens: (p,), the best prompt.
        loss: its loss on the batches, a scalar.
    """

    def __init__(self, model: GPT2, batches: Iterable[Any], steps: int) -> None:
        self.batches, self.steps = list(batches), steps
        self.tokens = hard_prompt(model).tokens()
        self.loss = self.loss_of(model)

    @torch.no_grad()
    def loss_of(self, model: GPT2) -> Tensor:
        """The mean loss of the model's current prompt on the batches."""
        training, device = model.training, self.tokens.device
        model.eval()
        losses = []
        for batch in self.batches:
            batch = batch.to(device)
            logits = model(batch.input_ids, attention_mask=batch.attention_mask)
            losses.append(next_token_loss(logits, batch.labels))
        model.train(training)
        return torch.stack(losses).mean()

    def judge(self, model: GPT2) -> None:
        """Keep the current prompt if it is better than the best one so far."""
        tokens = hard_prompt(model).tokens()
        if not torch.equal(tokens, self.tokens) and (loss := self.loss_of(model)) < self.loss:
            self.tokens.copy_(tokens)
            self.loss.copy_(loss)


@dataclass(frozen=True)
class PEZ(PromptTuning):
    """A prompt of real tokens, found by projected gradients; see the module for the algorithm.

    An adapter directory contains the token ids only.

    Raises:
        ValueError: as for `PromptTuning`.
    """

    num_virtual_tokens: int = hyperparameter(16, "number of tokens of the prompt, which is prepended to every text")
    judged_batches: int = hyperparameter(4, "number of training batches on which prompts are compared")
    judge_every: int = hyperparameter(10, "number of steps between two comparisons")

    name: ClassVar[str] = "pez"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_PEZ"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(
        1e-1, 1e-1, "YuxinWenRick/hard-prompts-made-easy; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 51
    use_when: ClassVar[str] = (
        "the prompt has to consist of tokens, so that it can be read, or used where only text is accepted"
    )
    only_on_request: ClassVar[frozenset[str]] = frozenset({"pez"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("judged_batches", self.judged_batches)
        check_count("judge_every", self.judge_every)

    def _install(self, model: GPT2) -> None:
        super()._install(model)
        assert isinstance(model.virtual_tokens, SoftPrompt)
        first = model.virtual_tokens.embeddings.detach()
        VirtualTokens.take_out_of(model)
        HardPrompt(first, model.transformer.wte).put_into(model)

    def _uninstall(self, model: GPT2) -> None:
        super()._uninstall(model)
        model.__dict__.pop(SEARCH, None)

    # --- During training ---

    def before_training(self, model: nn.Module, batches: Iterable[Any], steps: int) -> None:
        inside = gpt2_of(model)
        inside.__dict__[SEARCH] = Search(inside, islice(batches, self.judged_batches), steps)

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        inside = gpt2_of(model)
        search: Search = inside.__dict__[SEARCH]
        if step % self.judge_every == 0 or step == search.steps:
            search.judge(inside)
        if step == search.steps:
            prompt = hard_prompt(inside)
            prompt.embeddings.copy_(prompt.table[search.tokens])

    def training_state(self, model: nn.Module) -> dict[str, Tensor]:
        search: Search | None = gpt2_of(model).__dict__.get(SEARCH)
        return {} if search is None else {"best_tokens": search.tokens, "best_loss": search.loss}

    # --- What was found ---

    def readable(self, model: nn.Module, tokenizer: Tokenizer) -> str:
        """The prompt as a text."""
        ids = hard_prompt(gpt2_of(model)).tokens().tolist()
        text = tokenizer.decode(ids)
        other = "" if tokenizer.encode(text) == ids else " (a text that is encoded into other tokens)"
        return f"{text!r}{other}"

    def to_adapter(self, model: GPT2) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The ids of the tokens, and the shape of the model."""
        tokens = hard_prompt(model).tokens()
        config, _ = virtual_tokens_to_peft(self.peft_type, self.num_virtual_tokens, tokens, model.config)
        return config, {"tokens": tokens}

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: GPT2
    ) -> tuple[PromptTuning, dict[str, Tensor]]:
        tokens, size = tensors.get("tokens"), model.config.vocab_size
        if set(tensors) != {"tokens"} or tokens is None or tokens.dtype != torch.int64 or tokens.ndim != 1:
            raise ValueError(f"{WEIGHTS_FILE} must have one tensor, the whole numbers tokens (p,), got {set(tensors)}")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise ValueError(f"{WEIGHTS_FILE} has tokens that are not from 0 to {size - 1}: made for another model")
        table = model.transformer.wte.weight.detach()
        named = {"prompt_embeddings": table[tokens.to(table.device)]}
        length, embeddings = virtual_tokens_from_peft(config, named, model.config)
        return cls(num_virtual_tokens=length), {"virtual_tokens.embeddings": embeddings}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> PEZ:
        return cls(
            rng.randint(1, 4),
            init=rng.choice(["random", "vocabulary"]),
            judged_batches=1,
            judge_every=rng.randint(1, 3),
        )


def gpt2_of(model: nn.Module) -> GPT2:
    """The GPT-2 inside a model that may be compiled or wrapped."""
    inside = unwrapped(model)
    assert isinstance(inside, GPT2)
    return inside


def hard_prompt(model: GPT2) -> HardPrompt:
    """The prompt of a model that PEZ has adapted."""
    assert isinstance(model.virtual_tokens, HardPrompt)
    return model.virtual_tokens
