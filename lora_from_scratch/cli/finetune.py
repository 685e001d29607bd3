"""`lora-from-scratch finetune`: adapt a model to a task."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from lora_from_scratch.cli import options as shared
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.training import PRECISIONS, SCHEDULES, TrainingSettings


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a GPT-2",
        description="Fine-tune a GPT-2, judge it, and save what it learned.",
    )
    shared.add_model(parser)
    shared.add_data(parser)
    shared.add_output(parser, None)
    shared.add_device(parser)
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=defaults.STEPS, help="(%(default)s)")
    training.add_argument("--batch-size", type=int, default=defaults.BATCH_SIZE, help="(%(default)s)")
    training.add_argument("--learning-rate", type=float, default=None, help="(tuned for each method)")
    training.add_argument("--warmup-steps", type=int, default=None, help="(6 %% of the steps)")
    training.add_argument("--schedule", choices=SCHEDULES, default="linear", help="(%(default)s)")
    training.add_argument("--weight-decay", type=float, default=defaults.WEIGHT_DECAY, help="(%(default)s)")
    training.add_argument("--clip-norm", type=float, default=1.0, help="0: no clipping (%(default)s)")
    training.add_argument("--accumulation", type=int, default=1, help="parts that a batch is cut into (%(default)s)")
    training.add_argument("--precision", choices=PRECISIONS, default="bf16", help="(%(default)s)")
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    training.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    shared.add_method(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.finetune.run import Run, finetune
    from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
    from lora_from_scratch.gpt2.config import GPT2Config

    method = shared.method_from(options)
    if options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {options.batch_size}")
    config = GPT2Config.from_json(checkpoint_directory(options.model) / "config.json")
    settings = TrainingSettings(
        steps=options.steps,
        learning_rate=options.learning_rate or defaults.learning_rate_for(method.name, config),
        schedule=options.schedule,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
        accumulation=options.accumulation,
        precision=options.precision,
        seed=options.seed,
    )
    warmup = options.warmup_steps if options.warmup_steps is not None else defaults.warmup_steps_for(options.steps)
    if options.method == "full":
        method = replace(method, keep_base=False)  # type: ignore[call-arg]  # nothing is undone here: spare the memory
    output = options.output or Path("runs") / f"{Path(options.data).stem}-{options.method}"
    report = finetune(
        Run(
            method=method,
            settings=replace(settings, warmup_steps=warmup),
            output=output,
            model=options.model,
            data=options.data,
            batch_size=options.batch_size,
            gradient_checkpointing=options.gradient_checkpointing,
            device=options.device,
        )
    )
    _say(report)
    return 0


def _say(report: object) -> None:
    from lora_from_scratch.finetune.report import describe, table

    print()
    print(table([report]))  # type: ignore[list-item]
    print()
    print(describe([report]))  # type: ignore[list-item]
    print(f"\nWritten to {report.output}")  # type: ignore[attr-defined]
