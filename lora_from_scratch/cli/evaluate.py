"""`lora-from-scratch evaluate`: compute the metrics of a model, adapted or not, on a task."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict

from lora_from_scratch.cli import options as shared


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "evaluate",
        help="compute BLEU, slot errors, perplexity and forgetting",
        description="Evaluate a model on a task: BLEU and slot errors of what it writes, its perplexity, and how much "
        "it has forgotten. These are the metrics in finetune's table.",
    )
    shared.add_model(parser)
    shared.add_adapter(parser)
    shared.add_data(parser)
    parser.add_argument(
        "--split", choices=("validation", "test"), default="test", help="which split of the data (%(default)s)"
    )
    shared.add_cards(parser)
    parser.add_argument(
        "--beams", type=int, default=1, metavar="N", help="beams of beam search; 1 decodes greedily (%(default)s)"
    )
    shared.add_device(parser)
    shared.add_precision(parser)
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON (off)")
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.finetune.distributed import find_device
    from lora_from_scratch.finetune.evaluation import evaluate, first_cards
    from lora_from_scratch.finetune.tasks import load_dataset
    from lora_from_scratch.finetune.training import autocast
    from lora_from_scratch.methods.registry import load_adapter
    from lora_from_scratch.models.checkpoint import load_language_model

    device = find_device(options.device)
    dataset = load_dataset(options.data)
    examples = first_cards(getattr(dataset, options.split), options.cards)
    base, tokenizer = load_language_model(options.model)
    model, _ = load_language_model(options.model)
    if options.adapter:
        load_adapter(model, options.adapter)
    base.to(device)
    model.to(device)
    with autocast(device, options.precision):
        scores, _ = evaluate(model, base, tokenizer, examples, dataset, num_beams=options.beams)
    if options.json:
        print(json.dumps({k: v if math.isfinite(v) else None for k, v in asdict(scores).items()}, allow_nan=False))
        return 0
    print(f"BLEU              {scores.bleu:8.2f}")
    print(f"slot errors       {100 * scores.slot_errors:8.2f} %")
    print(f"perplexity        {scores.perplexity:8.2f}   of the first reference of each card, given the card")
    print(f"tale perplexity   {scores.tale_perplexity:8.2f}   of the project's own tales: shows forgetting")
    print(f"divergence        {scores.divergence:8.3f}   from the base model on its own text, nats per token")
    return 0
