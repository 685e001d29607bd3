"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): a learned past, in every layer.

A soft prompt is read by the blocks like text. A prefix goes further: in each layer l, P keys and values are
learned directly and stand in front of the text's own, as if the model had already read P tokens:

    softmax(q [P_K; K]^T / sqrt(hd) + mask) [P_V; V]

Learned directly this trains badly, say the authors; so for the training the prefix is made by a small MLP, which
is thrown away afterwards (their section 4.3):

    E: (P, d) -> Linear(d, m) -> tanh -> Linear(m, 2 L d)

A prefix of zeros is not "no prefix": a key of zeros has the score 0, and the softmax gives weight to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_from_scratch import peft_format
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, KVCache, causal_attention
from lora_from_scratch.method import Method
from lora_from_scratch.prompt_tuning import VirtualTokens, check_context, check_count

# --- The arithmetic ------------------------------------------------------------------------------------


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Causal attention in which every token also sees the prefix.

    Args:
        q, k, v: (B, H, T, hd), of the text.
        prefix_k, prefix_v: (1, H, P, hd), the same for every text, or (B, H, P, hd).

    Returns:
        (B, H, T, hd).
    """
    k = torch.cat([prefix_k.expand(len(k), -1, -1, -1), k], dim=2)  # (B, H, P + T, hd)
    v = torch.cat([prefix_v.expand(len(v), -1, -1, -1), v], dim=2)
    return causal_attention(q, k, v)


def split_prefix(prefix: Tensor, n_layer: int, n_head: int) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each layer.

    Args:
        prefix: (P, 2 L d). A row holds, for one virtual token, K of layer 0, V of layer 0, K of layer 1, ...

    Returns:
        L pairs, each tensor (1, H, P, hd).
    """
    length, width = prefix.shape
    parts = prefix.view(length, 2 * n_layer, n_head, width // (2 * n_layer * n_head))  # (P, 2L, H, hd)
    parts = parts.permute(1, 2, 0, 3)  # (2L, H, P, hd)
    return [(parts[2 * layer][None], parts[2 * layer + 1][None]) for layer in range(n_layer)]


# --- The modules ---------------------------------------------------------------------------------------


class PrefixCache(KVCache):
    """A past that is the same at every call: it shows the prefix in front of a text and does not keep the text."""

    grows = False

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        prefix_k, prefix_v = self.layers[layer]  # (B, H, P, hd)
        return torch.cat([prefix_k.to(k.dtype), k], dim=2), torch.cat([prefix_v.to(v.dtype), v], dim=2)


class PrefixEncoder(VirtualTokens):
    """The prefix of all layers, (P, 2 L d): learned directly, or made by an MLP from P learned embeddings.

    Args:
        config: of the model that it is for.
        length: P.
        hidden: m, the width of the MLP; None: no MLP (no reparametrisation).
        generator: where the first values come from (N(0, 1), and PyTorch's own for the MLP, as in PEFT); None:
            PyTorch's own.
    """

    def __init__(
        self, config: GPT2Config, length: int, hidden: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(length)
        self.n_layer, self.n_head = config.n_layer, config.n_head
        d, out = config.n_embd, 2 * config.n_layer * config.n_embd
        self.transform: nn.Module = nn.Identity()
        if hidden is None:
            self.embedding = nn.Parameter(torch.randn(length, out, generator=generator))  # (P, 2 L d)
        else:
            self.embedding = nn.Parameter(torch.randn(length, d, generator=generator))  # (P, d)
            self.transform = nn.Sequential(_linear(d, hidden, generator), nn.Tanh(), _linear(hidden, out, generator))

    def prefix(self) -> Tensor:
        """(P, 2 L d)."""
        made: Tensor = self.transform(self.embedding)
        return made

    def enter(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, KVCache | None]:
        """Nothing is put into the text: the prefix is what the model remembers before it begins to read."""
        batch = len(inputs_embeds)
        layers = [
            (k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1))
            for k, v in split_prefix(self.prefix(), self.n_layer, self.n_head)
        ]
        if cache is None:
            cache = PrefixCache(layers)
        else:
            cache.layers = layers
        return inputs_embeds, attention_mask, position_ids, cache


def fold_prefix(encoder: PrefixEncoder) -> Tensor:
    """The prefix itself, (P, 2 L d), as a new tensor: all that is needed once the training is over."""
    return encoder.prefix().detach().clone()


def _linear(n_in: int, n_out: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer with PyTorch's usual first values, U(+-1 / sqrt(in)), from a generator."""
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=generator)
    assert isinstance(layer, nn.Linear)
    return layer


# --- The method ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Prefix tuning (Li and Liang 2021). What is saved is the folded prefix: loaded, it has no MLP any more.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; or one that does not fit the model, in `adapt`.
    """

    num_virtual_tokens: int = 20
    reparametrise: bool = True
    hidden: int = 512  # m, with `reparametrise` (the paper's for table-to-text)
    seed: int = 0  # of the first values

    name: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"

    def __post_init__(self) -> None:
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        check_count("hidden", self.hidden)

    def _install(self, model: GPT2) -> None:
        check_context(self.num_virtual_tokens, model.config)
        generator = torch.Generator().manual_seed(self.seed)
        hidden = self.hidden if self.reparametrise else None
        encoder = PrefixEncoder(model.config, self.num_virtual_tokens, hidden, generator)
        weight = model.transformer.wte.weight
        encoder.to(weight.device, weight.dtype).put_into(model)

    def _uninstall(self, model: GPT2) -> None:
        VirtualTokens.take_out_of(model)

    def to_adapter(self, model: GPT2) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """PEFT's own fields and key, for the folded prefix."""
        self._adaptation(model)
        assert isinstance(model.virtual_tokens, PrefixEncoder)
        prefix = fold_prefix(model.virtual_tokens)
        return peft_format.virtual_tokens_to_peft(self.peft_type, self.num_virtual_tokens, prefix, model.config)

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: GPT2
    ) -> tuple[PrefixTuning, dict[str, Tensor]]:
        length, prefix = peft_format.virtual_tokens_from_peft(config, tensors, model.config)
        return cls(num_virtual_tokens=length, reparametrise=False), {"virtual_tokens.embedding": prefix}
