"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): a prefix behind a gate that starts shut.

A prefix takes part in the softmax of the text, and so disturbs the model from the first step on. Here the
prompt has a softmax of its own, and a gate g, learned for each head, that starts at zero:

    y = W_proj ( softmax(q K^T / sqrt(hd) + mask) V + tanh(g) softmax(q K_a^T / sqrt(hd)) V_a )

K_a and V_a are made by the layer's own frozen projections from P learned vectors. At the start tanh(0) = 0: the
model is the base model, exactly. Only the top layers have a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.model import GPT2, Attention, KVCache, causal_attention, merge_heads
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.method import Method

LOWEST_WITHOUT = 2  # layers at the bottom without a prompt: the paper adapts 30 of LLaMA's 32

# --- The arithmetic ------------------------------------------------------------------------------------


def prompt_attention(q: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
    """`softmax(q K_a^T / sqrt(hd)) V_a`: every token sees the whole prompt, and nothing else.

    Args:
        q: (B, H, T, hd).
        prompt_k, prompt_v: (1 or B, H, P, hd).

    Returns:
        (B, H, T, hd).
    """
    scores = q @ prompt_k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, P)
    return torch.softmax(scores, dim=-1) @ prompt_v


def gated_prefix_attention(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, gate: Tensor) -> Tensor:
    """Causal attention to the text, plus tanh(gate) times attention to the prompt, with a softmax each.

    `softmax(q K^T / sqrt(hd) + mask) V + tanh(g) softmax(q K_a^T / sqrt(hd)) V_a` (Zhang et al. 2023, section 3.2).
    Nothing of the prompt is hidden from any token, and the text's part is not made smaller to make room for it.

    Args:
        q, k, v: (B, H, T, hd), of the text.
        prompt_k, prompt_v: K_a and V_a, (1 or B, H, P, hd).
        gate: g, (1, H, 1, 1), one number for each head; with zeros the result is `causal_attention(q, k, v)` exactly.

    Returns:
        (B, H, T, hd), before the output projection.
    """
    return causal_attention(q, k, v) + torch.tanh(gate) * prompt_attention(q, prompt_k, prompt_v)


# --- The layer -----------------------------------------------------------------------------------------


class GatedPrefixAttention(nn.Module):
    """An attention layer with a gated prompt. The layer itself is kept, unchanged, as `base`.

    Args:
        base: the layer.
        num_virtual_tokens: P.
        as_peft: compute what PEFT computes on a GPT-2: one gate for all heads, without the tanh, and the prompt's
            part is added behind the output projection instead of before it. (On LLaMA PEFT does project.)
        generator: where the prompt's random numbers come from; None: PyTorch's own.
    """

    def __init__(
        self,
        base: Attention,
        num_virtual_tokens: int,
        *,
        as_peft: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.as_peft = as_peft
        width = base.c_proj.out_features  # d
        prompt = torch.randn(1, num_virtual_tokens, width, generator=generator)  # N(0, 1), as the authors' code
        bias = base.c_attn.bias
        self.adaption_prompt = nn.Parameter(prompt.to(bias.device, bias.dtype))  # (1, P, d)
        gate = torch.zeros(1) if as_peft else torch.zeros(1, base.n_head, 1, 1)
        self.adaption_gate = nn.Parameter(gate.to(bias.device, bias.dtype))
        self.train(base.training)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        base = self.base
        q, k, v = base.project(x)  # each (B, H, T, hd)
        if cache is not None:
            k, v = cache.append(base.layer, k, v)
        _, prompt_k, prompt_v = base.project(self.adaption_prompt)  # each (1, H, P, hd)
        text, prompt = base.attend(q, k, v, mask), prompt_attention(q, prompt_k, prompt_v)  # (B, H, T, hd)
        if self.as_peft:
            return base.resid_dropout(base.c_proj(merge_heads(text))) + self.adaption_gate * merge_heads(prompt)
        y = text + torch.tanh(self.adaption_gate) * prompt
        return base.resid_dropout(base.c_proj(merge_heads(y)))

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.adaption_prompt.shape[1]}, as_peft={self.as_peft}"


# --- The method ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaAdapter(Method):
    """LLaMA-Adapter on a GPT-2. See `GatedPrefixAttention` for `as_peft`, which files written by PEFT need.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; or one that does not fit the model, in `adapt`.
    """

    num_virtual_tokens: int = 10
    top_layers: int | None = None  # how many, from the top; None: all but the lowest two, as in the paper
    as_peft: bool = False
    seed: int = 0  # of the first values

    name: ClassVar[str] = "llama-adapter"
    peft_type: ClassVar[str] = "ADAPTION_PROMPT"

    def __post_init__(self) -> None:
        for name, value in {"num_virtual_tokens": self.num_virtual_tokens, "top_layers": self.top_layers}.items():
            optional = name == "top_layers" and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

    def _install(self, model: GPT2) -> None:
        blocks = model.transformer.h
        layers = max(1, len(blocks) - LOWEST_WITHOUT) if self.top_layers is None else self.top_layers
        if layers > len(blocks):
            raise ValueError(
                f"top_layers must be between 1 and {len(blocks)}, the model's number of layers, got {layers}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        for block in list(blocks)[-layers:]:
            base = block.attn
            assert isinstance(base, Attention)
            block.attn = GatedPrefixAttention(base, self.num_virtual_tokens, as_peft=self.as_peft, generator=generator)

    def _uninstall(self, model: GPT2) -> None:
        for block in model.transformer.h:
            if isinstance(block.attn, GatedPrefixAttention):
                block.attn = block.attn.base

    def to_adapter(self, model: GPT2) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and keys. PEFT itself can read it only with `as_peft`; else it finds other gates."""
        return peft_format.llama_adapter_to_peft(self.num_virtual_tokens, self.state_dict(model))

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: GPT2
    ) -> tuple[LlamaAdapter, dict[str, Tensor]]:
        arguments, state = peft_format.llama_adapter_from_peft(config, tensors)
        return cls(**arguments), state
