"""`lora-from-scratch pretrain`: train a small GPT-2 on plain text, as the bundled model was trained."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from lora_from_scratch.cli import options as shared
from lora_from_scratch.finetune.training import PRECISIONS

HELP = {
    "steps": "optimiser steps",
    "batch_size": "windows of text per step",
    "context": "length of the model's context in tokens",
    "vocab_size": "maximum size of the tokenizer's vocabulary",
    "n_layer": "number of blocks",
    "n_head": "attention heads per block",
    "n_embd": "embedding width",
    "dropout": "dropout probability in training",
    "matrix_learning_rate": "Muon's learning rate, for the matrices of the blocks",
    "learning_rate": "AdamW's learning rate, for everything else",
    "weight_decay": "weight decay of both optimisers, applied to matrices only",
    "warmup_steps": "steps over which the learning rates rise",
    "held_out_books": "number of books at the end of the corpus to hold out for evaluation",
    "precision": "precision of the matrix products: " + " or ".join(PRECISIONS),
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    from lora_from_scratch.finetune.pretraining import PretrainingSettings

    parser = commands.add_parser(
        "pretrain",
        usage="%(prog)s --corpus FILE [--flag value ...]",
        help="train a small GPT-2 on plain text",
        description="Train a tokenizer and a GPT-2 on a corpus. "
        "If it is interrupted, run it again with the same flags to resume from the last checkpoint.",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        required=True,
        metavar="FILE",
        help="plain text or .gz: one paragraph per line, a blank line between books",
    )
    shared.add_output(parser, "runs/pretrain")
    shared.add_device(parser)
    for f in fields(PretrainingSettings):
        if f.name == "seed":
            shared.add_seed(parser)
            continue
        parser.add_argument(
            f"--{f.name.replace('_', '-')}",
            type=type(f.default),
            default=f.default,
            metavar="TEXT" if isinstance(f.default, str) else "N",
            help=f"{HELP[f.name]} (%(default)s)",
        )
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.finetune.evaluation import perplexity
    from lora_from_scratch.finetune.pretraining import PretrainingSettings, pretrain

    settings = PretrainingSettings(**{f.name: getattr(options, f.name) for f in fields(PretrainingSettings)})
    losses = pretrain(options.corpus, options.output, settings, device=options.device)
    for name, loss in losses.items():
        print(f"{name:<12} loss {loss:.4f} nats per token, perplexity {perplexity(loss):.2f}")
    print(f"Written to {options.output}")
    return 0
