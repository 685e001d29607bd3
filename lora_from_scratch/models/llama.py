"""The shapes of a Llama, and a small one in plain PyTorch, which stands in where no real one is installed.

A Llama (Touvron et al. 2023, arXiv:2302.13971, section 2.2) differs from a GPT-2 in four places: positions turn the
queries and keys instead of being added to the input (RoPE; Su et al. 2021, arXiv:2104.09864, section 3.2.2), the MLP
has a gate (SwiGLU; Shazeer 2020, arXiv:2002.05202), the normalisation does not subtract a mean, and no layer has a
bias. Later ones have fewer heads of keys and values than of queries (Ainslie et al. 2023, arXiv:2305.13245).

The modules have the names that transformers' `LlamaForCausalLM` gives them, so that the tensors of one fit the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.models.transformers_model import Shape


def llama_matrices(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The seven matrices of one block of a Llama, as (in, out), read from its config.json.

    With grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245, section 2.2), several query heads share one
    head of keys and values. All heads have the same width h.

    - `q_proj` maps the hidden state to the query heads, `k_proj` and `v_proj` map it to the heads of keys and of
      values.
    - `o_proj` maps the outputs of all query heads, side by side, back to the hidden state.
    - `gate_proj` and `up_proj` map the hidden state to the inside of the MLP; `down_proj` maps it back.

    Args:
        config: "hidden_size" is the width of the hidden state, "intermediate_size" that of the inside of the MLP;
            "num_attention_heads" counts the query heads, "num_key_value_heads" those of keys, and as many of values;
            if it is missing or None, there are as many as query heads.
            "head_dim" is h; if it is missing or None, h is the width of the hidden state over the number of query
            heads.

    Returns:
        A pair (in, out) for each of the seven names.
    """
    d, inside, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    shared = config.get("num_key_value_heads") or heads
    h = config.get("head_dim") or d // heads
    return {
        "q_proj": (d, heads * h),
        "k_proj": (d, shared * h),
        "v_proj": (d, shared * h),
        "o_proj": (heads * h, d),
        "gate_proj": (d, inside),
        "up_proj": (d, inside),
        "down_proj": (inside, d),
    }


@dataclass(frozen=True)
class LlamaShape:
    """The entries of a Llama's config.json that its computation needs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class SmallLlama(nn.Module):
    """A Llama with random weights and a tied head: token ids (B, T) to logits (B, T, V).

    Args:
        shape: see `LlamaShape`.
        seed: of the weights, which are normal with a standard deviation of 0.02.
    """

    def __init__(self, shape: LlamaShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.config = Shape(shape.vocab_size, shape.max_position_embeddings, shape.hidden_size)
        self.model = _Blocks(shape)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.02, generator=generator)

    def get_output_embeddings(self) -> nn.Module:
        """The output head, under the name of transformers' method."""
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Padding has to be on the right, so that no token sees it; the mask is not needed."""
        logits: Tensor = self.lm_head(self.model(input_ids))
        return logits


class _Blocks(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(_Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, d)
        for block in self.layers:
            x = block(x)
        normalised: Tensor = self.norm(x)
        return normalised


class _Block(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _MLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class _Attention(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_dim, self.theta = shape.head_dim, shape.rope_theta
        d, shared = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, shared, bias=False)
        self.v_proj = nn.Linear(d, shared, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))  # (B, heads, T, h)
        q, k = _turned(q, self.theta), _turned(k, self.theta)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class _MLP(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        d, inside = shape.hidden_size, shape.intermediate_size
        self.gate_proj = nn.Linear(d, inside, bias=False)
        self.up_proj = nn.Linear(d, inside, bias=False)
        self.down_proj = nn.Linear(inside, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def _turned(x: Tensor, theta: float) -> Tensor:
    """RoPE: at position t, turn the pair of the features i and i + h / 2 by the angle t theta^(-2 i / h)."""
    half = x.shape[-1] // 2
    speeds = theta ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * speeds  # (T, h / 2)
    first, second = x.float().split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
