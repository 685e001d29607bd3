"""Serving many adapters: compares this library with alternatives and writes serving.md.

    python -m benchmarks.serving product                         # the batched product alone, compared with peft's
    python -m benchmarks.serving traffic --model bundled --adapters 8 64 1000 4000
    python -m benchmarks.serving traffic --model small --adapters 8 1000 --requests 32 --new 16
    python -m benchmarks.serving cliff                           # pools smaller than the working set
    python -m benchmarks.serving start                           # startup time and memory
    python -m benchmarks.serving_load                            # the HTTP server with a thousand clients

Each measurement is stored in serving.json as soon as it is made and is not repeated, so an interrupted run can be
continued. In every round, all sides answer the same requests, one side after another, in rotating order.
`benchmarks.make_adapters` writes the adapters to `--folder`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import serving_table
from benchmarks.lora_vs_peft import base_model
from benchmarks.make_adapters import make_adapters, name_of
from benchmarks.serving_sides import Asked, Ours, Peft, Side, merge_and_switch, one_after_another, zipf_traffic
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.serving.adapter_store import AdapterStore
from lora_from_scratch.serving.mixed_product import add_lora_
from lora_from_scratch.serving.page_pool import PageLayout, PagePool
from lora_from_scratch.support.files import write_json

RESULTS = Path(__file__).with_suffix(".json")
POOL_MIB = {"bundled": 256, "small": 1024, "tiny": 16}
DISTINCT = {"bundled": 64, "small": 24, "tiny": 4}  # the number of weight files; the other adapters are links to them
HELD = {
    "bundled": 128,
    "small": 86,
    "tiny": 8,
}  # adapters for which peft has room: as many as in our pool with 32 texts
SIDES = ("ours", "base", "merge", "loop", "peft")
MiB = 2**20


class Results:
    """The stored measurements, by name."""

    def __init__(self, path: Path = RESULTS) -> None:
        self.path = path
        self.values = self._read()

    def _read(self) -> dict[str, Any]:
        return dict(json.loads(self.path.read_text())) if self.path.exists() else {}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a stored measurement, or make and store it."""
        if name not in self.values:
            value = measure()
            self.values = {**self._read(), name: value}  # another run may have added measurements
            write_json(self.path, self.values)
            print(f"{name}: {self.values[name]}", flush=True)
        return self.values[name]


def timed(work: Callable[[], Any]) -> tuple[Any, list[float]]:
    """The result of `work`, and its wall-clock time and processor time in seconds."""
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, [time.perf_counter() - clock, time.process_time() - processor]


def pages_of(model: GPT2, mib: int) -> int:
    return mib * MiB // (4 * PageLayout.for_model(model.config).size)


# --- The batched product alone -----------------------------------------------------------------------------


def product(arguments: argparse.Namespace, results: Results) -> None:
    """16 rows of one token and 8 adapters of rank 8, paired with peft: the whole step, and the LoRA products alone."""
    model = base_model(arguments.model).eval()
    folder = arguments.folder / f"{arguments.model}-rank-8"
    make_adapters(folder, 8, model.config, (8, 8), 8)
    asked = [Asked(name_of(row % 8), (7 + row,), 100) for row in range(16)]
    peft = Peft(model, folder)
    peft.load(asked)
    side = Ours(model, folder, pages_of(model, 256))
    side.submit(asked)
    for _ in range(3):
        side.scheduler.step()
    ids = torch.tensor([one.prompt for one in asked])
    names = [one.adapter for one in asked]

    @torch.no_grad()
    def theirs() -> None:
        peft.model(ids, adapter_names=names, use_cache=False)

    pairs(results, f"product/{arguments.model}/step", arguments.pairs, {"ours": side.scheduler.step, "peft": theirs})
    alone = products_alone(side, peft, names)
    pairs(results, f"product/{arguments.model}/alone", arguments.pairs, alone)


def products_alone(side: Ours, peft: Peft, names: list[str]) -> dict[str, Callable[[], Any]]:
    """Only the products of the adapters, in every linear layer, with the base's output given."""
    plans, pool = side.scheduler.model.plans, side.scheduler.pool.data
    modules = dict(peft.model.base_model.model.named_modules())
    layers, inputs, outputs = {}, {}, {}
    for name in plans:
        layer = modules[name]
        inputs[name], outputs[name] = torch.randn(16, 1, layer.in_features), torch.randn(16, 1, layer.out_features)
        layer.base_layer = Given(outputs[name])
        layers[name] = layer

    @torch.no_grad()
    def ours() -> None:
        for name, plan in plans.items():
            add_lora_(outputs[name][:, 0].clone(), inputs[name][:, 0], pool, plan)

    @torch.no_grad()
    def theirs() -> None:
        for name, layer in layers.items():
            layer(inputs[name], adapter_names=names)

    return {"ours": ours, "peft": theirs}


class Given(torch.nn.Module):
    """A layer that returns a given output."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output.clone()


def pairs(results: Results, prefix: str, count: int, works: dict[str, Callable[[], Any]]) -> None:
    for work in works.values():
        work()
    for pair in range(count):
        for name in sorted(works, reverse=bool(pair % 2)):
            results.get(f"{prefix}/{pair}/{name}", partial(seconds_of, works[name]))


def seconds_of(work: Callable[[], Any]) -> list[float]:
    return timed(work)[1]


# --- Traffic -----------------------------------------------------------------------------------------------


def traffic(arguments: argparse.Namespace, results: Results) -> None:
    name = arguments.model
    model = base_model(name).eval()
    folder = arguments.folder / name
    make_adapters(folder, max(arguments.adapters), model.config, (4, 32), DISTINCT[name])
    pages = pages_of(model, POOL_MIB[name])
    make: dict[str, Callable[[], Side]] = {
        "ours": lambda: Ours(model, folder, pages),
        "base": lambda: Ours(model, folder, pages, with_adapters=False),
        "merge": lambda: merge_and_switch(model, folder),
        "loop": lambda: one_after_another(model, folder),
        "peft": lambda: Peft(model, folder, HELD[name]),
    }
    sides = {side: make[side]() for side in arguments.sides}
    sizes = arguments.requests, arguments.prompt, arguments.new, model.config.vocab_size
    before = zipf_traffic(max(arguments.adapters), *sizes, seed=99)  # as if the server had been running for a while
    for side in sides.keys() & {"ours", "base"}:
        sides[side](before)
    if "peft" in sides:
        peft: Any = sides["peft"]
        peft.load(before)
    for turn in range(arguments.rounds):
        for count in arguments.adapters:
            asked = zipf_traffic(count, *sizes, seed=turn)
            one_round(results, f"traffic/{name}/{count}/{turn}", asked, sides, turn)


def one_round(results: Results, prefix: str, asked: Sequence[Asked], sides: dict[str, Side], turn: int) -> None:
    def measure(side: str) -> dict[str, Any]:
        run: Any = sides[side]
        loads, loading = 0, [0.0, 0.0]
        if side == "peft":
            run.make_room(asked)
            loads, loading = timed(lambda: run.load(asked))
        elif side == "ours":
            loads = -run.store.loads
        answers, seconds = timed(lambda: run(asked))
        found = {
            "seconds": seconds,
            "tokens": sum(map(len, answers)),
            "distinct": len({one.adapter for one in asked}),
            "texts": [zlib.crc32(repr(tokens).encode()) for tokens in answers],  # for comparison with the other sides
        }
        if side == "ours":
            return found | {"loads": loads + run.store.loads}
        return found | ({"loads": loads, "loading": loading} if side == "peft" else {})

    order = [*sides][turn % len(sides) :] + [*sides][: turn % len(sides)]
    for side in order:
        results.get(f"{prefix}/{side}", partial(measure, side))


# --- The cliff ---------------------------------------------------------------------------------------------


def cliff(arguments: argparse.Namespace, results: Results) -> None:
    """64 equally popular adapters of rank 16, with pools that have room for fewer and fewer of them."""
    model = base_model("bundled").eval()
    folder = arguments.folder / "bundled-rank-16"
    make_adapters(folder, 64, model.config, (16, 16), 64)
    text = PageLayout.for_model(model.config).pages_for_tokens(arguments.prompt + arguments.new)
    sides = {}
    for held in (64, 48, 32, 16, 8):
        side = Ours(model, folder, 1)
        each = side.store.pages_for(side.store.find(name_of(0)))
        sides[held] = Ours(model, folder, 32 * text + held * each)
        sides[held](even_traffic(64, 64, arguments, model, 99))
    for turn in range(arguments.rounds):
        asked = even_traffic(64, 96, arguments, model, turn)
        for held, side in sides.items():
            results.get(f"cliff/{turn}/{held}", partial(measure_cliff, side, asked))


def even_traffic(adapters: int, requests: int, arguments: argparse.Namespace, model: GPT2, seed: int) -> list[Asked]:
    drawn = zipf_traffic(1, requests, arguments.prompt, arguments.new, model.config.vocab_size, seed)
    order = torch.randperm(requests, generator=torch.Generator().manual_seed(seed)).tolist()
    return [Asked(name_of(order[n] % adapters), one.prompt, one.new) for n, one in enumerate(drawn)]


def measure_cliff(side: Ours, asked: Sequence[Asked]) -> dict[str, Any]:
    loads = side.store.loads
    answers, seconds = timed(lambda: side(asked))
    return {"seconds": seconds, "tokens": sum(map(len, answers)), "loads": side.store.loads - loads}


# --- Starting ----------------------------------------------------------------------------------------------


def start(arguments: argparse.Namespace, results: Results) -> None:
    """Startup time and memory of stores with 1, 1,000 and 4,000 unused adapters."""
    model = base_model("bundled").eval()
    make_adapters(arguments.folder / "one", 1, model.config, (4, 32), 1)
    make_adapters(arguments.folder / "bundled", 4000, model.config, (4, 32), DISTINCT["bundled"])
    make_adapters(arguments.folder / "thousand", 1000, model.config, (4, 32), DISTINCT["bundled"])
    pool = PagePool(PageLayout.for_model(model.config), 8)
    folders = {1: "one", 1000: "thousand", 4000: "bundled"}
    for count, name in folders.items():

        def measure(name: str = name) -> dict[str, Any]:
            before = resident_kib()
            stores, seconds = timed(lambda: [AdapterStore(model, pool, arguments.folder / name) for _ in range(20)])
            names, listing = timed(stores[0].names)
            grown = resident_kib() - before
            return {"seconds": [s / 20 for s in seconds], "listing": listing, "names": len(names), "KiB": grown}

        results.get(f"start/{count}", measure)


def resident_kib() -> int:
    """The resident memory of this process in KiB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["product", "traffic", "cliff", "start", "table"])
    parser.add_argument("--folder", type=Path, default=Path("runs/adapters"), help="the folder for the adapters")
    parser.add_argument("--model", default="small", choices=[*DISTINCT])
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 64, 1000, 4000])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--prompt", type=int, default=16, help="tokens per prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate per request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="the sides to measure")
    parser.add_argument("--pairs", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results()
    if arguments.what != "table":
        {"product": product, "traffic": traffic, "cliff": cliff, "start": start}[arguments.what](arguments, results)
    serving_table.write(results.values)


if __name__ == "__main__":
    main()
