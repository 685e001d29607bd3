"""`lora-from-scratch atlas`: compare all methods with several seeds, and what each of them costs."""

from __future__ import annotations

import argparse

from lora_from_scratch.cli import options as shared
from lora_from_scratch.cli.demo import add_jobs
from lora_from_scratch.finetune import defaults

SEEDS = (0, 1, 2)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "atlas",
        help="compare all methods with several seeds, and what each of them costs (hours)",
        description="Fine-tune a GPT-2 on the story cards with every method, each at its own learning rate, for the "
        "same number of steps and with several seeds: a table and a figure of quality, trained parameters, memory, "
        "bytes on disk, work and forgetting. If it is interrupted, run it again with the same flags to resume.",
    )
    shared.add_gpt2(parser)
    shared.add_output(parser, "runs/atlas")
    shared.add_device(parser)
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="methods to run, by their names in the table (all)"
    )
    parser.add_argument(
        "--steps", type=int, default=defaults.STEPS, metavar="N", help="training steps per run (%(default)s)"
    )
    shared.add_cards(parser)
    add_jobs(parser)
    parser.add_argument("--seeds", type=shared.seed, nargs="+", default=SEEDS, metavar="N", help="random seeds (0 1 2)")
    parser.add_argument(
        "--shard", metavar="K/N", help="carry out only shard K of N of the runs, and write neither table nor figure"
    )
    parser.add_argument(
        "--collect", action="store_true", help="train nothing; write table and figure of the runs that are finished"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.compare.atlas import atlas
    from lora_from_scratch.support.shard import EVERYTHING, parse_shard

    if options.collect and options.shard:
        raise ValueError("--collect trains nothing, so it does not go with --shard")
    atlas(
        options.output,
        model=options.model,
        methods=options.methods or (),
        steps=options.steps,
        cards=options.cards,
        seeds=options.seeds,
        shard=parse_shard(options.shard) if options.shard else EVERYTHING,
        train=not options.collect,
        jobs=options.jobs,
        device=options.device,
    )
    return 0
