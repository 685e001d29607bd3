"""A tiny GPT-2 with a tokenizer, a tiny data set, and the command line called in this process."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_from_scratch.finetune import evaluation
from lora_from_scratch.finetune.data import Example
from lora_from_scratch.finetune.story_cards import story_cards
from lora_from_scratch.gpt2.checkpoint import save_gpt2
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.methods.adapter_files import CONFIG_FILE, WEIGHTS_FILE

# A run of a second: three steps, one card to be judged by.
SHORT = ["--steps", "3", "--batch-size", "2", "--cards", "1", "--precision", "fp32", "--rank", "2"]
ADAPTER = {CONFIG_FILE, WEIGHTS_FILE}
RESULT = ADAPTER | {"report.json"}


def examples(count: int = 30) -> list[Example]:
    return story_cards(train=count, validation=0, test=0).train


def make_model(directory: Path, **changes: Any) -> Path:
    """A GPT-2 of two layers that has learned nothing, and a tokenizer trained on thirty story cards."""
    tokenizer = Tokenizer.train([f"{e.mr}\n{e.ref}" for e in examples()], 500)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160, **changes}
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    model = GPT2(GPT2Config(vocab_size=tokenizer.vocab_size, **sizes, **ends))
    with torch.no_grad():  # far from uniform, so that texts differ
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_gpt2(model, tokenizer, directory)
    return directory


def write_data(path: Path, pairs: list[Example] | None = None) -> Path:
    """An E2E CSV file with a few story cards in it."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        writer.writerows((e.mr, e.ref) for e in pairs or examples(8))
    return path


def run_in(here: Path, output: Path, *more: str) -> list[str]:
    """The short run with the `model` and the `data.csv` of a directory."""
    places = ["--model", here / "model", "--data", here / "data.csv", "--output", output]
    return ["finetune", *map(str, places), *SHORT, *more]


def files_in(directory: Path) -> dict[str, bytes]:
    """Every file under a directory, by its name, with its content."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def short_judgement(patch: pytest.MonkeyPatch) -> None:
    """The whole judgement of a model, on less: short texts, one short tale, few drawn tokens."""
    whole = evaluation.text_drawn_from
    patch.setattr(evaluation, "MAX_NEW_TOKENS", 12)
    patch.setattr(evaluation, "load_tales", lambda: ["Once there was a fox who wanted a crown."])
    patch.setattr(evaluation, "text_drawn_from", lambda base, tokenizer: whole(base, tokenizer, rows=2, tokens=8))
