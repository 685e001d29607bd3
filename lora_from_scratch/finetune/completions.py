"""Turns (meaning representation, reference) pairs into batches in which only the reference is learned."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from lora_from_scratch.finetune.data import Example
from lora_from_scratch.finetune.step_seeds import shuffled_places
from lora_from_scratch.finetune.training import Batch
from lora_from_scratch.gpt2.model import IGNORE_INDEX
from lora_from_scratch.models.checkpoint import AnyTokenizer

LENGTH_MULTIPLE = 16  # batches are padded to a multiple of this length
BUCKET_STEPS = 8  # number of consecutive steps whose examples are sorted by length


def prompt_text(mr: str) -> str:
    """The model's prompt: the card, and a line break after which the completion begins."""
    return f"{mr}\n"


def completion_labels(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Concatenate prompt and completion, and label only the completion.

    The labels are -100 on the prompt. They are not shifted: `next_token_loss` does that.

    Args:
        prompt_ids: P token ids; there may be none.
        completion_ids: C token ids; the last should be the end-of-text token, or the model never learns to stop.

    Returns:
        input ids and labels, both of length P + C.
    """
    return [*prompt_ids, *completion_ids], [IGNORE_INDEX] * len(prompt_ids) + list(completion_ids)


def collate(rows: Sequence[tuple[list[int], list[int]]], padding_id: int, context: int | None = None) -> Batch:
    """Pad (input ids, labels) on the right to a common length.

    No attention mask is needed: attention is causal, so no token sees the padding after it, and the padding's own
    labels are -100. The length is rounded up to a multiple of 16, but not beyond `context`: PyTorch prepares its
    matrix products for every new shape, so having few shapes saves time and memory.
    """
    longest = -(-max(len(ids) for ids, _ in rows) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    longest = min(longest, context or longest)
    input_ids = torch.full((len(rows), longest), padding_id)
    labels = torch.full((len(rows), longest), IGNORE_INDEX)
    for row, (ids, row_labels) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(row_labels)
    return Batch(input_ids, labels)


def _without_end(text: str, end: str) -> str:
    """The text without end-of-text tokens at its end."""
    while text.rstrip().endswith(end):
        text = text.rstrip().removesuffix(end).rstrip()
    return text


class Completions:
    """Tokenised examples, and the batch of every step.

    Args:
        examples: pairs of meaning representation and reference.
        tokenizer: the model's tokenizer.
        context: the model's maximum number of tokens; longer examples are left out and counted in `left_out`.

    If a reference ends with the end-of-text token, that token is removed (`end_removed` counts these), because one is
    added to every reference.

    Raises:
        ValueError: every example is too long, or one has the end-of-text token in the middle of a text.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: AnyTokenizer, context: int) -> None:
        self.padding_id, self.context = tokenizer.eos_id, context
        texts = [(e.mr, _without_end(e.ref, tokenizer.end)) for e in examples]
        self.end_removed = sum(e.ref != ref for e, (_, ref) in zip(examples, texts, strict=True))
        for mr, ref in texts:
            if tokenizer.end in mr or tokenizer.end in ref:
                raise ValueError(
                    f"the example {mr!r} has the end-of-text token {tokenizer.end} in the middle of a text; remove it"
                )
        rows = [
            completion_labels(tokenizer.encode(prompt_text(mr)), [*tokenizer.encode(ref), tokenizer.eos_id])
            for mr, ref in texts
        ]
        self.rows = [row for row in rows if len(row[0]) <= context]
        self.left_out = len(rows) - len(self.rows)
        if not self.rows:
            raise ValueError(f"none of the {len(rows)} examples fits into the model's context of {context} tokens")

    def fingerprint(self) -> int:
        """A CRC-32 of the token ids, to tell data sets apart."""
        return zlib.crc32(repr(self.rows).encode())

    def batch_at(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of one training step: each example once per epoch, in an order drawn from the seed.

        The examples of `BUCKET_STEPS` consecutive steps are batched by length, which keeps the padding short.
        """
        bucket, place = divmod(step, BUCKET_STEPS)
        items = [item for _, item in shuffled_places(len(self.rows), BUCKET_STEPS * batch_size, seed, bucket)]
        items.sort(key=lambda item: len(self.rows[item][0]))
        # Shuffle the batches of a bucket, so that their lengths do not increase from step to step.
        turn = shuffled_places(BUCKET_STEPS, BUCKET_STEPS, seed, bucket)[place][1]
        rows = [self.rows[item] for item in items[turn * batch_size :][:batch_size]]
        return collate(rows, self.padding_id, self.context)

    def batches(self, batch_size: int) -> list[Batch]:
        """All examples once, in order, for evaluation."""
        chunks = (self.rows[i : i + batch_size] for i in range(0, len(self.rows), batch_size))
        return [collate(chunk, self.padding_id, self.context) for chunk in chunks]
