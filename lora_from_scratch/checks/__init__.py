"""The checks of the exercises; in a notebook: `from lora_from_scratch.checks import check, hint, ...`."""

from lora_from_scratch.checks.in_room import join, leave
from lora_from_scratch.checks.notebook import check, hint, library, progress, working

__all__ = ["check", "hint", "join", "leave", "library", "progress", "working"]
