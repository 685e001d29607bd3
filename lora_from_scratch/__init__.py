"""Parameter-efficient fine-tuning, built from scratch, on a GPT-2 that fits on a laptop."""

__version__ = "0.1.0"
