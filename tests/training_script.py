"""A small training run as a separate program, for tests that kill it or run it in two processes."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from lora_from_scratch.finetune.training import Batch, Trainer
from tests.test_training import random_batch, settings, tiny_model


def main() -> None:
    directory = Path(sys.argv[1])
    model = tiny_model(dropout=0.0 if "--no-dropout" in sys.argv else 0.1)

    def batch_at(step: int) -> Batch:
        with (directory / "steps.log").open("a") as log:
            log.write(f"{step}\n")
        return random_batch(step)

    trainer = Trainer(
        model, batch_at, settings(steps=60), checkpoint=directory / "checkpoint.pt", checkpoint_every=1, progress=False
    )
    losses = trainer.run().losses
    if trainer.world.rank == 0:
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
        (directory / "result.json").write_text(json.dumps({"losses": losses, "weights": digest}))


if __name__ == "__main__":
    main()
