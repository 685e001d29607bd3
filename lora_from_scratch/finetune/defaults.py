"""What a method is trained with unless somebody says otherwise.

The learning rates for the bundled model come from the sweep in `benchmarks/learning_rates.md`, each method
tuned by itself on the validation cards. Those for larger models are from the authors' code, where they have one.
"""

from __future__ import annotations

from lora_from_scratch.gpt2.config import GPT2Config

LARGE = 512  # a width from which on a model is treated like GPT-2 small and not like the bundled one

# method: learning rate for the bundled model, for GPT-2 small and larger
LEARNING_RATES: dict[str, tuple[float, float]] = {
    "full": (2.5e-4, 5e-5),  # larger models: a usual choice, of no one paper
    "lora": (3e-3, 2e-4),  # larger models: GPT-2 medium on E2E in microsoft/LoRA
    "qlora": (3e-3, 2e-4),  # as LoRA; larger models: finetune_guanaco_7b.sh in artidoro/qlora
    "prompt": (3e-1, 1e-1),  # larger models: a guess; Lester et al. 2021 have 0.3, but with Adafactor
    "prefix": (5e-3, 5e-5),  # larger models: train_e2e.py in XiangLi1999/PrefixTuning
    "llama-adapter": (8e-2, 1e-3),  # larger models: 9e-3 for a batch of 256 in OpenGVLab/LLaMA-Adapter, here of 32
    "adapter": (1e-2, 3e-4),  # larger models: the example in google-research/adapter-bert
    "bitfit": (6e-2, 1e-3),  # larger models: run_glue.py in benzakenelad/BitFit
    "spafit": (1e-2, 2e-4),  # larger models: as LoRA
}

STEPS = 500
BATCH_SIZE = 8
WARMUP_FRACTION = 0.06
WEIGHT_DECAY = 0.01


def learning_rate_for(method: str, config: GPT2Config) -> float:
    """The tuned learning rate of a method on a model of this size.

    Raises:
        ValueError: nobody has tuned it.
    """
    if method not in LEARNING_RATES:
        raise ValueError(f"method {method} has no tuned learning rate; give one (--learning-rate)")
    small, large = LEARNING_RATES[method]
    return large if config.n_embd >= LARGE else small


def warmup_steps_for(steps: int) -> int:
    return round(WARMUP_FRACTION * steps)
