"""The checks of the exercises; in a notebook: `from lora_from_scratch.checks import check, hint, ...`."""

from lora_from_scratch.checks.notebook import check, hint, join, leave, library, progress, working

__all__ = ["check", "hint", "join", "leave", "library", "progress", "working"]
