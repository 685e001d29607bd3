"""`lora-from-scratch pretrain`: make a small GPT-2 from plain text, as the bundled one was made."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from lora_from_scratch.cli import options as shared
from lora_from_scratch.finetune.training import PRECISIONS

HELP = {
    "steps": "updates of the weights",
    "batch_size": "windows of text in each step",
    "context": "tokens that the model sees at once",
    "vocab_size": "tokens of the tokenizer, at most",
    "n_layer": "blocks",
    "n_head": "attention heads of a block",
    "n_embd": "width",
    "dropout": "share of the activations that is dropped in training",
    "matrix_learning_rate": "Muon's, for the matrices of the blocks",
    "learning_rate": "AdamW's, for everything else",
    "weight_decay": "of both, on matrices",
    "warmup_steps": "in which the learning rates rise",
    "held_out_books": "so many books at the end of the corpus are not read, and judge the model",
    "precision": "of the matrix products: " + " or ".join(PRECISIONS),
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    from lora_from_scratch.finetune.pretraining import PretrainingSettings

    parser = commands.add_parser(
        "pretrain",
        usage="%(prog)s --corpus FILE [--flag value ...]",
        help="make a small GPT-2 from plain text",
        description="Train a tokenizer and a GPT-2 on a corpus. "
        "Killed and started again with the same flags, it goes on from its last checkpoint.",
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
        if f.name == "seed":
            shared.add_seed(parser, "what is random in training")
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
