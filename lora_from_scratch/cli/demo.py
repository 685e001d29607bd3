"""`lora-from-scratch demo`: compare full fine-tuning and LoRA."""

from __future__ import annotations

import argparse

from lora_from_scratch.cli import options as shared
from lora_from_scratch.finetune import defaults


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo",
        help="compare full fine-tuning and LoRA, in a few minutes",
        description="Fine-tune a GPT-2 on the story cards with full fine-tuning and with LoRA, and compare the two: "
        "a table, a figure, and texts generated before and after. Both fine-tuned models are saved.",
    )
    shared.add_gpt2(parser)
    shared.add_output(parser, "runs/demo")
    shared.add_device(parser)
    parser.add_argument(
        "--steps", type=int, default=defaults.STEPS, metavar="N", help="training steps per method (%(default)s)"
    )
    add_jobs(parser)
    shared.add_seed(parser)
    return parser


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs",
        type=int,
        default=None,
        metavar="N",
        help="methods to train at the same time, sharing the cores (2, or 1 on a single core)",
    )


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.compare.demo import demo

    demo(
        options.output,
        model=options.model,
        steps=options.steps,
        seed=options.seed,
        jobs=options.jobs,
        device=options.device,
    )
    return 0
