"""Helpers for several test files: the location of real files, and small random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_from_scratch.gpt2.checkpoint import BUNDLED_DIRECTORY
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


def shared(path: str) -> Path:
    """A file or directory in `../shared`; the test is skipped if it does not exist."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{path} is not beside this repository")
    return found


def real_checkpoint() -> Path:
    """The bundled GPT-2, or the trial model if there is no bundled one."""
    if (BUNDLED_DIRECTORY / "model.safetensors").exists():
        return BUNDLED_DIRECTORY
    return shared("data/trial-gpt2")


def tiny_config(**changes: Any) -> GPT2Config:
    """A GPT-2 with a few thousand parameters, without dropout."""
    settings: dict[str, Any] = {
        "vocab_size": 61,
        "n_positions": 32,
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 3,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2Config(**(settings | changes))


def tiny_model(seed: int = 0, *, std: float = 0.25, **changes: Any) -> GPT2:
    """A tiny GPT-2 in which all parameters, including biases and norms, are random, so that omitting one is noticed."""
    model = GPT2(tiny_config(**changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model


def transformers_twin(model: GPT2) -> Any:
    """The same model in transformers, with the same weights."""
    transformers = pytest.importorskip("transformers")
    twin = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model.config.to_json_dict()))
    twin.load_state_dict(model.state_dict() | {"lm_head.weight": model.transformer.wte.weight})
    return twin.eval()
