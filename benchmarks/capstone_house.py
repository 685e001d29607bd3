"""The course's own entries on the capstone's leaderboard: what each method of a shootout reaches on the hidden cards.

    lora-from-scratch shootout --output runs/shootout
    python -m benchmarks.capstone_house runs/shootout

Writes `lora_from_scratch/assets/capstone_house.json`. A method that can be merged has a second line, merged.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_from_scratch.methods.registry import load_adapter

from lora_from_scratch.compare.capstone.budget import cost_of
from lora_from_scratch.compare.capstone.hidden import hidden_cards, score
from lora_from_scratch.compare.shootout import CORE, choose
from lora_from_scratch.compare.side_by_side import model_fingerprint
from lora_from_scratch.finetune.evaluation import write_texts
from lora_from_scratch.gpt2 import load_gpt2
from lora_from_scratch.support.files import write_json

PLACE = Path(__file__).parents[1] / "lora_from_scratch" / "assets" / "capstone_house.json"


def entries(runs: Path) -> list[dict[str, Any]]:
    cards, lines = hidden_cards(), []
    for name, method in choose(CORE).items():
        model, tokenizer = load_gpt2("bundled")
        config = model.config
        if name == "full":
            model, tokenizer = load_gpt2(runs / name)
        else:
            load_adapter(model, runs / name)
        bleu, slot_errors = score(dict(zip(cards, write_texts(model, tokenizer, cards), strict=True)), cards)
        measured = {"bleu": round(bleu, 2), "slot_errors": round(slot_errors, 4)}
        lines.append({"name": name, "cost": cost_of(config, method), **measured})
        if method.can_merge:
            lines.append({"name": f"{name}, merged", "cost": cost_of(config, method, merged=True), **measured})
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="where the shootout wrote")
    options = parser.parse_args()
    write_json(PLACE, {"model": model_fingerprint("bundled"), "entries": entries(options.runs)})


if __name__ == "__main__":
    main()
