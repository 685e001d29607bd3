"""From (meaning representation, reference) pairs to batches in which only the reference is learned."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from lora_from_scratch.finetune.data import Example
from lora_from_scratch.finetune.step_seeds import shuffled_places
from lora_from_scratch.finetune.training import Batch
from lora_from_scratch.gpt2.model import IGNORE_INDEX
from lora_from_scratch.gpt2.tokenizer import Tokenizer

ROUND_UP_TO = 16
GROUP = 8


def prompt_text(mr: str) -> str:
    """What the model is given: the card, and a line break where the completion begins."""
    return f"{mr}\n"


def completion_labels(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Join prompt and completion; label the completion only.

    Args:
        prompt_ids: P token ids.
        completion_ids: C token ids; the last should be the end-of-text token, or the model never learns to stop.

    Returns:
        input ids and labels, both of length P + C. The labels are -100 on the prompt. They are not
        shifted: `next_token_loss` does that.
    """
    return [*prompt_ids, *completion_ids], [IGNORE_INDEX] * len(prompt_ids) + list(completion_ids)


def collate(rows: Sequence[tuple[list[int], list[int]]], padding_id: int, context: int | None = None) -> Batch:
    """Pad (input ids, labels) on the right to one length.

    No attention mask is needed: attention is causal, so nothing sees the padding behind it, and the
    padding's own labels are -100. The length is rounded up to a multiple of 16: PyTorch prepares its matrix
    products for each shape that it meets, and few shapes save time and memory. It stays within `context`.
    """
    longest = -(-max(len(ids) for ids, _ in rows) // ROUND_UP_TO) * ROUND_UP_TO
    longest = min(longest, context or longest)
    input_ids = torch.full((len(rows), longest), padding_id)
    labels = torch.full((len(rows), longest), IGNORE_INDEX)
    for row, (ids, row_labels) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(row_labels)
    return Batch(input_ids, labels)


class Completions:
    """Tokenised examples, and the batch of every step.

    Args:
        examples: pairs of meaning representation and reference.
        tokenizer: the model's.
        context: the most tokens that the model takes; longer examples are left out and counted in `left_out`.

    Raises:
        ValueError: no example is left.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: Tokenizer, context: int) -> None:
        self.padding_id, self.context = tokenizer.eos_id, context
        rows = [
            completion_labels(tokenizer.encode(prompt_text(e.mr)), [*tokenizer.encode(e.ref), tokenizer.eos_id])
            for e in examples
        ]
        self.rows = [row for row in rows if len(row[0]) <= context]
        self.left_out = len(rows) - len(self.rows)
        if not self.rows:
            raise ValueError(f"none of the {len(rows)} examples fits into the model's context of {context} tokens")

    def fingerprint(self) -> int:
        """A number that other examples, in all likelihood, do not have: a CRC-32 of the token ids."""
        return zlib.crc32(repr(self.rows).encode())

    def batch_at(self, step: int, batch_size: int, seed: int) -> Batch:
        """The batch of one training step: each example once an epoch, the order drawn from the seed.

        The examples of `GROUP` steps that follow one another are dealt out by length, so that little is padded.
        """
        group, place = divmod(step, GROUP)
        items = [item for _, item in shuffled_places(len(self.rows), GROUP * batch_size, seed, group)]
        items.sort(key=lambda item: len(self.rows[item][0]))
        turn = shuffled_places(GROUP, GROUP, seed, group)[place][1]  # short and long batches in no order
        rows = [self.rows[item] for item in items[turn * batch_size :][:batch_size]]
        return collate(rows, self.padding_id, self.context)

    def batches(self, batch_size: int) -> list[Batch]:
        """All examples once, in their order, for evaluation."""
        chunks = (self.rows[i : i + batch_size] for i in range(0, len(self.rows), batch_size))
        return [collate(chunk, self.padding_id, self.context) for chunk in chunks]
