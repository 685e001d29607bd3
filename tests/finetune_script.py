"""The command `finetune` as a separate program with a short evaluation; it prints which process saves the adapter."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_from_scratch.cli import main
from lora_from_scratch.methods.lora import LoRA
from tests.tiny_runs import shorten_evaluation

whole = LoRA.save


def save(self: LoRA, model: Any, directory: Path, **more: Any) -> None:
    print(f"saved by {os.environ.get('RANK', 'nobody else')}", flush=True)
    whole(self, model, directory, **more)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        shorten_evaluation(patch)
        patch.setattr(LoRA, "save", save)
        sys.exit(main(sys.argv[1:]))
