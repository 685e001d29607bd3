"""Evaluation of a fine-tuned model: the quality of its texts, its perplexity, and forgetting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_from_scratch.finetune.completions import Completions, prompt_text
from lora_from_scratch.finetune.data import Dataset, Example, references_by_mr
from lora_from_scratch.finetune.metrics import (
    bleu,
    completion_loss,
    divergence_from_base,
    load_tales,
    slot_error_rate,
    text_loss,
)
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.models.checkpoint import AnyTokenizer, LanguageModel

MAX_NEW_TOKENS = 110
CARDS = 300  # default number of meanings to evaluate on


@dataclass(frozen=True)
class Scores:
    """The metrics of one model on one task."""

    bleu: float  # 0 to 100, corpus BLEU of greedily decoded texts against all references (sacrebleu's default)
    slot_errors: float  # (missing + invented slots) / slots
    perplexity: float  # of the first reference's tokens, given its card
    tale_perplexity: float  # of the project's own tales; it rises when the model forgets
    divergence: float  # nats per token, KL(base || model) on text sampled from the base; 0 for the base itself


def first_cards(examples: Sequence[Example], cards: int) -> list[Example]:
    """The examples of the first `cards` meanings, with all their references.

    Raises:
        ValueError: `cards` is not positive.
    """
    if cards < 1:
        raise ValueError(f"the number of cards to evaluate on must be at least 1, got {cards}")
    kept = set(list(dict.fromkeys(example.mr for example in examples))[:cards])
    return [example for example in examples if example.mr in kept]


def write_texts(
    model: LanguageModel, tokenizer: AnyTokenizer, mrs: Sequence[str], batch_size: int = 64, num_beams: int = 1
) -> list[str]:
    """Generate a text for each meaning representation, greedily or by beam search, in the given order.

    Raises:
        ValueError: a meaning leaves no room for a text in the model's context.
    """
    prompts = [tokenizer.encode(prompt_text(mr)) for mr in mrs]
    room = _room(prompts, mrs, model.config.n_positions)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # keeps the padding of a batch short
    texts = [""] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        places = by_length[start : start + batch_size]
        new = generate(
            model,
            [prompts[i] for i in places],
            max_new_tokens=min(MAX_NEW_TOKENS, room),
            num_beams=num_beams,
            eos_id=tokenizer.eos_id,
        )
        for place, ids in zip(places, new, strict=True):
            texts[place] = tokenizer.decode(ids).strip()
    return texts


def check_examples(examples: Sequence[Example], tokenizer: AnyTokenizer, context: int) -> None:
    """Check before a long training run that `evaluate` can use these examples.

    Raises:
        ValueError: a meaning leaves no room for a text in a context of this many tokens, or no example fits into it.
    """
    mrs = list(references_by_mr(examples))
    _room([tokenizer.encode(prompt_text(mr)) for mr in mrs], mrs, context)
    Completions(examples, tokenizer, context)


def _room(prompts: Sequence[Sequence[int]], mrs: Sequence[str], context: int) -> int:
    """The number of tokens that the longest prompt leaves for a text."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    room = context - len(prompts[longest])
    if room < 1:
        raise ValueError(
            f"a meaning has {len(prompts[longest])} tokens, which leaves no room for a text in the model's context of "
            f"{context} tokens: {mrs[longest]!r}"
        )
    return room


def evaluate(
    model: LanguageModel,
    base: LanguageModel,
    tokenizer: AnyTokenizer,
    examples: Sequence[Example],
    dataset: Dataset,
    num_beams: int = 1,
) -> tuple[Scores, dict[str, str]]:
    """Compute all metrics of a model, and return them with the text that it generated for each card.

    Args:
        model: the adapted model.
        base: the model it was adapted from.
        tokenizer: the tokenizer of both.
        examples: the pairs to evaluate on; several references for a card are separate pairs.
        dataset: the task that they belong to; its lexicon finds slots in a text.
    """
    references = references_by_mr(examples)
    texts = write_texts(model, tokenizer, list(references), num_beams=num_beams)
    firsts = [Example(mr, refs[0]) for mr, refs in references.items()]
    firsts.sort(key=lambda example: len(example.mr) + len(example.ref))  # keeps the padding of a batch short
    batches = Completions(firsts, tokenizer, model.config.n_positions).batches(batch_size=8)
    drawn = text_drawn_from(base, tokenizer)
    scores = Scores(
        bleu=bleu(texts, list(references.values())),
        slot_errors=slot_error_rate(texts, list(references), dataset.lexicon),
        perplexity=perplexity(completion_loss(model, batches)),
        tale_perplexity=tale_perplexity(model, tokenizer),
        divergence=divergence_from_base(model, base, drawn[:, : model.config.n_positions]),
    )
    return scores, dict(zip(references, texts, strict=True))


def tale_perplexity(model: LanguageModel, tokenizer: AnyTokenizer) -> float:
    """The perplexity of the tales that ship with the project, each from its beginning."""
    total = tokens = 0.0
    for tale in load_tales():
        ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(tale)])
        total += text_loss(model, ids, model.config.n_positions) * (len(ids) - 1)
        tokens += len(ids) - 1
    return perplexity(total / tokens)


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where that exceeds the range of a float (a loss above 709)."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def text_drawn_from(
    base: LanguageModel, tokenizer: AnyTokenizer, rows: int = 16, tokens: int = 128, seed: int = 0
) -> Tensor:
    """Sample (rows, 1 + tokens) token ids from a model at temperature 1, each row starting from an empty text.

    The rows are shorter if the model's context is.
    """
    tokens = min(tokens, base.config.n_positions - 1)
    drawn = generate(base, [[tokenizer.eos_id]] * rows, max_new_tokens=tokens, temperature=1.0, seed=seed)
    return torch.tensor([[tokenizer.eos_id, *row] for row in drawn])
