"""`lora-from-scratch e2e`: the LoRA paper's experiment on the E2E data set."""

from __future__ import annotations

import argparse

from lora_from_scratch.cli import options as shared
from lora_from_scratch.finetune.training import PRECISIONS


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "e2e",
        help="repeat the LoRA paper's experiment on E2E",
        description="Repeat the LoRA paper's experiment on E2E (Hu et al. 2021, table 3) with its settings: train with "
        "each seed, generate a text for each meaning of the test set by beam search, and print BLEU, NIST, METEOR, "
        "ROUGE-L and CIDEr beside the paper's. GPT-2 medium needs a GPU, or days; docs/e2e.md says what it costs. "
        "If it is interrupted, run it again with the same flags to resume.",
    )
    parser.add_argument(
        "--model",
        default="gpt2-medium",
        metavar="MODEL",
        help='the GPT-2: "bundled", a directory, or a name on the Hugging Face Hub (%(default)s)',
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="a directory with E2E's trainset.csv, devset.csv and testset_w_refs.csv, or one CSV file, which is split",
    )
    parser.add_argument(
        "--seeds", type=shared.seed, nargs="+", default=[0, 1, 2], metavar="N", help="random seeds (0 1 2)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="training steps, instead of the recipe's 5 epochs")
    parser.add_argument("--meanings", type=int, metavar="N", help="how many meanings of the test set to write (all)")
    shared.add_output(parser, "runs/e2e")
    shared.add_device(parser)
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="precision of the matrix products; weights are fp32 (%(default)s)",
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=500, metavar="N", help="steps between checkpoints (%(default)s)"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.compare.lora_paper import Recipe, lora_paper

    if options.checkpoint_every < 1:
        raise ValueError(f"--checkpoint-every must be at least 1, got {options.checkpoint_every}")
    lora_paper(
        options.output,
        options.data,
        model=options.model,
        seeds=options.seeds,
        recipe=Recipe(steps=options.steps, meanings=options.meanings, precision=options.precision),
        device=options.device,
        checkpoint_every=options.checkpoint_every,
    )
    return 0
