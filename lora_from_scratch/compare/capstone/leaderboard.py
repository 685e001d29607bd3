"""Who has made the most of a budget: entries, their scores, and a board of them.

An entry is a JSON file that a learner hands in. What it says of its costs is the learner's word; its texts are scored
by whoever has the cards' references.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lora_from_scratch.checks import progress_file
from lora_from_scratch.compare.capstone.budget import BRIEFS, COSTS, budget_of, over_budget
from lora_from_scratch.compare.capstone.hidden import HOME_SEED, hidden_cards, score
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.support.files import write_json
from lora_from_scratch.support.plain_text import one_line

LARGEST = 2_000_000  # bytes of an entry
LONGEST_NAME = 60


@dataclass(frozen=True)
class Entry:
    """What somebody hands in: what it is, what it costs, and a text for every card."""

    name: str
    brief: str
    cost: dict[str, float]
    texts: dict[str, str]


@dataclass(frozen=True)
class Placed:
    """A line of the board. `place` is None where the budget was exceeded; `over` says in what."""

    name: str
    brief: str
    cost: dict[str, float]
    bleu: float
    slot_errors: float
    over: tuple[str, ...] = ()
    place: int | None = None
    house: bool = False


def write_entry(path: str | Path, entry: Entry) -> None:
    """Write what is handed in.

    Raises:
        ValueError: the entry is not complete.
        OSError: it cannot be written.
    """
    _check(asdict(entry), str(path))
    write_json(Path(path), asdict(entry))


def read_entry(path: str | Path) -> Entry:
    """Read what `write_entry` wrote. Nothing in it is trusted.

    Raises:
        OSError: there is none.
        ValueError: it is something else.
    """
    file = Path(path)
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; an entry has at most {LARGEST:,}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not an entry: {error}") from None
    return Entry(**_check(data, str(file)))


def judge_entry(entry: Entry, budget: Mapping[str, float], seed: int = HOME_SEED, house: bool = False) -> Placed:
    """Score an entry's texts, and compare its costs with the budget.

    Raises:
        ValueError: a card has no text, a text no card, or a cost that the budget limits is missing.
    """
    scores = score(entry.texts, hidden_cards(seed), seed)
    return Placed(
        entry.name, entry.brief, entry.cost, *scores, over=tuple(over_budget(entry.cost, budget)), house=house
    )


def placed(entries: Iterable[Placed]) -> list[Placed]:
    """The board of one brief: the best BLEU first, equal scores on the same place, what is over budget at the end."""
    lines = sorted(entries, key=lambda entry: (bool(entry.over), -entry.bleu, entry.slot_errors, entry.name))
    scores = [entry.bleu for entry in lines if not entry.over]
    return [Placed(**{**asdict(e), "place": None if e.over else scores.index(e.bleu) + 1}) for e in lines]


def house_entries(brief: str, budget: Mapping[str, float]) -> list[Placed]:
    """What the course's own runs reach (`benchmarks/capstone_house.py`): all methods, tuned, 500 steps."""
    path = resources.files("lora_from_scratch").joinpath("assets", "capstone_house.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    return [
        Placed(
            line["name"], brief, line["cost"], line["bleu"], line["slot_errors"],
            over=tuple(over_budget(line["cost"], budget)), house=True,
        )
        for line in document["entries"]
    ]  # fmt: skip


def own_folder() -> Path:
    """Where what somebody has submitted on this computer is kept, a file for each name."""
    return progress_file.folder() / "leaderboard"


def submit(entry: Entry, config: GPT2Config, path: str | Path = "capstone.json", seed: int = HOME_SEED) -> list[Placed]:
    """Score an entry, write it to be handed in, keep it on this computer, and return its brief's board.

    An entry of the same name and brief takes the place of the one before.

    Raises:
        ValueError: the entry is not complete. Nothing is written then.
        OSError: it cannot be written.
    """
    _check(asdict(entry), "the entry")
    budget = budget_of(entry.brief, config)
    mine = judge_entry(entry, budget, seed)
    write_entry(path, entry)
    if progress_file.switched_off():  # the notebooks are being built, or nothing is to be kept
        return placed([mine, *house_entries(entry.brief, budget)])
    digest = hashlib.sha256(entry.name.encode()).hexdigest()[:16]
    write_entry(own_folder() / f"{entry.brief}-{digest}.json", entry)
    return board_of(entry.brief, config, sorted(own_folder().glob(f"{entry.brief}-*.json")), seed)[0]


def board_of(
    brief: str, config: GPT2Config, files: Iterable[Path], seed: int = HOME_SEED
) -> tuple[list[Placed], list[str]]:
    """The board of a brief from these entries and the course's own; and what is wrong with those that are left out."""
    budget = budget_of(brief, config)
    lines, complaints = house_entries(brief, budget), []
    for file in files:
        try:
            entry = read_entry(file)
            if entry.brief == brief:
                lines.append(judge_entry(entry, budget, seed))
        except (OSError, ValueError) as error:
            complaints.append(f"left out: {error}")
    return placed(lines), complaints


def board(lines: Sequence[Placed]) -> str:
    """The board as a table in Markdown."""
    head = ("place", "name", "BLEU", "slot errors", "trained", "memory", "added work", "saved")
    rows = [head, *(_cells(line) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    texts = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {texts[0]} |", f"|{rule}|", *(f"| {text} |" for text in texts[1:])])


def _cells(line: Placed) -> tuple[str, ...]:
    cost = line.cost
    return (
        str(line.place or "over"),
        one_line(line.name).replace("|", "\\|") + (" (the course's)" if line.house else ""),
        f"{line.bleu:.1f}",
        f"{100 * line.slot_errors:.1f} %",
        f"{cost['trained_parameters']:,.0f}" + _mark(line, "trained_parameters"),
        f"{cost['training_memory'] / 2**20:.0f} MiB" + _mark(line, "training_memory"),
        f"{cost['added_work']:,.0f}" + _mark(line, "added_work"),
        f"{cost['saved_bytes'] / 1024:,.0f} KiB" + _mark(line, "saved_bytes"),
    )


def _mark(line: Placed, name: str) -> str:
    return " (!)" if name in line.over else ""


def _check(data: Any, where: str) -> dict[str, Any]:
    """The fields of an entry.

    Raises:
        ValueError: one is missing, or is something else.
    """
    if not isinstance(data, dict) or set(data) != {"name", "brief", "cost", "texts"}:
        raise ValueError(f"{where} is not an entry: it needs name, brief, cost and texts")
    if not isinstance(data["name"], str) or not 0 < len(data["name"].strip()) <= LONGEST_NAME:
        raise ValueError(f"{where}: the name must have 1 to {LONGEST_NAME} characters, got {data['name']!r:.80}")
    if data["brief"] not in BRIEFS:
        raise ValueError(f"{where}: there is no brief {data['brief']!r:.80}; there are {', '.join(BRIEFS)}")
    cost = data["cost"]
    if not isinstance(cost, dict) or set(cost) != set(COSTS) or not all(map(_is_cost, cost.values())):
        raise ValueError(f"{where}: the cost must give a number, at least 0, for each of {', '.join(COSTS)}")
    texts = data["texts"]
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"{where}: the texts must be a text for each card")
    return data


def _is_cost(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
