"""Helpers for the tests of checkpoints: a tokenizer, and an assertion that two models are equal."""

from __future__ import annotations

import torch

from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["a king and a queen and a king"] * 2, 270)


def assert_same_model(one: GPT2, other: GPT2) -> None:
    assert one.config == other.config
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
