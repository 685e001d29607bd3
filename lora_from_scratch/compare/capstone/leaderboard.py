"""The leaderboard of the capstone: entries, their scores, and the board.

An entry is a JSON file that a learner submits. Its costs are as the learner states them; its texts are scored by
whoever has the cards' references.
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

from lora_from_scratch.compare.capstone.budget import BRIEFS, COSTS, budget_of, over_budget
from lora_from_scratch.compare.capstone.hidden import HOME_SEED, hidden_cards, score
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.support import learner_folder
from lora_from_scratch.support.files import write_json
from lora_from_scratch.support.plain_text import one_line

LARGEST = 2_000_000  # the size limit of an entry, in bytes
LONGEST_NAME = 60
LEGEND = """\
BLEU: agreement with the references of the hidden cards, 0 to 100; higher is better.
slot errors: slots that are missing or invented, per cent of all slots; lower is better.
trained: parameters. memory: the peak of a training step. saved: bytes stored for one task.
added work: multiply-adds per token, in addition to the base model's.
(!): over the brief's budget, so the entry has no place."""


@dataclass(frozen=True)
class Entry:
    """A submission: its name and brief, its costs, and a text for every card."""

    name: str
    brief: str
    cost: dict[str, float]
    texts: dict[str, str]


@dataclass(frozen=True)
class LeaderboardRow:
    """A line of the board. `place` is None if the budget is exceeded; `over` names the exceeded limits."""

    name: str
    brief: str
    cost: dict[str, float]
    bleu: float
    slot_errors: float
    over: tuple[str, ...] = ()
    place: int | None = None
    house: bool = False


def write_entry(path: str | Path, entry: Entry) -> None:
    """Write an entry to a file.

    Raises:
        ValueError: the entry is not complete.
        OSError: it cannot be written.
    """
    _check(asdict(entry), str(path))
    write_json(Path(path), asdict(entry))


def read_entry(path: str | Path) -> Entry:
    """Read what `write_entry` wrote. Nothing in it is trusted.

    Raises:
        OSError: there is no such file.
        ValueError: the file is not a valid entry.
    """
    file = Path(path)
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; an entry has at most {LARGEST:,}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not an entry: {error}") from None
    return Entry(**_check(data, str(file)))


def judge_entry(
    entry: Entry, budget: Mapping[str, float], seed: int = HOME_SEED, house: bool = False
) -> LeaderboardRow:
    """Score an entry's texts, and compare its costs with the budget.

    Raises:
        ValueError: a card has no text, a text has no card, or a cost that the budget limits is missing.
    """
    scores = score(entry.texts, hidden_cards(seed), seed)
    return LeaderboardRow(
        entry.name, entry.brief, entry.cost, *scores, over=tuple(over_budget(entry.cost, budget)), house=house
    )


def placed(entries: Iterable[LeaderboardRow]) -> list[LeaderboardRow]:
    """The board of one brief: the best BLEU first, equal scores in the same place, entries over budget at the end."""
    lines = sorted(entries, key=lambda entry: (bool(entry.over), -entry.bleu, entry.slot_errors, entry.name))
    scores = [entry.bleu for entry in lines if not entry.over]
    return [LeaderboardRow(**{**asdict(e), "place": None if e.over else scores.index(e.bleu) + 1}) for e in lines]


def house_entries(brief: str, budget: Mapping[str, float]) -> list[LeaderboardRow]:
    """The course's own entries (`benchmarks/capstone_house.py`): all methods, tuned, 500 steps."""
    path = resources.files("lora_from_scratch").joinpath("assets", "capstone_house.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    return [
        LeaderboardRow(
            line["name"], brief, line["cost"], line["bleu"], line["slot_errors"],
            over=tuple(over_budget(line["cost"], budget)), house=True,
        )
        for line in document["entries"]
    ]  # fmt: skip


def own_folder() -> Path:
    """The folder of the entries submitted on this computer, one file per name."""
    return learner_folder.folder() / "leaderboard"


def submit(
    entry: Entry, config: GPT2Config, path: str | Path = "capstone.json", seed: int = HOME_SEED
) -> list[LeaderboardRow]:
    """Score an entry, write it to `path`, keep a copy on this computer, and return its brief's board.

    An earlier entry with the same name and brief is replaced.

    Raises:
        ValueError: the entry is not complete. Nothing is written then.
        OSError: it cannot be written.
    """
    _check(asdict(entry), "the entry")
    budget = budget_of(entry.brief, config)
    mine = judge_entry(entry, budget, seed)
    write_entry(path, entry)
    if learner_folder.switched_off():  # the notebooks are being built, or nothing should be kept
        return placed([mine, *house_entries(entry.brief, budget)])
    digest = hashlib.sha256(entry.name.encode()).hexdigest()[:16]
    write_entry(own_folder() / f"{entry.brief}-{digest}.json", entry)
    return board_of(entry.brief, config, sorted(own_folder().glob(f"{entry.brief}-*.json")), seed)[0]


def board_of(
    brief: str, config: GPT2Config, files: Iterable[Path], seed: int = HOME_SEED
) -> tuple[list[LeaderboardRow], list[str]]:
    """The board of a brief from these entries and the course's own, and a message for each entry that is left out."""
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


def board(lines: Sequence[LeaderboardRow]) -> str:
    """The board as a Markdown table."""
    head = ("place", "name", "BLEU", "slot errors", "trained", "memory", "added work", "saved")
    rows = [head, *(_cells(line) for line in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    texts = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {texts[0]} |", f"|{rule}|", *(f"| {text} |" for text in texts[1:])])


def _cells(line: LeaderboardRow) -> tuple[str, ...]:
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


def _mark(line: LeaderboardRow, name: str) -> str:
    return " (!)" if name in line.over else ""


def _check(data: Any, where: str) -> dict[str, Any]:
    """The fields of an entry.

    Raises:
        ValueError: a field is missing or invalid.
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
        raise ValueError(f"{where}: texts must give a text for each card")
    return data


def _is_cost(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0
