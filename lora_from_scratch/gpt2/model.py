"""GPT-2 (Radford et al. 2019), in the order in which the data flows.

Shapes: B sequences in the batch, T tokens in each, S tokens that can be attended to (S = T without a cache),
d = `n_embd`, H = `n_head`, hd = d / H, V = `vocab_size`. Modules and parameters have the same names as in Hugging
Face's checkpoints, so that state dicts can be exchanged without renaming.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2.config import GPT2Config

Sublayer = Callable[[Tensor], Tensor]  # a normalisation, the attention or the MLP of a block
IGNORE_INDEX = -100  # a label that the loss ignores (PyTorch's and Hugging Face's convention)


# --- The parts, as functions -----------------------------------------------------------------------


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """Split the last axis into heads and move the heads in front of the tokens.

    Args:
        x: (B, T, d); it need not be contiguous (queries, keys and values are slices of one wider tensor).
        n_head: the number of heads H, which divides d.

    Returns:
        (B, H, T, hd) with hd = d / H; head h has the columns h * hd to (h + 1) * hd - 1 of `x`.
    """
    batch, tokens, width = x.shape
    return x.view(batch, tokens, n_head, width // n_head).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """The inverse of `split_heads`: (B, H, T, hd) to (B, T, d)."""
    batch, n_head, tokens, head_width = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, n_head * head_width)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention in which no token sees a later one (Vaswani et al. 2017, eq. 1).

    `softmax(q k^T / sqrt(hd) + mask) v`, with the softmax over the keys, and a mask that is 0 where `causal_mask`
    lets a query see a key and minus infinity elsewhere. The last query is aligned with the last key, so with a cache
    (S > T) every query also sees the S - T cached keys. None of the inputs needs to be contiguous.

    Args:
        q: (B, H, T, hd), the queries.
        k: (B, H, S, hd), the keys, S >= T.
        v: (B, H, S, hd), the values.

    Returns:
        (B, H, T, hd).
    """
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # (B, H, T, S)
    future = ~causal_mask(q.shape[-2], k.shape[-2], q.device)  # (T, S)
    bias = torch.zeros_like(future, dtype=q.dtype).masked_fill(future, -math.inf)
    return torch.softmax(scores + bias, dim=-1) @ v


def causal_mask(tokens: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Which keys each query may see: its own position and the ones before it, never later ones.

    The last query is aligned with the last key: with S > T the first S - T keys come from a cache and precede all the
    queries.

    Args:
        tokens: T, the number of queries.
        keys: S, the number of keys, S >= T.
        device: the device of the mask; None: the CPU.

    Returns:
        (T, S) of booleans, True where query t may see key s. The last row is all True.
    """
    query_position = torch.arange(keys - tokens, keys, device=device)
    key_position = torch.arange(keys, device=device)
    return key_position[None, :] <= query_position[:, None]


def gelu(x: Tensor) -> Tensor:
    """GPT-2's activation: the tanh approximation of the Gaussian error linear unit, for any shape.

    `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` (Hendrycks and Gimpel 2016, section 2).
    """
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of predicting each token from the tokens before it.

    The logits at position t are compared with the label at t + 1: the shift happens here and nowhere else. Labels of
    -100 (`IGNORE_INDEX`) are ignored, both in the sum and in the number that it is divided by. All other labels of the
    batch have equal weight, whichever row they are in.

    Args:
        logits: (B, T, V).
        labels: (B, T), token ids or -100.

    Returns:
        A differentiable scalar; 0 if all labels are ignored.
    """
    targets = labels[:, 1:]
    counts = targets != IGNORE_INDEX  # (B, T - 1); only these rows of the logits are used
    total = F.cross_entropy(logits[:, :-1][counts].float(), targets[counts], reduction="sum")
    return total / counts.sum().clamp(min=1)


def transformer_block(x: Tensor, norm_1: Sublayer, attention: Sublayer, norm_2: Sublayer, mlp: Sublayer) -> Tensor:
    """One block of GPT-2: attention, then the MLP, each with its own normalisation (Radford et al. 2019, section 2.3).

    Each of the two takes the normalised residual stream as input, and its output is added to the stream itself, which
    is never normalised ("pre-norm"). The MLP's input includes what the attention has added.

    Args:
        x: (B, T, d), the residual stream; it is not modified.
        norm_1, attention, norm_2, mlp: functions from a (B, T, d) tensor to another. The first normalisation belongs
            to the attention, the second to the MLP.

    Returns:
        (B, T, d), the residual stream after the block.
    """
    x = x + attention(norm_1(x))
    return x + mlp(norm_2(x))


# --- The modules -----------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """`y = x W + b`: a linear layer whose weight is stored `(in, out)`, as in OpenAI's checkpoints.

    `nn.Linear` stores the transpose, `(out, in)`. Code that adapts a GPT-2 must take care of the difference.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)  # (..., in) -> (..., out)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class KVCache:
    """The keys and values of the tokens that the model has already processed, one pair per layer.

    With it a step of generation processes one token instead of the whole text: a token's keys and values depend only on
    that token and the ones before it, so they never change once computed.
    """

    grows = True  # whether `append` stores new tokens; if not, the cache can be used again for another forward pass

    def __init__(self, layers: list[tuple[Tensor, Tensor]] | None = None) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = list(layers or [])  # each (B, H, S, hd)

    def __len__(self) -> int:
        """The number of cached tokens."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens (B, H, T, hd); return all those of the layer (B, H, S, hd)."""
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            old_k, old_v = self.layers[layer]
            self.layers[layer] = (torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2))
        return self.layers[layer]

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order (beam search reorders its beams)."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]


class Attention(nn.Module):
    """Multi-head causal self-attention. `c_attn` computes queries, keys and values in a single product."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.layer = layer
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)  # [q | k | v] side by side on the output axis
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        q, k, v = self.project(x)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.resid_dropout(self.c_proj(merge_heads(self.attend(q, k, v, mask))))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, d) to queries, keys and values, each (B, H, T, hd)."""
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        return split_heads(q, self.n_head), split_heads(k, self.n_head), split_heads(v, self.n_head)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`causal_attention`, with dropout on its weights. Returns (B, H, T, hd).

        `mask` is (B, 1, T, S), True where a query may see a key; None means causal, with the last query seeing every
        key. PyTorch's fused kernel stores no (T, S) matrix. In bf16 on a CPU, however, its backward pass is slower
        than that of the explicit computation (`benchmarks/attention.py`), which is therefore used there.
        """
        dropout = self.attn_pdrop if self.training else 0.0
        learns = q.requires_grad or k.requires_grad
        if mask is None and not dropout and q.dtype == torch.bfloat16 and q.device.type == "cpu" and learns:
            return causal_attention(q, k, v)
        tokens, keys = q.shape[-2], k.shape[-2]
        if mask is None and 1 < tokens < keys:  # the kernel's own causal mask requires S = T
            mask = causal_mask(tokens, keys, q.device)
        causal = mask is None and tokens == keys
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


class MLP(nn.Module):
    """`W_proj gelu(W_fc x)`: d to 4d and back, for each token separately."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = Conv1D(config.n_embd, config.mlp_width)
        self.c_proj = Conv1D(config.mlp_width, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.c_fc(x), approximate="tanh")  # `gelu` above, in one kernel
        return self.resid_dropout(self.c_proj(hidden))


class Block(nn.Module):
    """One `transformer_block`, with its weights."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        return transformer_block(x, self.ln_1, lambda h: self.attn(h, mask, cache), self.ln_2, self.mlp)


class Embedding(nn.Embedding):
    """`nn.Embedding` that skips initialisation on the meta device (shapes without memory).

    There PyTorch would import its compiler to initialise nothing, which takes two seconds for every model loaded.
    """

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Transformer(nn.Module):
    """Token ids to hidden states: embeddings, blocks and a final normalisation."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class GPT2(nn.Module):
    """The language model. The output projection is the token embedding itself (tied weights).

    `gradient_checkpointing = True` trades time for memory: a block's activations are discarded after the forward pass
    and recomputed in the backward pass (Chen et al. 2016).
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.gradient_checkpointing = False
        self.virtual_tokens: nn.Module | None = None  # a method may prepend virtual tokens to every text
        if not self.transformer.wte.weight.is_meta:
            self.apply(self._initialise)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The logits of the next token at every position.

        Args:
            input_ids: (B, T) token ids.
            inputs_embeds: (B, T, d) token embeddings, before positions are added, instead of `input_ids`.
            attention_mask: (B, S), 1 for a token and 0 for padding, over cached and new tokens; None: no padding.
            position_ids: (B, T); None: derived from the mask (padding takes no position), or else from the cache.
            cache: used and extended in place; S is its length plus T.

        Returns:
            (B, T, V).

        Raises:
            ValueError: the text is longer than the context, or the mask does not cover it.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids (B, T) or inputs_embeds (B, T, d)")
            inputs_embeds = self.transformer.wte(input_ids)
        hidden = self.hidden_states(inputs_embeds, attention_mask, position_ids, cache)
        return F.linear(hidden, self.transformer.wte.weight)

    def hidden_states(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Map (B, T, d) embeddings to the (B, T, d) inputs of the output projection."""
        text = inputs_embeds.shape[1]
        if self.virtual_tokens is not None:
            inputs_embeds, attention_mask, position_ids, cache = self.virtual_tokens(
                inputs_embeds, attention_mask, position_ids, cache
            )
        tokens = inputs_embeds.shape[1]
        keys = tokens + (len(cache) if cache is not None else 0)
        context = self.transformer.wpe.num_embeddings
        if keys > context:
            raise ValueError(f"{keys} tokens exceed the model's context of {context}")
        if attention_mask is not None and attention_mask.shape != (len(inputs_embeds), keys):
            raise ValueError(
                f"attention_mask must have shape {(len(inputs_embeds), keys)}, one row per text and one column per "
                f"token (cached and new), got {tuple(attention_mask.shape)}"
            )
        if position_ids is None:
            position_ids = self._positions(attention_mask, tokens, keys, inputs_embeds.device)
        mask = self._attention_mask(attention_mask, tokens, keys, inputs_embeds.device)
        x = self.transformer.drop(inputs_embeds + self.transformer.wpe(position_ids))
        for block in self.transformer.h:
            if self.gradient_checkpointing and self.training and (cache is None or not cache.grows):
                x = torch.utils.checkpoint.checkpoint(block, x, mask, cache, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        if tokens > text:
            x = x[:, tokens - text :]  # (B, T, d): without the virtual tokens
        return self.transformer.ln_f(x)

    @staticmethod
    def _positions(attention_mask: Tensor | None, tokens: int, keys: int, device: torch.device) -> Tensor:
        if attention_mask is None:
            return torch.arange(keys - tokens, keys, device=device)[None]  # (1, T)
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens:]  # (B, T)

    @staticmethod
    def _attention_mask(attention_mask: Tensor | None, tokens: int, keys: int, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T, S) of booleans; None where plain causal attention is enough."""
        if attention_mask is None:
            return None
        causal = causal_mask(tokens, keys, device)[None, None]  # (1, 1, T, S)
        allowed = causal & attention_mask.bool()[:, None, None, :]
        # A padding query before its text may see no key at all; let it see itself, so that no softmax is 0 / 0.
        return allowed | torch.eye(keys, dtype=torch.bool, device=device)[keys - tokens :][None, None]

    def _initialise(self, module: nn.Module) -> None:
        """Initialise weights from Normal(0, 0.02) and biases with 0; the two projections into the residual stream are
        scaled by `1 / sqrt(2 n_layer)` (Radford et al. 2019, section 2.3)."""
        if isinstance(module, Conv1D | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, Attention | MLP):
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))
