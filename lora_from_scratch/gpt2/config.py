"""The configuration of a GPT-2."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GPT2Config:
    """Hyperparameters of a GPT-2, with the names of Hugging Face's `config.json`.

    The defaults are those of GPT-2 small (124 M parameters; Radford et al. 2019, table 2).

    Raises:
        ValueError: a size is not a positive whole number, `n_embd` is not a multiple of `n_head`,
            the epsilon is not a positive number, or a dropout is outside [0, 1).
    """

    vocab_size: int = 50257
    n_positions: int = 1024  # the context: the maximum number of tokens
    n_embd: int = 768  # d, the width of the residual stream
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # the width of the MLP; None means 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256

    def __post_init__(self) -> None:
        inner = () if self.n_inner is None else ("n_inner",)
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", *inner):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got n_embd={self.n_embd}, n_head={self.n_head}")
        if not isinstance(self.layer_norm_epsilon, float | int) or not self.layer_norm_epsilon > 0:
            raise ValueError(f"layer_norm_epsilon must be a positive number, got {self.layer_norm_epsilon!r}")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")

    @property
    def mlp_width(self) -> int:
        return self.n_inner or 4 * self.n_embd

    @classmethod
    def from_json(cls, path: str | Path) -> GPT2Config:
        """Read a `config.json` in Hugging Face's layout; entries that do not concern the architecture are ignored.

        Raises:
            ValueError: the file is not JSON, does not describe a GPT-2, or describes a variant of GPT-2 with
                different arithmetic, which is not supported.
        """
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not a readable JSON file: {error}") from None
        if not isinstance(given, dict) or given.get("model_type", "gpt2") != "gpt2":
            kind = given.get("model_type") if isinstance(given, dict) else type(given).__name__
            raise ValueError(f"{path} does not describe a GPT-2 (model_type must be 'gpt2', got {kind!r})")
        for name, only in _ONLY_SUPPORTED.items():
            if given.get(name, only[0]) not in only:
                raise ValueError(f"{path}: {name}={given[name]!r} is not supported, only {only[0]!r}")
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in given.items() if name in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` from which `transformers` loads the same model."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "n_ctx": self.n_positions,
            **asdict(self),
        }


# Options of transformers' GPT2Config that change the result, with the supported values; GPT-2's own value is the first.
_ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
