"""Tiny models of several architectures with random weights, text or pictures for them, and what they say of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, LAYERS, TOKENS = 48, 16, 2, 7

TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SHAPE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "attention_dropout": 0.0,
}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2: dict[str, Any] = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 16}
GPT2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}

# Each in another way: (out, in) or (in, out), fused or not, with biases or without, tied or not, text or pictures.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", TEXT | GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT | SHAPE | {"num_key_value_heads": 1}),
    "grouped llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        TEXT | SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        TEXT | SHAPE | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT | SHAPE | {"hidden_dropout": 0.0}),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        SHAPE | NO_DROPOUT | {"image_size": 8, "patch_size": 4, "num_labels": 5},
    ),
    "gpt2 classifier": ("GPT2ForSequenceClassification", "GPT2Config", TEXT | GPT2 | {"num_labels": 3}),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT | SHAPE | NO_DROPOUT | {"num_labels": 3}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        TEXT | {"d_model": WIDTH, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": LAYERS, "dropout_rate": 0.0},
    ),
}
ARCHITECTURES = ["gpt2", "llama", "qwen2", "gpt-neox", "vit"]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


@cache
def _original(kind: str) -> nn.Module:
    if kind == "mlp":
        model = mlp()
    else:
        transformers = pytest.importorskip("transformers")
        name, config, settings = TRANSFORMERS[kind]
        model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    generator = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def model_of(kind: str) -> Any:
    """A new copy of the model of that kind; always the same random numbers, biases and norms too."""
    return copy.deepcopy(_original(kind))


def inputs_of(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """What the model is called with, by name."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "mlp":
        return {"input": torch.randn(3, 12, generator=generator)}
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    tokens = torch.randint(1, VOCABULARY, (2, TOKENS), generator=generator)
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens.flip(0)} if kind == "t5" else {})


def logits_of(model: Callable[..., Any], kind: str) -> Tensor:
    """(..., classes or vocabulary)."""
    output = model(**inputs_of(kind))
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def randomise(parameters: dict[str, nn.Parameter], seed: int = 1, size: float = 0.3) -> None:
    """Normal numbers that depend on the names alone and not on their order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def weighted_mean(logits: Tensor) -> Tensor:
    """A scalar in which every logit has a weight of its own."""
    return (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).mean()
