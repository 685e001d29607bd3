"""LongLoRA (Chen et al. 2023, arXiv:2309.12307): LoRA for longer contexts, trained with attention within groups.

In training, attention is computed within groups of g tokens, which costs g T instead of T^2 (shifted sparse attention,
S2-Attn, section 3.2):

    first half of the heads:   [0, g), [g, 2 g), ...                 each causal, none sees another
    second half:               [0, g/2), [g/2, 3 g/2), ...           shifted by half a group

Tokens on either side of a group's border in one half of the heads share a group in the other half. Evaluation and
generation use full attention. LoRA alone is not sufficient for longer contexts, so embeddings and normalisation layers
are trained as well (section 3.3).

The shift is a roll of the tokens by -g/2, which places the first g/2 tokens after the last g/2 in one group. With the
causal mask of the group alone, the first tokens of the text would attend to the last ones (as in forward_noflashattn of
dvlab-research/LongLoRA): a leak from the future. Here the two ends do not attend to each other (as in its
forward_flashattn).

The paper's models have rotary positions and are extended by position interpolation. GPT-2 learns an embedding of each
position; its table is extended to `factor` times as many rows by linear interpolation, and then trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2 import activations
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import Attention, Embedding
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import LearningRates, hyperparameter
from lora_from_scratch.methods.placement import random_targets
from lora_from_scratch.support.tape import Tape, TensorSize

# --- Attention in groups ---------------------------------------------------------------------------------


def shifted_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, group_size: int, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Causal attention in groups of g tokens, shifted by g // 2 in the second half of the heads.

    If g does not divide the number of tokens, the last group is shorter.

    Args:
        q, k, v: (B, H, T, hd).
        group_size: g, at least 1.
        mask: (B or 1, 1, T, T), True where a query may attend to a key; None: the groups and causality decide alone.
        dropout: dropout rate of the attention weights.

    Returns:
        (B, H, T, hd).
    """
    heads, tokens = q.shape[1:3]
    q, k, v = (to_groups(x, group_size) for x in (q / math.sqrt(q.shape[-1]), k, v))  # (B, H, n, g, hd)
    hidden = ~_allowed(heads, q.shape[2], group_size, mask, q.device)  # (B or 1, H, n, g, g)
    bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -math.inf)
    weights = torch.softmax(q @ k.transpose(-2, -1) + bias, dim=-1)
    return from_groups(F.dropout(weights, dropout) @ v, tokens)


def to_groups(x: Tensor, group_size: int) -> Tensor:
    """Cut the tokens of each head into groups of g (LongLoRA, section 3.2).

    The first H // 2 heads have the tokens in their order. In the other heads they are rolled: each moves g // 2 places
    to the front, and the first g // 2 move to the end.

    Zeros are appended first if g does not divide T. They are rolled like tokens.

    Args:
        x: (B, H, T, hd), the queries, keys or values of H heads.
        group_size: g, at least 1.

    Returns:
        (B, H, n, g, hd), n groups, so that n g is the smallest multiple of g that is at least T.
    """
    x = F.pad(x, (0, 0, 0, -x.shape[2] % group_size))
    half = x.shape[1] // 2
    x = torch.cat([x[:, :half], x[:, half:].roll(-(group_size // 2), dims=2)], dim=1)
    return x.unflatten(2, (-1, group_size))


def from_groups(x: Tensor, tokens: int) -> Tensor:
    """The inverse of `to_groups`: every token in its place again, and what was appended left out.

    Args:
        x: (B, H, n, g, hd), cut and rolled as by `to_groups`.
        tokens: T, the number of tokens of the text.

    Returns:
        (B, H, T, hd).
    """
    half, group_size = x.shape[1] // 2, x.shape[3]
    x = x.flatten(2, 3)
    return torch.cat([x[:, :half], x[:, half:].roll(group_size // 2, dims=2)], dim=1)[:, :, :tokens]


def allowed_in_groups(heads: int, groups: int, group_size: int) -> Tensor:
    """Whether a query may attend to a key of its group, with the tokens in the order of `to_groups`.

    A query may attend to the keys of its group that come no later in the text, itself among them.

    In the first heads // 2 heads a group is a piece of the text. So it is in the other heads, but for the last group:
    it has the end of the text, and then its first g // 2 tokens. Those two pieces do not attend to each other.

    Args:
        heads: H.
        groups: n.
        group_size: g.

    Returns:
        (H, n, g, g), boolean: entry (h, i, q, k) is True if, in head h and group i, query q may attend to key k.
    """
    causal = torch.ones(group_size, group_size, dtype=torch.bool).tril()
    allowed = causal.repeat(heads, groups, 1, 1)
    end = group_size - group_size // 2
    allowed[heads // 2 :, -1, end:, :end] = False
    return allowed


def _allowed(heads: int, groups: int, group_size: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, H, n, g, g): `allowed_in_groups`, and the mask allows it too."""
    allowed = allowed_in_groups(heads, groups, group_size).to(device)[None]
    if mask is None:
        return allowed
    both = mask.expand(-1, heads, -1, -1)
    rows = to_groups(both, group_size)  # (B, H, n, g, T): the queries in groups
    columns = to_groups(rows.flatten(2, 3).transpose(2, 3), group_size)  # then the keys
    blocks = columns.unflatten(-1, (-1, group_size)).diagonal(dim1=2, dim2=4)  # (B, H, g keys, g queries, n)
    # Padding attends to itself, so that no softmax is 0 / 0.
    return (allowed & blocks.permute(0, 1, 4, 3, 2)) | torch.eye(group_size, dtype=torch.bool, device=device)


class ShiftedSparseAttention(Attention):
    """A block's attention, computed in `groups` groups during training; it shares the submodules of the original."""

    def __init__(self, attention: Attention, groups: int) -> None:
        nn.Module.__init__(self)
        self.n_head, self.layer, self.attn_pdrop = attention.n_head, attention.layer, attention.attn_pdrop
        self.c_attn, self.c_proj, self.resid_dropout = attention.c_attn, attention.c_proj, attention.resid_dropout
        self.groups = groups
        self.train(attention.training)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        tokens = q.shape[2]
        if not self.training or tokens != k.shape[2]:
            return super().attend(q, k, v, mask)
        return shifted_sparse_attention(q, k, v, self.group_size(tokens), mask, self.attn_pdrop)

    def group_size(self, tokens: int) -> int:
        """g, for a text of this length."""
        return -(-tokens // self.groups)

    def extra_repr(self) -> str:
        return f"groups={self.groups}"


# --- Positions -------------------------------------------------------------------------------------------


def stretch_positions(table: Tensor, factor: int) -> Tensor:
    """A table of position embeddings for a context that is `factor` times as long, by linear interpolation.

    The new table has the first and the last row of the old one at its ends, and all its rows are at equal distances in
    between: a row that falls between two old ones is a mixture of the two, each the more the closer it is.

    Args:
        table: (n, d), n at least 2.
        factor: a whole number, at least 1.

    Returns:
        (factor n, d), in the dtype of the table.
    """
    stretched = F.interpolate(table.T[None].float(), scale_factor=factor, mode="linear", align_corners=True)
    return stretched[0].T.to(table)


# --- The method ------------------------------------------------------------------------------------------

_BEFORE = "long_lora_before"  # attribute of an adapted model: the replaced parts


@dataclass
class Before:
    """The parts of the base that were replaced."""

    config: GPT2Config
    positions: nn.Module
    attentions: list[nn.Module]


@dataclass(frozen=True)
class LongLoRA(LoRA):
    """LongLoRA on a GPT-2; see the module. The context of the adapted model is `factor` times as long.

    The paper calls LoRA with trained embeddings and normalisation "LoRA+", which is not the LoRA+ of Hayou et al.
    (`lora_plus.py`). GPT-2's output head is tied to its token embedding and is trained with it.

    With one group, training uses full attention too. A merged copy keeps the longer context and uses full attention.

    Raises:
        ValueError: a hyperparameter is out of range, or `modules_to_save` or `trainable_token_indices` are given while
            embeddings and norms are trained (raised by the constructor); otherwise as for `LoRA`.
    """

    rank: int = hyperparameter(8, "rank r of the update B A")
    factor: int = hyperparameter(2, "factor by which the context is extended")
    groups: int = hyperparameter(4, "number of groups of tokens for attention in training")
    embeddings_and_norms: bool = hyperparameter(True, "also train embeddings and normalisation layers")

    name: ClassVar[str] = "long-lora"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_LONGLORA"  # PEFT has no such method
    learning_rates: ClassVar[LearningRates] = LearningRates(
        3e-4, 2e-5, "LLaMA-2 in dvlab-research/LongLoRA; bundled: benchmarks/learning_rates.md"
    )
    position: ClassVar[float] = 19
    use_when: ClassVar[str] = "texts have to be longer than the model's context; on short texts it has no advantage"
    needs_gpt2: ClassVar[bool] = True
    only_on_request: ClassVar[frozenset[str]] = frozenset({"long-lora"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("factor", "groups"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("modules_to_save", "trainable_token_indices"):
            if self.embeddings_and_norms and getattr(self, name):
                raise ValueError(
                    f"{name} must be empty where embeddings and norms are trained, got {getattr(self, name)!r}; "
                    "or set embeddings_and_norms to false"
                )

    def _install(self, model: Any) -> None:
        super()._install(model)
        body = model.transformer
        blocks: list[Any] = list(body.h)
        model.__dict__[_BEFORE] = Before(model.config, body.wpe, [block.attn for block in blocks])
        if self.groups > 1:  # one group would still be shifted in half of the heads, and so cut in two there
            for block in blocks:
                block.attn = ShiftedSparseAttention(block.attn, self.groups)
        if self.factor > 1:
            table = body.wpe.weight.detach()
            body.wpe = Embedding(self.factor * len(table), table.shape[1], device="meta").train(body.wpe.training)
            body.wpe.weight = nn.Parameter(stretch_positions(table, self.factor), requires_grad=False)
            model.config = replace(model.config, n_positions=self.factor * len(table))
        if self.embeddings_and_norms:
            norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
            for module in (body.wte, body.wpe, *norms):
                module.requires_grad_(True)

    def _uninstall(self, model: Any) -> None:
        before: Before = model.__dict__.pop(_BEFORE)
        for block, attention in zip(model.transformer.h, before.attentions, strict=True):
            block.attn = attention.train(block.training)
        if not self._adaptation(model).merged:  # a merged copy keeps the longer context
            model.config = before.config
            model.transformer.wpe = before.positions.to(model.transformer.wpe.weight)
        super()._uninstall(model)

    def trains_of_base(self) -> str:
        return "some" if self.embeddings_and_norms else super().trains_of_base()

    def starts_as_base(self) -> bool | None:
        return self.factor == 1

    def to_adapter(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Our own fields and names."""
        return super(LoRA, self).to_adapter(model)

    @classmethod
    def from_adapter(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        return super(LoRA, cls).from_adapter(config, tensors, model)

    @classmethod
    def sample(cls, rng: Random, config: GPT2Config) -> LoRA:
        full = rng.random() < 0.5
        return cls(
            rank=rng.randint(1, 2),
            alpha=rng.uniform(0.1, 20),
            targets=random_targets(rng, with_parts=True),
            dropout=rng.choice([0.0, 0.1]),
            factor=rng.randint(1, 3),
            groups=rng.randint(1, 4),
            embeddings_and_norms=full,
            seed=rng.randint(0, 99),
            **({} if full else cls.random_parts(rng)),
        )


# --- What it keeps for the backward pass -------------------------------------------------------------------


@activations.forward.register
def _(module: ShiftedSparseAttention, x: TensorSize, tape: Tape) -> TensorSize:
    qkv = activations.forward(module.c_attn, x, tape)
    d, w, group = qkv.columns // 3, qkv.width, module.group_size(tape.tokens)
    padded = tape.batch * -(-tape.tokens // group) * group  # rows, with what fills up the last group
    split = tape.like(qkv)
    q, k, v = (tape.add([split], TensorSize(padded, d, w)) for _ in range(3))
    scores = tape.add([q, k], TensorSize(padded * module.n_head, group, w), [q, k])
    biased = tape.sum(scores, TensorSize(padded * module.n_head, group, w))
    weights = tape.dropout(tape.nonlinearity(biased), module.attn_pdrop, noise_width=w)
    y = tape.add([weights, v], TensorSize(padded, d, w), [weights, v])
    y = tape.add([y], TensorSize(tape.rows, d, w))
    return tape.dropout(activations.forward(module.c_proj, y, tape), module.resid_dropout.p)
