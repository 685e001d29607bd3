"""Default training settings. The learning rate of each method is in the method's own file."""

from __future__ import annotations

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.registry import method_class
from lora_from_scratch.models.transformers_model import Shape

STEPS = 500
BATCH_SIZE = 8
WARMUP_FRACTION = 0.06
WEIGHT_DECAY = 0.01


def learning_rate_for(method: str, config: GPT2Config | Shape) -> float:
    """The tuned learning rate of a method, given by name, for a model of this size.

    Raises:
        ValueError: there is no such method.
    """
    return method_class(method).learning_rates.for_width(config.n_embd)


def warmup_steps_for(steps: int) -> int:
    return round(WARMUP_FRACTION * steps)
