"""`lora-from-scratch shootout`: compare every core method on the same task."""

from __future__ import annotations

import argparse

from lora_from_scratch.cli import options as shared
from lora_from_scratch.cli.demo import add_jobs
from lora_from_scratch.finetune import defaults


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "shootout",
        help="compare every core method on the same task, with the same number of steps",
        description="Fine-tune a GPT-2 on the story cards with every core method, for the same number of steps, and "
        "compare them: a table, and a figure of quality against trained parameters. "
        "If it is interrupted, run it again with the same flags to resume.",
    )
    shared.add_gpt2(parser)
    shared.add_output(parser, "runs/shootout")
    shared.add_device(parser)
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="methods to run, by their names in the table (all core methods)"
    )
    parser.add_argument(
        "--steps", type=int, default=defaults.STEPS, metavar="N", help="training steps per method (%(default)s)"
    )
    shared.add_cards(parser)
    add_jobs(parser)
    shared.add_seed(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.compare.shootout import shootout

    shootout(
        options.output,
        model=options.model,
        methods=options.methods or (),
        steps=options.steps,
        cards=options.cards,
        seed=options.seed,
        jobs=options.jobs,
        device=options.device,
    )
    return 0
