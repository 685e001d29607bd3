"""`lora-from-scratch generate`: continue a text with a model, adapted or not."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection

from lora_from_scratch.cli import options as shared

NEW_TOKENS = 80
PRETRAINED = ("bundled", "gpt2", "smollm2")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "generate",
        usage="%(prog)s [--flag value ...]",
        help="continue a text",
        description="Continue a text, or write the text for a card with an adapter or a fine-tuned model (--card).",
    )
    shared.add_model(parser)
    shared.add_adapter(parser)
    shared.add_device(parser)
    shared.add_precision(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a text to continue; may be repeated (without --prompt and --card: each line of standard input)",
    )
    parser.add_argument(
        "--card", action="append", metavar="CARD", help="a card to write, such as 'hero[fox], wish[a crown]'"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"the most tokens to generate ({NEW_TOKENS}, or fewer if the model's context is full)",
    )
    choice = parser.add_argument_group("decoding")
    choice.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: the most likely token; 1: samples from the model's distribution; above 1: more random (%(default)s)",
    )
    choice.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (all)")
    choice.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most likely tokens whose probabilities reach P (all)"
    )
    choice.add_argument(
        "--beams", type=int, default=1, metavar="N", help="beams of beam search; 1: no beam search (%(default)s)"
    )
    choice.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="for beam search: above 0 favours longer texts (%(default)s)",
    )
    choice.add_argument(
        "--no-repeat-ngram-size",
        type=int,
        default=0,
        metavar="N",
        help="never repeat a sequence of N tokens; 0: no restriction (%(default)s)",
    )
    shared.add_seed(choice)
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.finetune.distributed import find_device
    from lora_from_scratch.finetune.training import autocast
    from lora_from_scratch.gpt2.generation import generate
    from lora_from_scratch.methods.registry import load_adapter
    from lora_from_scratch.models.checkpoint import load_language_model

    device = find_device(options.device)
    prompts = _prompts(options)
    if options.card and not options.adapter and options.model in PRETRAINED:
        print(
            f"warning: the {options.model} model has not been trained on cards; "
            "give the adapter that has: --adapter DIR",
            file=sys.stderr,
        )
    model, tokenizer = load_language_model(options.model)
    if options.adapter:
        method = load_adapter(model, options.adapter)
        if learned := method.readable(model, tokenizer):
            print(f"the adapter's prompt: {learned}", file=sys.stderr)
    model.to(device)
    ids = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    room = model.config.n_positions - max(map(len, ids))
    with autocast(device, options.precision):
        new = generate(
            model,
            ids,
            max_new_tokens=max(1, min(NEW_TOKENS, room)) if options.max_new_tokens is None else options.max_new_tokens,
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


def _prompts(options: argparse.Namespace) -> list[str]:
    """The texts to continue: from the flags, or else the lines of standard input."""
    from lora_from_scratch.finetune.completions import prompt_text
    from lora_from_scratch.finetune.data import parse_mr

    for card in options.card or []:
        _check_slots(parse_mr(card), card)  # raises if the card is malformed
    prompts = [*(options.prompt or []), *(prompt_text(card) for card in options.card or [])]
    if not prompts and sys.stdin and not sys.stdin.isatty():
        prompts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError("no text to continue: give --prompt TEXT, --card CARD, or lines on standard input")
    return prompts


def _check_slots(slots: Collection[str], card: str) -> None:
    """Refuse a story card with a slot that no story card has; the cards of another task may have any slots.

    Raises:
        ValueError: it has such a slot.
    """
    from lora_from_scratch.finetune.story_cards import SLOTS

    unknown = [slot for slot in slots if slot not in SLOTS]
    alike = {slot: difflib.get_close_matches(slot, SLOTS, 1) for slot in unknown}
    if unknown and (len(unknown) < len(slots) or any(alike.values())):
        slot = next((slot for slot in unknown if alike[slot]), unknown[0])
        meant = f"; did you mean {alike[slot][0]}?" if alike[slot] else "."
        raise ValueError(f"a story card has no slot {slot!r} (in {card!r}){meant} It may have {', '.join(SLOTS)}")
