"""The forward pass of our GPT-2 on a packed batch.

All operations except attention treat each token separately, so they run on the tokens of all requests at once, without
a batch dimension: x has the shape (N, d).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.placement import linear_layers
from lora_from_scratch.serving.packed_linear import PackedLinear
from lora_from_scratch.serving.page_pool import PagePool
from lora_from_scratch.serving.paged_model import Batch, PagedModel


class PagedGPT2(PagedModel):
    """A GPT-2 that processes a batch of texts, each with its own adapter.

    Args:
        model: a model without adapters. It is set to eval mode and not modified otherwise.
        pool: a pool with the layout for this model.
    """

    def __init__(self, model: GPT2, pool: PagePool) -> None:
        heads = model.config.n_head
        super().__init__(linear_layers(model), pool, heads, head_width=model.config.n_embd // heads)
        self.model = model.eval()
        self.head = PackedLinear(model.transformer.wte.weight)

    def logits(self, batch: Batch) -> Tensor:
        transformer = self.model.transformer
        x = transformer.wte(batch.tokens) + transformer.wpe(batch.positions)  # (N, d)
        block: Any
        for number, block in enumerate(transformer.h):
            name = f"transformer.h.{number}"
            qkv = self.linear(f"{name}.attn.c_attn", block.ln_1(x))  # (N, 3 d)
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(dim=1)  # each (N, H, hd)
            mixed = self.attend(number, q, k, v, batch, scale=1 / math.sqrt(q.shape[-1]))
            x = x + self.linear(f"{name}.attn.c_proj", mixed)
            hidden = F.gelu(self.linear(f"{name}.mlp.c_fc", block.ln_2(x)), approximate="tanh")
            x = x + self.linear(f"{name}.mlp.c_proj", hidden)
        return self.head(transformer.ln_f(x[batch.last]))
