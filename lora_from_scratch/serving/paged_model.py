"""One forward pass for many requests: a packed batch, with keys, values and adapters in the pool.

The tokens of all requests are concatenated without padding: first one new token of each text that is being continued
(decoding), then the prompts of the requests that have just joined. All operations except attention treat each token
separately, so they run on all tokens at once. In attention, a decoding token uses the keys and values of its text
directly from the pool (`pool_rows.py`), and the tokens of a prompt attend to each other.

`paged_gpt2.py` and `paged_transformers.py` have the models.

Shapes: N tokens in the pass, n of them decoding, S tokens in the longest text, H query heads of width hd, G heads of
keys and of values (G = H unless the model has grouped-query attention).
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.serving.mixed_product import SEGMENT_FROM, LayerPlan, LayerRows, add_lora_, plan_layer
from lora_from_scratch.serving.packed_linear import PackedLinear
from lora_from_scratch.serving.page_pool import PagePool
from lora_from_scratch.serving.pool_rows import dot_products, weighted_sums


@dataclass(frozen=True)
class Text:
    """The input of one request to a forward pass.

    Attributes:
        tokens: the tokens that the model has not processed yet: a whole prompt, or one token.
        before: the number of tokens that it has already processed.
        pages: the pages of the text, with room for `tokens`.
        adapter: the adapter's rows in the pool; None for the base model.
    """

    tokens: Sequence[int]
    before: int
    pages: Sequence[int]
    adapter: LayerRows | None


class PagedModel(ABC):
    """A model that processes a batch of texts, each with its own adapter.

    A subclass computes everything that treats each token separately, and leaves two things to this class: `linear`, for
    the layers that adapters change, and `attend`.

    Args:
        layers: the linear layers that adapters may change, by name.
        pool: a pool with the layout for this model.
        heads: H, the number of query heads.
        head_width: hd.
    """

    def __init__(self, layers: Mapping[str, nn.Module], pool: PagePool, heads: int, head_width: int) -> None:
        self.pool, self.heads = pool, heads
        self.shared_heads = pool.layout.width // head_width  # G
        self.layers = {name: PackedLinear.of(layer) for name, layer in layers.items()}
        self.plans: dict[str, LayerPlan] = {}  # from the last pass
        self._planned_for: tuple[list[slice], list[LayerRows | None]] = ([], [])

    @torch.no_grad()
    def __call__(self, texts: Sequence[Text]) -> Tensor:
        """Process the tokens, store their keys and values, and return the logits of each text's next token.

        Args:
            texts: first the texts that are continued by one token, in the `order` of their adapters, then prompts.

        Returns:
            (texts, V), in float32.
        """
        batch = Batch(texts, self.pool, self.heads, self.shared_heads)
        self._plan(texts, batch)
        return self.logits(batch).float()

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """The logits (texts, V) after the last token of each text."""

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The linear layer of this name, with each token's adapter: (N, in) to (N, out)."""
        layer = self.layers[name]
        y: Tensor = layer(x)
        if name in self.plans:
            add_lora_(y, x, self.pool.data, self.plans[name], layer.bias)
        return y

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        """Store keys and values, and compute the causal attention within each text.

        Args:
            layer: the number of the block.
            q: (N, H, hd).
            k, v: (N, G, hd). If G is less than H, consecutive query heads share a head of keys and values.
            scale: the factor of q k^T before the softmax.

        Returns:
            (N, H hd).
        """
        layout = self.pool.layout
        first = 2 * layer * layout.tokens  # the row of the layer's first key within a page
        cells = self.pool.rows(layout.width)
        cells.index_copy_(0, batch.cells + first, k.flatten(1))
        cells.index_copy_(0, batch.cells + first + layout.tokens, v.flatten(1))
        mixed = q.new_empty(q.shape).flatten(1)
        if batch.decoding is not None:
            n = batch.decoding.texts
            mixed[:n] = batch.decoding.attend(q[:n], self.pool, layer, scale)
        for place in batch.prompts:
            own = [part[place].transpose(0, 1)[None] for part in (q, k, v)]  # (1, heads, T, hd)
            grouped = k.shape[1] < q.shape[1]
            result = F.scaled_dot_product_attention(
                own[0], own[1], own[2], is_causal=True, scale=scale, enable_gqa=grouped
            )
            mixed[place] = result[0].transpose(0, 1).flatten(1)
        return mixed

    def _plan(self, texts: Sequence[Text], batch: Batch) -> None:
        """Make a plan for each layer that an adapter changes. It is reused while the same texts are continued."""
        places, adapters = batch.prompts, [text.adapter for text in texts]
        same = len(adapters) == len(self._planned_for[1]) and all(map(operator.is_, adapters, self._planned_for[1]))
        if not same or places != self._planned_for[0]:
            gathered, segments = _split(texts, batch)
            made = {name: plan_layer(gathered, segments, name) for name in self.layers}
            self.plans = {name: plan for name, plan in made.items() if plan is not None}
            self._planned_for = places, adapters  # keeps the adapters alive, so the identity test is valid


def order(adapters: Sequence[LayerRows | None]) -> list[int]:
    """The best order for decoding texts: first those whose adapters are gathered, then those that form segments."""
    together: dict[int, list[int]] = {}
    for number, adapter in enumerate(adapters):
        together.setdefault(id(adapter), []).append(number)
    groups = sorted(together.values(), key=lambda group: len(group) >= SEGMENT_FROM and adapters[group[0]] is not None)
    return [number for group in groups for number in group]


def _split(texts: Sequence[Text], batch: Batch) -> tuple[list[LayerRows | None], list[tuple[slice, LayerRows]]]:
    """The adapters of the gathered tokens, and the segments: runs of tokens with the same adapter, and prompts."""
    gathered = len(texts) - len(batch.prompts)
    adapters = [text.adapter for text in texts[:gathered]]
    segments = []
    while gathered and adapters[gathered - 1] is not None:
        end = gathered
        while gathered and adapters[gathered - 1] is adapters[end - 1]:
            gathered -= 1
        if end - gathered < SEGMENT_FROM:
            gathered = end
            break
        segments.append((slice(gathered, end), adapters[end - 1]))
    prompts = zip(batch.prompts, texts[len(adapters) :], strict=True)
    segments += [(place, text.adapter) for place, text in prompts]
    return adapters[:gathered], [(place, adapter) for place, adapter in segments if adapter is not None]


class Batch:
    """The index tensors of a forward pass, which are the same for every layer.

    Attributes:
        tokens, positions: (N,), the ids of the tokens and their places in their texts.
        cells: (N,), where a token's keys are stored: a row of the pool, as wide as the keys, for the first layer.
        last: (texts,), the index of each text's last token.
        prompts: the tokens of each prompt.
        decoding: the attention of the texts that are continued; None if there are none.
    """

    def __init__(self, texts: Sequence[Text], pool: PagePool, heads: int, shared_heads: int) -> None:
        layout, device = pool.layout, pool.data.device
        n = sum(text.before > 0 for text in texts)
        tokens: list[int] = []
        positions: list[int] = []
        cells: list[int] = []
        last: list[int] = []
        self.prompts: list[slice] = []
        for text in texts:
            start = len(tokens)
            tokens += text.tokens
            last.append(len(tokens) - 1)
            for position in range(text.before, text.before + len(text.tokens)):
                page, inside = divmod(position, layout.tokens)
                positions.append(position)
                cells.append(text.pages[page] * 2 * layout.layers * layout.tokens + inside)
            if len(last) > n:
                self.prompts.append(slice(start, len(tokens)))
        integers = torch.tensor([tokens, positions, cells], device=device)
        self.tokens, self.positions, self.cells = integers  # each (N,); a cell is a row of the pool of width d
        self.last = torch.tensor(last, device=device)  # (texts,)
        self.decoding = _Decoding(texts[:n], pool, heads, shared_heads) if n else None


class _Decoding:
    """The attention of the decoding texts: one query per head, against the keys and values of its text.

    Here the pool is viewed as rows of width hd, so each head's key and each head's value is one row.
    """

    def __init__(self, texts: Sequence[Text], pool: PagePool, heads: int, shared_heads: int) -> None:
        layout, device = pool.layout, pool.data.device
        self.texts, self.shared_heads = len(texts), shared_heads
        lengths = torch.tensor([text.before + 1 for text in texts], device=device)
        position = torch.arange(int(lengths.max()), device=device)  # (S,)
        used = layout.pages_for_tokens(len(position))
        table = torch.tensor([[*text.pages[:used], *[0] * (used - len(text.pages))] for text in texts], device=device)
        cells = table[:, position // layout.tokens] * 2 * layout.layers * layout.tokens + position % layout.tokens
        own = (position < lengths[:, None])[:, None].expand(-1, heads, -1)  # (n, H, S)
        head = torch.arange(heads, device=device)[:, None] // (heads // shared_heads)
        self.keys = (cells[:, None] * shared_heads + head)[own]  # (entries,) rows of the pool, for the first layer
        self.ends = F.pad(lengths.repeat_interleave(heads).cumsum(0), (1, 0))  # (n H + 1,)
        self.places = own.flatten().nonzero().flatten()  # (entries,) the position of each score in `scores`
        self.scores = torch.full((len(texts) * heads, len(position)), -math.inf, device=device)

    def attend(self, q: Tensor, pool: PagePool, layer: int, scale: float) -> Tensor:
        """softmax(scale q k^T) v: (n, H, hd) to (n, H hd)."""
        rows = pool.rows(q.shape[-1])
        side = pool.layout.tokens * self.shared_heads  # rows of keys per layer and page
        keys = self.keys + 2 * layer * side
        q = (scale * q).flatten(0, 1)  # (n H, hd)
        self.scores.view(-1)[self.places] = dot_products(q, rows, self.ends, keys)
        weights = self.scores.softmax(dim=-1).view(-1)[self.places]
        return weighted_sums(weights, rows, self.ends, keys + side).view(self.texts, -1)
