"""`lora-from-scratch demo`: full fine-tuning and LoRA, side by side."""

from __future__ import annotations

import argparse

from lora_from_scratch.cli import options as shared
from lora_from_scratch.finetune import defaults


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo",
        help="full fine-tuning and LoRA side by side, in a few minutes",
        description="Fine-tune a GPT-2 on the story cards by full fine-tuning and by LoRA, and compare them: "
        "a table, a figure, a few sentences before and after, and both results to go on with.",
    )
    shared.add_model(parser)
    shared.add_output(parser, "runs/demo")
    parser.add_argument(
        "--steps", type=int, default=defaults.STEPS, metavar="N", help="training steps of each method (%(default)s)"
    )
    add_jobs(parser)
    shared.add_seed(parser, "what is random in training")
    return parser


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs",
        type=int,
        default=None,
        metavar="N",
        help="methods at a time; they share the cores (2, or 1 on one core)",
    )


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.compare.demo import demo

    demo(options.output, model=options.model, steps=options.steps, seed=options.seed, jobs=options.jobs)
    return 0
