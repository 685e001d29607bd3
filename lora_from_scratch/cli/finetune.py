"""`lora-from-scratch finetune`: adapt a model to a task."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_from_scratch.cli import options as shared
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.run import OPTIMIZERS
from lora_from_scratch.finetune.training import PRECISIONS, SCHEDULES, TrainingSettings

if TYPE_CHECKING:
    from lora_from_scratch.finetune.run import Report
    from lora_from_scratch.methods.method import Method


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "finetune",
        usage="%(prog)s [--flag value ...]",
        help="fine-tune a model, evaluate it and save what it learned",
        description="Fine-tune a model, evaluate it, and save what it learned. "
        "If it is interrupted, run it again with the same flags to resume from the last checkpoint.",
    )
    shared.add_model(parser)
    shared.add_data(parser)
    shared.add_output(parser, None)
    parser.add_argument(
        "--overwrite", action="store_true", help="allow an output folder with another run's result or other files (off)"
    )
    shared.add_device(parser)
    shared.add_cards(parser)
    shared.add_method(parser)
    _add_training(parser)
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    flags = [
        ("steps", int, defaults.STEPS, "optimiser steps"),
        ("batch-size", int, defaults.BATCH_SIZE, "examples per step"),
        ("learning-rate", float, None, "peak learning rate (default: tuned for each method)"),
        (
            "warmup-steps",
            int,
            None,
            f"steps over which the learning rate rises ({100 * defaults.WARMUP_FRACTION:g} %% of all steps)",
        ),
        ("weight-decay", float, defaults.WEIGHT_DECAY, "AdamW's weight decay, applied to matrices only"),
        ("clip-norm", float, 1.0, "maximum norm of the gradient; 0 turns clipping off"),
        ("accumulation", int, 1, "micro-batches per step; more of them need less memory, with the same result"),
        ("checkpoint-every", int, 100, "steps between checkpoints"),
    ]
    for name, kind, default, text in flags:
        shown = text if default is None else f"{text} (%(default)s)"
        group.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=shown)
    group.add_argument(
        "--schedule", choices=SCHEDULES, default="linear", help="how the learning rate decays (%(default)s)"
    )
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="bf16",
        help="precision of the matrix products; weights are fp32 (%(default)s)",
    )
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help="paged-adamw keeps AdamW's moments in a file on disk: less memory, but slower (%(default)s)",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, but slower (off)",
    )
    shared.add_seed(group)


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.finetune.distributed import World
    from lora_from_scratch.finetune.run import Run, finetune

    method = shared.method_from(options)
    settings = _settings(options, method)
    first = World.from_environment().rank == 0  # under torchrun only one process prints
    report = finetune(
        Run(
            method=method,
            settings=settings,
            output=options.output or Path("runs") / f"{Path(options.data).resolve().stem}-{options.method}",
            model=options.model,
            data=options.data,
            batch_size=options.batch_size,
            optimizer=options.optimizer,
            gradient_checkpointing=options.gradient_checkpointing,
            device=options.device,
            cards=options.cards,
            checkpoint_every=options.checkpoint_every,
            overwrite=options.overwrite,
        ),
        progress=first,
    )
    if first:
        _print_report(report)
    return 0


def _settings(options: argparse.Namespace, method: Method) -> TrainingSettings:
    from lora_from_scratch.models.checkpoint import shape_of

    rate, warmup = options.learning_rate, options.warmup_steps
    if rate is None:
        rate = method.learning_rate(shape_of(options.model).n_embd)
    return TrainingSettings(
        steps=options.steps,
        learning_rate=rate,
        warmup_steps=defaults.warmup_steps_for(options.steps) if warmup is None else warmup,
        schedule=options.schedule,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
        accumulation=options.accumulation,
        precision=options.precision,
        seed=options.seed,
    )


def _print_report(report: Report) -> None:
    from lora_from_scratch.finetune.report import describe, table

    print(f"\n{table([report])}\n\n{describe([report])}\n")
    print(f"Written to {report.output}")
