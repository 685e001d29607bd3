"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): a prefix with a gate that is initially closed.

A prefix takes part in the softmax over the text, and so disturbs the model from the first step. Here the prompt has its
own softmax, and a gate g, learned for each head, that starts at zero:

    y = W_proj ( softmax(q K^T / sqrt(hd) + mask) V + tanh(g) softmax(q K_a^T / sqrt(hd)) V_a )

K_a and V_a are computed from P learned vectors by the layer's own frozen projections. Initially tanh(0) = 0, so the
model is exactly the base model. Only the top layers have a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, Attention, KVCache, causal_attention, merge_heads
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.method import LearningRates, Method, hyperparameter
from lora_from_scratch.support.tape import Tape, TensorSize

BOTTOM_LAYERS_WITHOUT_PROMPT = 2  # the paper adapts 30 of LLaMA's 32 layers

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
    """Causal attention to the text, plus tanh(gate) times attention to the prompt, with a separate softmax for each.

    `softmax(q K^T / sqrt(hd) + mask) V + tanh(g) softmax(q K_a^T / sqrt(hd)) V_a` (Zhang et al. 2023, section 3.2).
    Every token sees the whole prompt. The weights on the text are not reduced to make room for it. Gradients flow to
    the prompt and the gate.

    Args:
        q, k, v: (B, H, T, hd), of the text.
        prompt_k, prompt_v: K_a and V_a, (1, H, P, hd), the same for every text, or (B, H, P, hd).
        gate: g, (1, H, 1, 1), one number per head; with zeros the result is `causal_attention(q, k, v)`.

    Returns:
        (B, H, T, hd), in the dtype of q, before the output projection.
    """
    return causal_attention(q, k, v) + torch.tanh(gate) * prompt_attention(q, prompt_k, prompt_v)


# --- The layer -----------------------------------------------------------------------------------------


class GatedPrefixAttention(nn.Module):
    """An attention layer with a gated prompt. The layer itself is kept, unchanged, as `base`.

    Args:
        base: the layer.
        num_virtual_tokens: P.
        as_peft: compute what PEFT computes on a GPT-2: one gate for all heads, no tanh, and the prompt's part is added
            after the output projection instead of before it. (On LLaMA, PEFT does apply the projection.)
        generator: the random number generator for the prompt; None: PyTorch's own.
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
        prompt = torch.randn(1, num_virtual_tokens, width, generator=generator)  # N(0, 1), as in the authors' code
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
        ValueError: a hyperparameter is out of range, or, in `adapt`, one does not fit the model.
    """

    num_virtual_tokens: int = hyperparameter(10, "number of virtual tokens prepended to the text")
    top_layers: int | None = hyperparameter(  # as in the paper
        None, "number of blocks with adapters, counted from the top; all but the lowest two if not given"
    )
    as_peft: bool = hyperparameter(False, "compute the adapter as PEFT does, which differs from the paper")
    seed: int = 0  # of the initial values

    name: ClassVar[str] = "llama-adapter"
    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    learning_rates: ClassVar[LearningRates] = LearningRates(
        8e-2, 1e-3, "9e-3 for a batch of 256 in OpenGVLab/LLaMA-Adapter, here of 32"
    )
    position: ClassVar[float] = 60
    use_when: ClassVar[str] = (
        "training has to start exactly as the base model although it attends to learned positions: the gate "
        "starts at zero"
    )
    needs_gpt2: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value in {"num_virtual_tokens": self.num_virtual_tokens, "top_layers": self.top_layers}.items():
            optional = name == "top_layers" and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

    def _install(self, model: GPT2) -> None:
        blocks = model.transformer.h
        default = max(1, len(blocks) - BOTTOM_LAYERS_WITHOUT_PROMPT)
        layers = default if self.top_layers is None else self.top_layers
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
        """PEFT's fields and keys. PEFT can load the result only with `as_peft`; otherwise the gates' shapes differ."""
        return llama_adapter_to_peft(self.num_virtual_tokens, self.state_dict(model))

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: GPT2
    ) -> tuple[LlamaAdapter, dict[str, Tensor]]:
        arguments, state = llama_adapter_from_peft(config, tensors)
        return cls(**arguments), state

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LlamaAdapter:
        layers = rng.choice([None, rng.randint(1, config.n_layer)])
        return cls(rng.randint(1, 4), layers, as_peft=rng.random() < 0.5)

    def starts_as_base(self) -> bool | None:
        return True


# --- How PEFT writes it -------------------------------------------------------------------------------------

_GATE = "adaption_gate"


def llama_adapter_to_peft(length: int, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's fields and tensors: (module).adaption_prompt and (module).adaption_gate."""
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "task_type": "CAUSAL_LM",
        "target_modules": "attn",
        "adapter_len": length,
        "adapter_layers": sum(name.endswith(_GATE) for name in state),
    }
    return config, {f"{adapter_files.PREFIX}{name}": tensor for name, tensor in state.items()}


def llama_adapter_from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of `LlamaAdapter`, and its state under our names. A single gate, (1,), indicates PEFT's variant.

    Raises:
        ValueError: a field is not supported.
    """
    adapter_files.refuse_unknown_fields(config, ("adapter_len", "adapter_layers", "target_modules"))
    adapter_files.refuse_other_values(config, "task_type", ("CAUSAL_LM", None))
    adapter_files.refuse_other_values(config, "target_modules", ("attn", None))
    arguments = {
        "num_virtual_tokens": config.get("adapter_len"),
        "top_layers": config.get("adapter_layers"),
        "as_peft": any(name.endswith(_GATE) and tensor.shape == (1,) for name, tensor in tensors.items()),
    }
    return arguments, {name.removeprefix(adapter_files.PREFIX): tensor for name, tensor in tensors.items()}


# --- Memory accounting: what it keeps for the backward pass ---------------------------------------------


@activations.forward.register
def _(module: GatedPrefixAttention, x: TensorSize, tape: Tape) -> TensorSize:
    base, prompt, gate = module.base, module.adaption_prompt, module.adaption_gate
    heads, length, d = base.n_head, prompt.shape[1], prompt.shape[2]
    qkv = activations.forward(base.c_attn, x, tape)
    own = activations.forward(base.c_attn, tape.parameter(prompt), tape)  # (P, 3 d)
    w, rows = qkv.width, tape.rows
    prompts = tape.batch * length
    saved = [
        activations.contiguous(qkv, tape, rows, d),
        *([activations.contiguous(own, tape, prompts, d)] if qkv.grad else []),
    ]
    weights = tape.nonlinearity(tape.like(tape.add([qkv, own], TensorSize(rows * heads, length, w), saved)))
    seen = tape.add([weights, own], TensorSize(rows, d, w), [weights, activations.contiguous(own, tape, prompts, d)])
    gated = tape.add([seen], TensorSize(rows, d, w), [seen], [gate])
    text = activations.attention(base, qkv, tape)
    if module.as_peft:
        return tape.sum(activations.forward(base.c_proj, text, tape), gated)
    return tape.dropout(activations.forward(base.c_proj, tape.sum(text, gated), tape), base.resid_dropout.p)
