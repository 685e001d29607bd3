"""How PEFT writes virtual tokens: a soft prompt, or a folded prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods import adapter_files

_PROMPT_KEY = "prompt_embeddings"
# The names of the base model's fields in PEFT and in our config; None in a file means unspecified.
_MODEL_FIELDS = {"token_dim": "n_embd", "num_layers": "n_layer", "num_attention_heads": "n_head"}
_PROMPT_UNDERSTOOD = ("num_virtual_tokens", "num_transformer_submodules", *_MODEL_FIELDS)
# Fields about the initialisation, and about the MLP that PEFT itself discards when saving.
_PROMPT_HARMLESS = (
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
    "prefix_projection",
    "encoder_hidden_size",
    "init_weights",
)


def virtual_tokens_to_peft(
    peft_type: str, length: int, embeddings: Tensor, model: GPT2Config
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's fields and its single tensor for a soft prompt (P, d) or a folded prefix (P, 2 L d)."""
    config = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": length,
        "num_transformer_submodules": 1,
        **{theirs: getattr(model, ours) for theirs, ours in _MODEL_FIELDS.items()},
    }
    return config, {_PROMPT_KEY: embeddings}


def virtual_tokens_from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: GPT2Config
) -> tuple[int, Tensor]:
    """The number of virtual tokens, and the tensor.

    Raises:
        ValueError: a field is not supported, the prompt was made for another model, or the tensors are not as expected.
    """
    adapter_files.refuse_unknown_fields(config, _PROMPT_UNDERSTOOD, _PROMPT_HARMLESS)
    adapter_files.refuse_other_values(config, "task_type", ("CAUSAL_LM", None))
    adapter_files.refuse_other_values(config, "num_transformer_submodules", (1, None))
    for theirs, ours in _MODEL_FIELDS.items():
        given, own = config.get(theirs), getattr(model, ours)
        if given is not None and given != own:
            raise ValueError(
                f"{adapter_files.CONFIG_FILE} has {theirs}={given!r}: made for another model; this one has {own}"
            )
    if set(tensors) != {_PROMPT_KEY}:
        raise ValueError(
            f"{adapter_files.WEIGHTS_FILE} must contain one tensor, {_PROMPT_KEY}; got {', '.join(tensors) or 'none'}"
        )
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int):
        raise ValueError(f"{adapter_files.CONFIG_FILE}: num_virtual_tokens must be a whole number, got {length!r}")
    return length, tensors[_PROMPT_KEY]
