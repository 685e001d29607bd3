"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): learned keys and values in every layer.

The blocks process a soft prompt like text. A prefix goes further: in each layer, P keys and values are learned directly
and prepended to those of the text, as if the model had already processed P tokens:

    softmax(q [P_K; K]^T / sqrt(hd) + mask) [P_V; V]

According to the authors, training the prefix directly is unstable. During training it is therefore computed by a small
MLP, which is discarded afterwards (their section 4.3):

    E: (P, d) -> Linear(d, m) -> tanh -> Linear(m, 2 L d)

A prefix of zeros is not the same as no prefix: a key of zeros has the score 0, and the softmax gives weight to it.
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
from lora_from_scratch.gpt2.model import GPT2, KVCache, causal_attention, causal_mask
from lora_from_scratch.methods.method import LearningRates, Method, hyperparameter
from lora_from_scratch.methods.prompt_peft import virtual_tokens_from_peft, virtual_tokens_to_peft
from lora_from_scratch.methods.prompt_tuning import VirtualTokens, check_context, check_count
from lora_from_scratch.support.tape import Tape, TensorSize

# --- The arithmetic ------------------------------------------------------------------------------------


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """Causal attention in which every token also sees the prefix (Li and Liang 2021, section 4.2).

    `softmax(q [P_K; K]^T / sqrt(hd) + mask) [P_V; V]`: the prefix precedes the text, so the causal mask hides none of
    it. There is a single softmax over both. Gradients flow to the prefix.

    Args:
        q, k, v: (B, H, T, hd), of the text; they need not be contiguous.
        prefix_k, prefix_v: (1, H, P, hd), the same for every text, or (B, H, P, hd), one for each text.

    Returns:
        (B, H, T, hd), in the dtype of q: the prefix has no queries and therefore no output.
    """
    k = torch.cat([prefix_k.expand(len(k), -1, -1, -1), k], dim=2)  # (B, H, P + T, hd)
    v = torch.cat([prefix_v.expand(len(v), -1, -1, -1), v], dim=2)
    return causal_attention(q, k, v)


def prefix_share(q: Tensor, k: Tensor, prefix_k: Tensor) -> Tensor:
    """The share of its attention that each token gives to the prefix, lambda (He et al. 2022, arXiv:2110.04366, 3.1).

    A token's softmax weights over the prefix and the part of the text that it may see sum to 1. Lambda is the sum of
    the weights on the prefix. It is finite even if the scores are so large that their exponentials overflow.

    Args:
        q, k: (B, H, T, hd), of the text.
        prefix_k: (1, H, P, hd), the same for every text, or (B, H, P, hd).

    Returns:
        (B, H, T), between 0 and 1, in the dtype of q.
    """
    keys = torch.cat([prefix_k.expand(len(k), -1, -1, -1), k], dim=2)  # (B, H, P + T, hd)
    scores = q @ keys.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, P + T)
    future = ~causal_mask(q.shape[2], keys.shape[2], q.device)
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    return weights[..., : prefix_k.shape[2]].sum(dim=-1)


def split_prefix(prefix: Tensor, n_layer: int, n_head: int) -> list[tuple[Tensor, Tensor]]:
    """Split a prefix in PEFT's layout into the keys and values of each layer.

    Args:
        prefix: (P, 2 L d). A row contains, for one virtual token, K of layer 0, V of layer 0, K of layer 1, V of
            layer 1, and so on, d numbers each. In each of them the heads are adjacent: hd numbers of head 0, then hd
            of head 1, up to d.
        n_layer: L.
        n_head: H.

    Returns:
        L pairs (K, V), each tensor (1, H, P, hd), in the dtype of the prefix: a batch of one, which can be expanded to
            any batch size. Gradients flow through them to the prefix.
    """
    length, width = prefix.shape
    parts = prefix.view(length, 2 * n_layer, n_head, width // (2 * n_layer * n_head))  # (P, 2L, H, hd)
    parts = parts.permute(1, 2, 0, 3)  # (2L, H, P, hd)
    return [(parts[2 * layer][None], parts[2 * layer + 1][None]) for layer in range(n_layer)]


def prefix_parameter_count(n_layer: int, n_embd: int, length: int, hidden: int | None = None) -> int:
    """The number of trained parameters: those of the prefix itself, or those of the embeddings and the MLP.

    Without the MLP they are the P keys and values of every layer. With it they are P embeddings and the two linear
    layers d -> m -> 2 L d, each with its bias; the prefix itself is then computed, not trained.

    Args:
        n_layer: L.
        n_embd: d.
        length: P.
        hidden: m, the width of the MLP, at least 1; None: no MLP.
    """
    width = 2 * n_layer * n_embd  # the prefix is (P, width)
    if hidden is None:
        return length * width
    return length * n_embd + hidden * (n_embd + 1) + width * (hidden + 1)


def seeded_linear(n_in: int, n_out: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer with PyTorch's default initialisation, U(+-1 / sqrt(n_in)) for both, drawn from a generator."""
    with torch.random.fork_rng(devices=[]):  # nn.Linear also draws from PyTorch's own generator: restore its state
        layer = nn.Linear(n_in, n_out)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=generator)
    return layer


# --- The modules ---------------------------------------------------------------------------------------


class PrefixCache(KVCache):
    """A cache with a fixed content: it prepends the prefix to a text and does not store the text."""

    grows = False

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        prefix_k, prefix_v = self.layers[layer]  # (B, H, P, hd)
        return torch.cat([prefix_k.to(k.dtype), k], dim=2), torch.cat([prefix_v.to(v.dtype), v], dim=2)


class PrefixEncoder(VirtualTokens):
    """The prefix of all layers, (P, 2 L d): learned directly, or computed by an MLP from P learned embeddings.

    Its attributes (the first two are named as in PEFT):

    - `embedding`, an `nn.Parameter`: without an MLP the prefix itself, (P, 2 L d); with an MLP (P, d). It is
      initialised from N(0, 1), each number by a draw of its own.
    - `transform`, a module that computes the prefix from it: without an MLP `nn.Identity()`; with an MLP the
      `nn.Sequential` of a linear layer from d to m, `nn.Tanh()` and a linear layer from m to 2 L d. The linear layers
      are made by `seeded_linear(n_in, n_out, generator)`.
    - `n_layer` and `n_head`, those of the model.

    `VirtualTokens.__init__` takes the length. The model calls `enter`, which is given, at the beginning of a text.

    Args:
        config: that of the model: L is its `n_layer`, d its `n_embd`.
        length: P.
        hidden: m, the width of the MLP; None: no MLP (no reparametrisation).
        generator: all random numbers are drawn from it, one after the other; None: PyTorch's own generator.
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
        """The current prefix, (P, 2 L d), with gradients flowing through it."""
        made: Tensor = self.transform(self.embedding)
        return made

    def enter(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, KVCache | None]:
        """Put the prefix into the cache; the text itself is unchanged."""
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
    """The prefix itself, which is all that is needed after training (Li and Liang 2021, section 4.3).

    Args:
        encoder: with or without an MLP; it is not modified and can be trained further.

    Returns:
        (P, 2 L d), in the dtype of the encoder. It is independent of the encoder: it is not part of a graph, and it
            does not change when the encoder does.
    """
    return encoder.prefix().detach().clone()


# --- The method ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Prefix tuning (Li and Liang 2021). Only the folded prefix is saved: after loading there is no MLP.

    Raises:
        ValueError: a hyperparameter is out of range, or, in `adapt`, one does not fit the model.
    """

    num_virtual_tokens: int = hyperparameter(20, "number of virtual tokens prepended to the text")
    reparametrise: bool = hyperparameter(True, "compute the prefix with an MLP during training (reparametrisation)")
    hidden: int = hyperparameter(
        512, "hidden width of the MLP that computes the prefix"
    )  # m (the paper's for table-to-text)
    seed: int = 0  # of the initial values

    name: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    learning_rates: ClassVar[LearningRates] = LearningRates(5e-3, 5e-5, "train_e2e.py in XiangLi1999/PrefixTuning")
    position: ClassVar[float] = 40
    use_when: ClassVar[str] = (
        "the weights must not be touched, and every layer may attend to a few learned positions, which take up context"
    )
    needs_gpt2: ClassVar[bool] = True

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
        """PEFT's fields and key, for the folded prefix."""
        self._adaptation(model)
        assert isinstance(model.virtual_tokens, PrefixEncoder)
        prefix = fold_prefix(model.virtual_tokens)
        return virtual_tokens_to_peft(self.peft_type, self.num_virtual_tokens, prefix, model.config)

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: GPT2
    ) -> tuple[PrefixTuning, dict[str, Tensor]]:
        length, prefix = virtual_tokens_from_peft(config, tensors, model.config)
        return cls(num_virtual_tokens=length, reparametrise=False), {"virtual_tokens.embedding": prefix}

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> PrefixTuning:
        return cls(rng.randint(1, 4), reparametrise=rng.random() < 0.5, hidden=rng.randint(1, 5))


# --- Memory accounting: what it keeps for the backward pass ---------------------------------------------


@activations.forward.register
def _(module: PrefixEncoder, x: TensorSize, tape: Tape) -> TensorSize:
    made = tape.parameter(module.embedding)
    if isinstance(module.transform, nn.Sequential):
        down, _, up = module.transform
        made = activations.forward(up, tape.nonlinearity(activations.forward(down, made, tape)), tape)
    tape.prefix = made  # (P, 2 L d): every block uses it, and it does not depend on x
    return x
