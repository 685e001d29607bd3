"""`lora-from-scratch evaluate`: the measures of a model, adapted or not, on a task."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from lora_from_scratch.cli import options as shared


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "evaluate",
        help="BLEU, slot errors, perplexity, forgetting",
        description="Judge a model on a task: what it writes, how sure it is, what it forgot.",
    )
    shared.add_model(parser)
    shared.add_data(parser)
    parser.add_argument("--adapter", metavar="DIRECTORY", help="what finetune wrote, or PEFT; a whole model as well")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="(%(default)s)")
    parser.add_argument("--beams", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="numbers for programs")
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.finetune.data import load_dataset
    from lora_from_scratch.finetune.evaluation import evaluate
    from lora_from_scratch.gpt2.checkpoint import load_gpt2
    from lora_from_scratch.method import load_adapter

    dataset = load_dataset(options.data)
    base, tokenizer = load_gpt2(options.model)
    model, _ = load_gpt2(options.model)
    if options.adapter:
        load_adapter(model, options.adapter)
    scores, _ = evaluate(model, base, tokenizer, getattr(dataset, options.split), dataset, num_beams=options.beams)
    if options.json:
        print(json.dumps(asdict(scores)))
        return 0
    print(f"BLEU              {scores.bleu:8.2f}")
    print(f"slot errors       {100 * scores.slot_errors:8.2f} %")
    print(f"perplexity        {scores.perplexity:8.2f}   of the references, given their cards")
    print(f"tale perplexity   {scores.tale_perplexity:8.2f}   forgetting: the project's own tales")
    print(f"divergence        {scores.divergence:8.3f}   nats per token from the base model, on its own text")
    return 0
