"""The checks of the exercises; in a notebook: `from lora_from_scratch.checks import check, hint, ...`."""

from lora_from_scratch.checks.notebook import check, hint, join, leave, library, progress, working
from lora_from_scratch.support.translation import set_language

__all__ = ["check", "hint", "join", "leave", "library", "progress", "set_language", "working"]
