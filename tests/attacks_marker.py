"""`marking.mark_file` with small limits: the attacks should not take an hour. It fits `tasks.MarkingJob.marker`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading.graded import Graded
from lora_from_scratch.grading.marking import Settings
from lora_from_scratch.grading.marking import mark_file as real
from lora_from_scratch.grading.sandbox import Limits

MIB = 2**20
LIMITS = Limits(memory=512 * MIB, seconds=40, cell_seconds=5, patience=1.5, folder=64 * MIB, file=32 * MIB, files=5_000)


def mark_file(
    path: Path, released: Any, unit: Unit, learner: str, secret: str, settings: Settings, *, key: str = ""
) -> Graded:
    return real(path, released, unit, learner, secret, dataclasses.replace(settings, limits=LIMITS), key=key)
