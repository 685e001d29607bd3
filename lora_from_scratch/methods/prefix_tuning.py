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

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, KVCache, causal_attention, causal_mask
from lora_from_scratch.methods import adapter_files
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.prompt_tuning import VirtualTokens, check_context, check_count

# --- The arithmetic ------------------------------------------------------------------------------------


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Causal attention in which every token also sees the prefix (Li and Liang 2021, section 4.2).

    `softmax(q [P_K; K]^T / sqrt(hd) + mask) [P_V; V]`: the prefix stands in front of the text, so that the causal mask
    hides none of it, and there is one softmax over both.

    Args:
        q, k, v: (B, H, T, hd), of the text.
        prefix_k, prefix_v: (1, H, P, hd), the same for every text, or (B, H, P, hd).

    Returns:
        (B, H, T, hd): there are no queries of the prefix, and nothing comes out for it.
    """
    k = torch.cat([prefix_k.expand(len(k), -1, -1, -1), k], dim=2)  # (B, H, P + T, hd)
    v = torch.cat([prefix_v.expand(len(v), -1, -1, -1), v], dim=2)
    return causal_attention(q, k, v)


def prefix_share(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    """How much of its attention each token gives to the prefix, lambda (He et al. 2022, arXiv:2110.04366, section 3.1).

    The weights of one softmax, over the prefix and the part of the text that the token may see, add up to 1; this is
    the sum of those on the prefix. It says how much of what the layer did before is left: attention with a prefix is

        (1 - lambda) causal_attention(q, k, v) + lambda softmax(q P_K^T / sqrt(hd)) P_V

    Args:
        q, k: (B, H, T, hd), of the text.
        prefix_k: (1 or B, H, P, hd).

    Returns:
        (B, H, T), between 0 and 1.
    """
    keys = torch.cat([prefix_k.expand(len(k), -1, -1, -1), k], dim=2)  # (B, H, P + T, hd)
    scores = q @ keys.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, P + T)
    future = ~causal_mask(q.shape[2], keys.shape[2], q.device)
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    return weights[..., : prefix_k.shape[2]].sum(dim=-1)


def split_prefix(prefix: Tensor, n_layer: int, n_head: int) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each layer, cut out of a prefix as PEFT lays it out.

    Args:
        prefix: (P, 2 L d). A row holds, for one virtual token, K of layer 0, V of layer 0, K of layer 1, V of layer 1,
            ..., d numbers each; in each of them head h has the columns h * hd to (h + 1) * hd.
        n_layer: L.
        n_head: H.

    Returns:
        L pairs (K, V), each tensor (1, H, P, hd): a batch of one, which expands to any other.
    """
    length, width = prefix.shape
    parts = prefix.view(length, 2 * n_layer, n_head, width // (2 * n_layer * n_head))  # (P, 2L, H, hd)
    parts = parts.permute(1, 2, 0, 3)  # (2L, H, P, hd)
    return [(parts[2 * layer][None], parts[2 * layer + 1][None]) for layer in range(n_layer)]


def prefix_parameter_count(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    """How many numbers are trained: those of the prefix itself, or those of the MLP that makes it.

    Without the MLP they are the P keys and values of every layer. With it they are P embeddings, and the two linear
    layers d -> m -> 2 L d, each with its bias; the prefix itself is then not trained but computed. Once it is folded
    there is again the prefix alone, whatever made it.

    Args:
        n_layer: L.
        n_embd: d.
        length: P.
        hidden: m, the width of the MLP; None: the prefix is learned directly.

    Returns:
        A whole number.
    """
    width = 2 * n_layer * n_embd  # of the prefix: (P, width)
    if hidden is None:
        return length * width
    return length * n_embd + hidden * (n_embd + 1) + width * (hidden + 1)


def seeded_linear(n_in: int, n_out: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer with PyTorch's usual first values, weight and bias in U(+-1 / sqrt(n_in)), from a generator."""
    with torch.random.fork_rng(devices=[]):  # nn.Linear draws as well, from PyTorch's own generator: put that back
        layer = nn.Linear(n_in, n_out)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=generator)
    return layer


# --- The modules ---------------------------------------------------------------------------------------


class PrefixCache(KVCache):
    """A past that is the same at every call: it shows the prefix in front of a text and does not keep the text."""

    grows = False

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        prefix_k, prefix_v = self.layers[layer]  # (B, H, P, hd)
        return torch.cat([prefix_k.to(k.dtype), k], dim=2), torch.cat([prefix_v.to(v.dtype), v], dim=2)


class PrefixEncoder(VirtualTokens):
    """The prefix of all layers, (P, 2 L d): learned directly, or made by an MLP from P learned embeddings.

    Two things are in it, named as in PEFT:

    - `embedding`, an `nn.Parameter`: without an MLP the prefix itself, (P, 2 L d); with one, (P, d). It starts as
      normal numbers, N(0, 1).
    - `transform`, what makes the prefix of it: without an MLP `nn.Identity()`; with one the `nn.Sequential` of a linear
      layer from d to m, `nn.Tanh()` and a linear layer from m to 2 L d. The linear layers are `seeded_linear`.

    Everything is drawn from the generator, so that the same seed gives the same start.

    Args:
        config: of the model that it is for: L is its `n_layer`, H its `n_head`, d its `n_embd`.
        length: P.
        hidden: m, the width of the MLP; None: no MLP (no reparametrisation).
        generator: where the first values come from; None: PyTorch's own.

    `prefix()` returns the prefix as it is now, (P, 2 L d), and gradients flow through it. `enter` is what the model
    calls at the beginning of a text.
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
            self.transform = nn.Sequential(
                seeded_linear(d, hidden, generator), nn.Tanh(), seeded_linear(hidden, out, generator)
            )

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
    """The prefix itself: all that is needed once the training is over (Li and Liang 2021, section 4.3).

    Args:
        encoder: with an MLP or without one; it stays as it is, and can be trained on.

    Returns:
        (P, 2 L d), a tensor of its own: no gradient leads from it to the encoder, and it does not change when the
        encoder does.
    """
    return encoder.prefix().detach().clone()


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
