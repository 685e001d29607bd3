"""The tables of serving.md, from the measurements in serving.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).with_name("serving.md")
COUNTED = ("distinct", "loads")
LOADING = "peft with loading"
OTHERS = {
    "merge": "(a) merge and switch",
    "loop": "(b) one after another",
    LOADING: "(c) peft",
    "peft": "(c) peft, all loaded before",
    "base": "(d) base",
}

HEAD = """\
# Serving many adapters

`python -m benchmarks.serving` writes this file; its first lines say how. torch on a CPU, one thread, float32.

The machine had two cores, of which the benchmark had one to itself; other programs used the second. The ratios are of
**processor time** of the process, in which a program that has to wait is not charged (though it is slower where others
fill the caches). The sides of a round answer the same requests one after the other, in an order that turns. A cell has
the median (smallest to largest) of the rounds, where there are several. Most adapters are hard links to 64 (bundled) or
24 (GPT-2 small, with random weights) distinct weight files, so the time of reading from a disk is not measured.
"""


def write(values: Mapping[str, Any]) -> None:
    """Write serving.md."""
    parts = [HEAD, *product(values), *traffic(values), *cliff(values), *start(values), *load(values)]
    OUTPUT.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    low, high = min(numbers), max(numbers)
    return f"{statistics.median(numbers):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def under(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def product(values: Mapping[str, Any]) -> Iterator[str]:
    found = under(values, "product/")
    if not found:
        return
    yield "## Decoding: 16 rows of one token, 8 adapters of rank 8\n"
    yield "Ours divided by peft's `adapter_names`, measured in pairs: the whole step of the model, and only what the"
    yield "adapters add in all linear layers. Goal: 0.5.\n"
    yield row(["model", "what", "processor time", "clock", "pairs"])
    yield row(["---", "---", "---", "---", "---:"])
    for model in ("small", "bundled"):
        for what, words in (("step", "whole step"), ("alone", "adapters alone")):
            times = under(found, f"{model}/{what}/")
            numbers = {name.split("/")[0] for name in times}
            pairs = [n for n in numbers if f"{n}/ours" in times and f"{n}/peft" in times]
            if pairs:
                ratios = [[times[f"{p}/ours"][n] / times[f"{p}/peft"][n] for p in pairs] for n in (1, 0)]
                yield row([model, words, *map(spread, ratios), len(pairs)])
    yield ""


def traffic(values: Mapping[str, Any]) -> Iterator[str]:
    for model in ("bundled", "small"):
        found = under(values, f"traffic/{model}/")
        counts = sorted({int(name.split("/")[0]) for name in found})
        if not counts:
            continue
        yield f"## Zipf traffic, {model}, ranks 4 to 32, 32 rows\n"
        yield "Times the throughput of each other way: its processor time divided by ours. In brackets the smallest,"
        yield "the largest, and the number of rounds. Every way but (d) loads the adapters that it needs; peft keeps as"
        yield "many as fit into our pool. The next to last column leaves out the time that peft takes to load them.\n"
        yield row(["adapters", "distinct in a round", "loaded in a round", *OTHERS.values()])
        yield row(["---:", "---:", "---:", *["---"] * len(OTHERS)])
        for count in counts:
            rounds = under(found, f"{count}/")
            turns = [name.removesuffix("/ours") for name in rounds if name.endswith("/ours")]
            distinct, loads = (statistics.median(rounds[f"{turn}/ours"][what] for turn in turns) for what in COUNTED)
            cells = [speedups(rounds, turns, side) for side in OTHERS]
            yield row([f"{count:,}", f"{distinct:g}", f"{loads:g}", *cells])
        yield ""
        same, compared = equal_texts(found)
        yield f"The texts of (a) to (c) are ours, token for token, in {same:,} of {compared:,} cases.\n"


def speedups(rounds: Mapping[str, Any], turns: Sequence[str], side: str) -> str:
    name = "peft" if side == LOADING else side
    times = []
    for turn in turns:
        if f"{turn}/{name}" in rounds:
            theirs = rounds[f"{turn}/{name}"]
            seconds = theirs["seconds"][1] + (theirs["loading"][1] if side == LOADING else 0)
            times.append((seconds, rounds[f"{turn}/ours"]["seconds"][1]))
    return spread([theirs / ours for theirs, ours in times])[:-1] + f"; {len(times)})" if times else "not measured"


def equal_texts(found: Mapping[str, Any]) -> tuple[int, int]:
    """How many texts of the other ways equal ours, and of how many."""
    same = compared = 0
    for name, value in found.items():
        prefix, _, side = name.rpartition("/")
        if side in OTHERS and side != "base" and f"{prefix}/ours" in found:
            ours = found[f"{prefix}/ours"]["texts"]
            same += sum(a == b for a, b in zip(value["texts"], ours, strict=True))
            compared += len(ours)
    return same, compared


def cliff(values: Mapping[str, Any]) -> Iterator[str]:
    found = under(values, "cliff/")
    turns = sorted({name.split("/")[0] for name in found})
    sizes = sorted({int(name.split("/")[1]) for name in found}, reverse=True)
    turns = [turn for turn in turns if all(f"{turn}/{size}" in found for size in sizes)]
    if not turns:
        return
    yield "## The cliff: 64 adapters of rank 16, all equally popular, 96 requests, bundled model\n"
    yield "The pool has room for 32 texts and so many adapters; throughput relative to the first line.\n"
    yield row(["adapters in the pool", "loads", "throughput", "rounds"])
    yield row(["---:", "---:", "---", "---:"])
    for size in sizes:
        here = [found[f"{turn}/{size}"] for turn in turns]
        first = [found[f"{turn}/{sizes[0]}"] for turn in turns]
        relative = [a["seconds"][1] / b["seconds"][1] for a, b in zip(first, here, strict=True)]
        yield row([size, f"{statistics.median(h['loads'] for h in here):g}", spread(relative), len(turns)])
    yield ""


def start(values: Mapping[str, Any]) -> Iterator[str]:
    found = under(values, "start/")
    if not found:
        return
    yield "## Starting, and adapters that nobody has asked for\n"
    yield row(["adapters", "opening the store, ms", "listing their names, ms", "memory, MiB"])
    yield row(["---:", "---:", "---:", "---:"])
    for count, value in found.items():
        times = (1e3 * value["seconds"][1], 1e3 * value["listing"][1])
        yield row([f"{int(count):,}", *(f"{ms:.2f}" for ms in times), f"{value['KiB'] / 1024:.2f}"])
    yield ""


def load(values: Mapping[str, Any]) -> Iterator[str]:
    found = under(values, "load/")
    if not found:
        return
    yield "## A thousand clients at once, over HTTP\n"
    yield "One request each, on the loopback device, against `lora-from-scratch serve` with 1,000 adapters.\n"
    yield row(["run", "requests", "answered", "refused with 429", "other errors", "texts that differ"])
    yield row(["---", *["---:"] * 5])
    order: Callable[[str], int] = list(found).index
    for name in sorted(found, key=order):
        value = found[name]
        keys = ("requests", "answered", "refused", "errors", "different")
        yield row([name, *(f"{value[key]:,}" for key in keys)])
    yield ""
