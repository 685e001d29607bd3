"""`lora-from-scratch generate`: let a model, adapted or not, go on with a text."""

from __future__ import annotations

import argparse
import sys

from lora_from_scratch.cli import options as shared


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text. With an adapter or a fine-tuned model, give it a card (--card).",
    )
    shared.add_model(parser)
    parser.add_argument("--adapter", metavar="DIRECTORY", help="what finetune wrote, or PEFT")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a text to go on with (may be repeated); else each line of standard input",
    )
    parser.add_argument("--card", action="append", metavar="CARD", help="a meaning such as 'hero[fox], wish[a crown]'")
    parser.add_argument("--max-new-tokens", type=int, default=80, help="(%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=None)
    parser.add_argument("--top-p", type=float, default=None)
    parser.add_argument("--beams", type=int, default=1, help="beam search with so many (%(default)s)")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="of beam search (%(default)s)")
    parser.add_argument("--no-repeat-ngram-size", type=int, default=0, help="0: repeat freely (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.finetune.completions import prompt_text
    from lora_from_scratch.gpt2.checkpoint import load_gpt2
    from lora_from_scratch.gpt2.generation import generate
    from lora_from_scratch.method import load_adapter

    prompts = [*(options.prompt or []), *(prompt_text(card) for card in options.card or [])]
    if not prompts:
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()] if not sys.stdin.isatty() else []
    if not prompts:
        raise ValueError("nothing to go on with: give --prompt TEXT, --card CARD, or lines on standard input")
    model, tokenizer = load_gpt2(options.model)
    if options.adapter:
        load_adapter(model, options.adapter)
        model.eval()
    ids = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    new = generate(
        model,
        ids,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        num_beams=options.beams,
        length_penalty=options.length_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
        eos_id=tokenizer.eos_id,
        seed=options.seed,
    )
    for prompt, tokens in zip(prompts, new, strict=True):
        print(prompt + tokenizer.decode(tokens))
    return 0
