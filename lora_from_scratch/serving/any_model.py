"""The page layout and the forward pass for a model, which may be our GPT-2 or one of transformers."""

from __future__ import annotations

from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.placement import linear_layers
from lora_from_scratch.models.checkpoint import LanguageModel
from lora_from_scratch.serving.page_pool import PageLayout, PagePool
from lora_from_scratch.serving.paged_gpt2 import PagedGPT2
from lora_from_scratch.serving.paged_model import PagedModel
from lora_from_scratch.serving.paged_transformers import AttentionShape, PagedTransformers
from lora_from_scratch.support.linear_layers import in_and_out


def page_layout(model: LanguageModel) -> PageLayout:
    """The layout of the pool for a model.

    Raises:
        ValueError: the model is of a kind that cannot be served; see `AttentionShape.of`.
    """
    if isinstance(model, GPT2):
        return PageLayout.for_model(model.config)
    shape = AttentionShape.of(model.inside.config)
    widths = {width for layer in linear_layers(model.inside).values() for width in in_and_out(layer)}
    return PageLayout.for_widths(shape.layers, shape.shared_heads * shape.head_width, widths)


def paged_model(model: LanguageModel, pool: PagePool) -> PagedModel:
    """The model for the scheduler.

    Args:
        model: without adapters.
        pool: has the `page_layout` of this model.

    Raises:
        ValueError: the model is of a kind that cannot be served.
    """
    return PagedGPT2(model, pool) if isinstance(model, GPT2) else PagedTransformers(model, pool)
