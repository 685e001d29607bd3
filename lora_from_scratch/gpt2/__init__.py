"""A GPT-2 that can be read in one sitting: model, tokenizer, checkpoints, generation."""

from lora_from_scratch.gpt2.checkpoint import (
    checkpoint_directory,
    load_gpt2,
    load_model,
    load_tokenizer,
    save_gpt2,
)
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2, IGNORE_INDEX, KVCache, next_token_loss
from lora_from_scratch.gpt2.tokenizer import Tokenizer

__all__ = [
    "GPT2",
    "IGNORE_INDEX",
    "GPT2Config",
    "KVCache",
    "Tokenizer",
    "checkpoint_directory",
    "generate",
    "load_gpt2",
    "load_model",
    "load_tokenizer",
    "next_token_loss",
    "save_gpt2",
]
