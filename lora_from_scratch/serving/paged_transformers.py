"""The forward pass of a model of transformers on a packed batch.

The model's own code computes everything but attention and linear layers. Transformers lets a model call an attention
function that is registered under a name. It is called with queries and keys to which the positions have already been
applied, so the same function serves every architecture whose attention only differs in that (Llama, Qwen, GPT-NeoX and
others; vLLM's transformers backend works in the same way). All tokens of a batch are passed as one sequence, with the
position of each token in its own text.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_from_scratch.methods.placement import linear_layers, output_head
from lora_from_scratch.models.transformers_model import TransformersModel
from lora_from_scratch.serving.packed_linear import PackedLinear
from lora_from_scratch.serving.page_pool import PagePool
from lora_from_scratch.serving.paged_model import Batch, PagedModel, Text
from lora_from_scratch.serving.shared_weights import twin_of

ATTENTION = "lora_from_scratch_paged"  # the name under which the attention function is registered
TRIAL = 5  # tokens in the prompt with which a model is tried
TOLERANCE = 1e-3  # the largest difference in that trial, relative to the largest logit


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of a model's attention."""

    layers: int
    heads: int  # H
    shared_heads: int  # G: the heads of keys, and as many of values
    head_width: int  # hd

    @classmethod
    def of(cls, config: Any) -> AttentionShape:
        """Read the sizes from a configuration of transformers.

        Raises:
            ValueError: a layer does not attend to the whole text, which the server does not support.
        """
        text = config.get_text_config()
        kinds = getattr(text, "layer_types", None)  # absent where all layers are of the same kind
        window = getattr(text, "sliding_window", None) if kinds is None else None
        others = sorted(set(kinds or ()) - {"full_attention"})
        if window is not None and window < text.max_position_embeddings:
            others = [f"a window of {window} tokens"]
        if others:
            raise ValueError(
                f"the server cannot run a model of type {text.model_type!r}: it has layers with {', '.join(others)}, "
                "and the server supports only attention to the whole text"
            )
        heads = text.num_attention_heads
        shared = getattr(text, "num_key_value_heads", None) or heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(text.num_hidden_layers, heads, shared, width)


class PagedTransformers(PagedModel):
    """A causal language model of transformers that processes a batch of texts, each with its own adapter.

    Args:
        model: a model without adapters. It is not modified.
        pool: a pool with the layout for this model.

    Raises:
        ValueError: the model cannot be served, because its attention needs more than queries, keys and values.
    """

    def __init__(self, model: TransformersModel, pool: PagePool) -> None:
        shape = AttentionShape.of(model.inside.config)
        super().__init__(linear_layers(model.inside), pool, shape.heads, shape.head_width)
        self.inside: Any = self._prepared(twin_of(model.inside.eval()))
        self._short = "logits_to_keep" in inspect.signature(self.inside.forward).parameters
        self._batch: Batch | None = None
        self._attended: list[int] = []  # the layers whose attention has been computed in this pass
        self._try(model, shape)

    def logits(self, batch: Batch) -> Tensor:
        self._batch, self._attended = batch, []
        options = {"logits_to_keep": batch.last} if self._short else {}
        output = self.inside(batch.tokens[None], position_ids=batch.positions[None], use_cache=False, **options)
        logits: Tensor = output.logits[0]  # (texts, V), or (N, V)
        return logits if self._short else logits[batch.last]

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """What the model calls: (1, heads, N, hd) each, to (1, N, H, hd)."""
        assert self._batch is not None
        self._attended.append(layer)
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # (N, heads, hd)
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return self.attend(layer, q, k, v, self._batch, scale).unflatten(-1, (self.heads, -1))[None]

    def _prepared(self, twin: Any) -> Any:
        """Let a copy of the model call this object for its linear layers and its attention."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        head = output_head(twin)
        for name, module in list(twin.named_modules()):
            if name in self.layers:
                twin.set_submodule(name, _Linear(self, name))
            elif module is head:
                twin.set_submodule(name, PackedLinear.of(module))
            elif isinstance(getattr(module, "layer_idx", None), int):
                module.__dict__["paged"] = self  # not registered as a submodule
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
        twin.config._attn_implementation = ATTENTION
        return twin

    def _try(self, model: TransformersModel, shape: AttentionShape) -> None:
        """Refuse a model whose logits for a short prompt and one more token differ from those of transformers."""
        pages = self.pool.allocate(self, self.pool.layout.pages_for_tokens(TRIAL + 1))
        tokens = [(7 * number + 3) % model.config.vocab_size for number in range(TRIAL + 1)]
        try:
            found = [
                self([Text(tokens[:TRIAL], 0, pages, None)])[0],
                self([Text(tokens[TRIAL:], TRIAL, pages, None)])[0],
            ]
        except (TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(self._refusal(model, str(error).splitlines()[0])) from None
        finally:
            self.pool.release(self)
        if self._attended != list(range(shape.layers)):
            raise ValueError(self._refusal(model, "its attention cannot be replaced"))
        with torch.no_grad():
            wanted = model(torch.tensor([tokens], device=self.pool.data.device))[0, TRIAL - 1 :].float()
        if not torch.allclose(torch.stack(found), wanted, rtol=0, atol=TOLERANCE * float(wanted.abs().max())):
            raise ValueError(self._refusal(model, "its attention does more than softmax(scale q k^T) v"))

    @staticmethod
    def _refusal(model: TransformersModel, why: str) -> str:
        return f"the server cannot run a model of type {model.inside.config.model_type!r}: {why}"


class _Linear(nn.Module):
    """Stands in for a linear layer of the model."""

    def __init__(self, paged: PagedModel, name: str) -> None:
        super().__init__()
        self._computed_by = paged.linear, name  # in a tuple, so that it is not registered as a submodule

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), with N tokens in all."""
        linear, name = self._computed_by
        return linear(name, x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """The interface of transformers' attention functions: the output and, where they are wanted, the weights."""
    return module.paged.attention(module.layer_idx, query, key, value, scaling), None
