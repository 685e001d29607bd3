"""What `lora_from_scratch.support.allocator` gains: the demo's LoRA training with glibc's defaults and with the setting.

    python -m benchmarks.allocator [--pairs 5] [--steps 100]

Each measurement is a process of its own with one thread; the two kinds take turns. A ratio below 1 means that the
setting is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

from lora_from_scratch.support.allocator import SETTING, VARIABLE

WARM_UP = 8  # steps that are not counted: the first ones ask for the memory that the others reuse


def train(steps: int) -> dict[str, float]:
    """A step's seconds and page faults (means of `steps` steps), and the loss of the last one."""
    import torch
    from lora_from_scratch.finetune.tasks import load_dataset

    from lora_from_scratch.finetune import defaults
    from lora_from_scratch.finetune.completions import Completions
    from lora_from_scratch.finetune.data import STORY_CARDS
    from lora_from_scratch.finetune.training import Trainer, TrainingSettings
    from lora_from_scratch.gpt2.checkpoint import load_gpt2
    from lora_from_scratch.methods.lora import LoRA

    torch.set_num_threads(1)
    model, tokenizer = load_gpt2()
    LoRA().adapt(model)
    examples = Completions(load_dataset(STORY_CARDS).train, tokenizer, model.config.n_positions)
    marks: list[tuple[float, int]] = []

    def mark() -> dict[str, float]:
        marks.append((time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt))
        return {}

    settings = TrainingSettings(steps=WARM_UP + steps, learning_rate=3e-3)
    history = Trainer(
        model,
        lambda step: examples.batch_at(step, defaults.BATCH_SIZE, 0),
        settings,
        evaluate=mark,
        evaluate_every=1,
        progress=False,
    ).run()
    first, last = marks[WARM_UP - 1], marks[-1]
    return {
        "seconds": (last[0] - first[0]) / steps,
        "faults": (last[1] - first[1]) / steps,
        "loss": history.losses[-1],
    }


def in_a_process(steps: int, setting: bool) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if setting:
        environment[VARIABLE] = SETTING
    command = [sys.executable, "-m", "benchmarks.allocator", "--one", "--steps", str(steps)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    numbers: dict[str, float] = json.loads(done.stdout)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(options.steps)))
        return
    ratios = []
    for pair in range(options.pairs):
        order = [False, True] if pair % 2 else [True, False]
        measured = {setting: in_a_process(options.steps, setting) for setting in order}
        usual, quick = measured[False], measured[True]
        ratios.append(quick["seconds"] / usual["seconds"])
        print(
            f"a step: {usual['seconds'] * 1e3:.0f} ms and {usual['faults']:,.0f} page faults; with the setting "
            f"{quick['seconds'] * 1e3:.0f} ms and {quick['faults']:,.0f}; the same loss: "
            f"{usual['loss'] == quick['loss']}",
            flush=True,
        )
    print(
        f"with the setting / without = {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)"
    )


if __name__ == "__main__":
    main()
