"""Does a verdict depend on the seed? Every answer of the bank is tried with many seeds.

    python -m benchmarks.bank_seeds [UNIT ...] [--seeds 500] [--jobs 2]

Units whose answers all get the verdict that the bank says, with every seed, are entered in bank_seeds.json together
with a hash of the code on which their verdicts depend. `make test` tries the units whose code is not the one recorded
there, and a few exercises of the others, different ones for each commit; `make test-all` tries all.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.units import Unit, find, unit_files, units
from lora_from_scratch.grading.building.dependencies import CONSTRAINTS, PACKAGES, closure, code_of
from lora_from_scratch.support.files import write_atomically
from tests.bank_on_seeds import surprises

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_suffix(".json")
SEEDS = 500
FEWEST = 20  # with fewer seeds a unit does not count as tried; `make test` takes as many
JUDGED_BY = (
    "import lora_from_scratch.checks.notebook, lora_from_scratch.checks.diagnosis, lora_from_scratch.checks.judge"
)


def code(unit: Unit) -> str:
    """A hash of the code on which the unit's verdicts depend, and of the versions of the packages that compute."""
    own = unit_files("*.py", f"unit_{unit.number}")
    files = sorted({*own, *closure([JUDGED_BY, *(file.read_text(encoding="utf-8") for file in own)])})
    lines = (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if line.lower().partition("==")[0] in PACKAGES]
    texts = [(file.parent.name, file.name, code_of(file.read_text(encoding="utf-8"))) for file in files]
    return hashlib.sha256(repr((packages, texts)).encode()).hexdigest()[:16]


@functools.cache
def recorded() -> Mapping[str, Mapping[str, str | int]]:
    """By unit ("unit_09"): the code with which it was tried, and with how many seeds."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}


@functools.cache
def tried(number: str) -> bool:
    """Whether the record is of the unit's present code, and of enough seeds."""
    [unit] = [unit for unit in units() if unit.number == number]
    entry = recorded().get(f"unit_{number}", {})
    return entry.get("code") == code(unit) and int(entry["seeds"]) >= FEWEST


def try_exercise(name: str, seeds: int) -> tuple[str, dict[str, list[str]]]:
    """The answers whose verdict is not what the bank says."""
    exercise = find(name)[1]
    assert isinstance(exercise, Exercise)
    return name, surprises(exercise, range(seeds))


def begin_quickly() -> None:
    """In a worker: what was imported is not garbage, and there are no GPUs to seed, which takes milliseconds a time."""
    gc.freeze()
    torch.manual_seed = torch.default_generator.manual_seed


def record(numbers: Iterable[str], seeds: int) -> None:
    entries = dict(recorded()) | {
        f"unit_{unit.number}": {"code": code(unit), "seeds": seeds} for unit in units() if unit.number in set(numbers)
    }
    text = json.dumps(entries, indent=1, sort_keys=True) + "\n"
    write_atomically(RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("units", nargs="*", help="their numbers; by default all")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [unit for unit in units() if not options.units or unit.number in options.units]
    failed: set[str] = set()
    torch.set_num_threads(1)
    left = {unit.number: {exercise.name for exercise in unit.exercises} for unit in chosen}
    of = {name: number for number, names in left.items() for name in names}
    context = multiprocessing.get_context("fork")  # with one thread each
    with concurrent.futures.ProcessPoolExecutor(options.jobs, context, begin_quickly) as pool:
        waiting = [pool.submit(try_exercise, name, options.seeds) for name in of]
        for done in concurrent.futures.as_completed(waiting):
            name, found = done.result()
            number = of[name]
            left[number].remove(name)
            failed |= {number} if found else set()
            print(f"{number} {name}: {found or 'as the bank says'}", flush=True)
            if not left[number] and number not in failed:
                recorded.cache_clear()
                record([number], options.seeds)
    print(f"{len(chosen) - len(failed)} of {len(chosen)} units get the same verdicts with {options.seeds} seeds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
