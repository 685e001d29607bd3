"""The folder for the learner's data: progress, and the capstone's entries.

There are two environment variables: LORA_FROM_SCRATCH_HOME sets another folder, and LORA_FROM_SCRATCH_PROGRESS=off
saves nothing to disk.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_from_scratch.support.figures import BUILDING

HOME = "LORA_FROM_SCRATCH_HOME"
SWITCH = "LORA_FROM_SCRATCH_PROGRESS"


def folder() -> Path:
    """The learner's folder: `~/.lora-from-scratch`, unless the environment sets another."""
    named = os.environ.get(HOME)
    return Path(named).expanduser() if named else Path(os.path.expanduser("~")) / ".lora-from-scratch"


def switched_off() -> bool:
    """Whether saving is disabled, by the environment variable or because the notebooks are being built."""
    off = os.environ.get(SWITCH, "").strip().lower() in ("off", "0", "no", "false")
    return off or bool(os.environ.get(BUILDING))
