"""`lora-from-scratch pretrain`: make a small GPT-2 from plain text, as the bundled one was made."""

from __future__ import annotations

import argparse
import math
from dataclasses import fields
from pathlib import Path

from lora_from_scratch.cli import options as shared
from lora_from_scratch.finetune.training import PRECISIONS

HELP = {
    "context": "tokens that the model sees at once",
    "matrix_learning_rate": "Muon's, for the matrices of the blocks",
    "learning_rate": "AdamW's, for everything else",
    "held_out_books": "so many books at the end of the corpus are not read",
    "precision": " or ".join(PRECISIONS),
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    from lora_from_scratch.pretraining import PretrainingSettings

    parser = commands.add_parser(
        "pretrain",
        help="make a small GPT-2 from plain text",
        description="Train a tokenizer and a GPT-2 on a corpus. Killed and started again, it goes on.",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        required=True,
        metavar="FILE",
        help="text or .gz: one paragraph a line, a blank line between books",
    )
    shared.add_output(parser, "runs/pretrain")
    shared.add_device(parser)
    for f in fields(PretrainingSettings):
        parser.add_argument(
            f"--{f.name.replace('_', '-')}",
            type=type(f.default),
            default=f.default,
            help=f"{HELP.get(f.name, '')} (%(default)s)".strip(),
        )
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.pretraining import PretrainingSettings, pretrain

    settings = PretrainingSettings(**{f.name: getattr(options, f.name) for f in fields(PretrainingSettings)})
    losses = pretrain(options.corpus, options.output, settings, device=options.device)
    for name, loss in losses.items():
        print(f"{name:<12} loss {loss:.4f} nats per token, perplexity {math.exp(loss):.2f}")
    print(f"Written to {options.output}")
    return 0
