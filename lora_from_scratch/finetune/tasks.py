"""The tasks for fine-tuning: the bundled story cards, and E2E from disk."""

from __future__ import annotations

from lora_from_scratch.finetune.data import STORY_CARDS, Dataset
from lora_from_scratch.finetune.e2e import read_e2e
from lora_from_scratch.finetune.story_cards import story_cards


def load_dataset(source: str, seed: int = 0) -> Dataset:
    """Load the bundled task, or E2E from disk.

    Args:
        source: "story-cards"; or the path of an E2E CSV file, which is split by meaning 80/10/10; or the path of a
            directory with trainset.csv, devset.csv and testset.csv (or testset_w_refs.csv).
        seed: the seed of the story cards, or of the split of a single file.

    Raises:
        FileNotFoundError: there is no such file or directory.
        ValueError: the file is malformed; the message gives the line.
    """
    if source == STORY_CARDS:
        return story_cards(seed)
    return read_e2e(source, seed)
