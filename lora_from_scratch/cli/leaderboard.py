"""`lora-from-scratch leaderboard`: score and rank the capstone's entries."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lora_from_scratch.cli import options as shared
from lora_from_scratch.support.plain_text import one_line


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "leaderboard",
        help="score and rank the capstone's entries",
        description="Score entries of the capstone (unit 14) on its hidden cards and rank them, with one board per "
        "brief. Without files, the entries submitted on this computer are used.",
    )
    parser.add_argument("entries", nargs="*", type=Path, metavar="ENTRY", help="files that learners handed in")
    parser.add_argument("--brief", help="show only this brief")
    parser.add_argument(
        "--cards-seed", type=int, metavar="N", help="seed of a class's own cards, kept secret by the instructor"
    )
    parser.add_argument(
        "--write-cards", type=Path, metavar="FILE", help="only write the cards of --cards-seed to this file"
    )
    shared.add_gpt2(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    from lora_from_scratch.compare.capstone import hidden, leaderboard
    from lora_from_scratch.compare.capstone.budget import BRIEFS
    from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
    from lora_from_scratch.gpt2.config import GPT2Config
    from lora_from_scratch.support.files import write_atomically

    seed = hidden.HOME_SEED if options.cards_seed is None else options.cards_seed
    if options.write_cards:
        text = "\n".join(hidden.hidden_cards(seed)) + "\n"
        write_atomically(options.write_cards, lambda path: path.write_text(text, encoding="utf-8"))
        print(f"{hidden.CARDS} cards: {options.write_cards}")
        return 0
    if options.brief and options.brief not in BRIEFS:
        raise ValueError(f"there is no brief {options.brief!r}; there are {', '.join(BRIEFS)}")
    config = GPT2Config.from_json(checkpoint_directory(options.model) / "config.json")
    files = options.entries or sorted(leaderboard.own_folder().glob("*.json"))
    for file in options.entries:
        if not file.is_file():
            raise FileNotFoundError(f"there is no entry {file}")
    complaints: dict[str, None] = {}
    for brief in [options.brief] if options.brief else BRIEFS:
        lines, wrong = leaderboard.board_of(brief, config, files, seed)
        print(f"{brief}: {BRIEFS[brief]}\n\n{leaderboard.board(lines)}\n")
        complaints |= dict.fromkeys(wrong)
    print(leaderboard.LEGEND)
    for complaint in complaints:
        print(one_line(complaint), file=sys.stderr)
    return 1 if complaints else 0
