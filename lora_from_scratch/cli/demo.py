"""`lora-from-scratch demo`: full fine-tuning and LoRA, side by side."""

from __future__ import annotations

import argparse

from lora_from_scratch.cli import options as shared
from lora_from_scratch.finetune import defaults


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo",
        help="full fine-tuning and LoRA side by side, in three minutes",
        description="Fine-tune a GPT-2 on the story cards by full fine-tuning and by LoRA, and compare them.",
    )
    shared.add_model(parser)
    shared.add_output(parser, "runs/demo")
    parser.add_argument("--steps", type=int, default=defaults.STEPS, help="of each method (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.demo import demo

    demo(options.output, model=options.model, steps=options.steps, seed=options.seed)
    return 0
