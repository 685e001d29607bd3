"""The ways to serve many adapters that `benchmarks.serving` compares. Each answers the same requests with greedy
decoding."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.lora_vs_peft import with_peft
from benchmarks.make_adapters import name_of
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.lora import LoRA, inject_lora
from lora_from_scratch.serving.adapter_reading import AdapterReader
from lora_from_scratch.serving.adapter_store import AdapterStore
from lora_from_scratch.serving.batched_lora import BatchedLoRALinear, Factors, switch_task
from lora_from_scratch.serving.page_pool import PageLayout, PagePool
from lora_from_scratch.serving.scheduler import Request, Scheduler

ROWS = 32  # requests in a batch, on every side


@dataclass(frozen=True)
class Asked:
    """One request of the traffic."""

    adapter: str
    prompt: tuple[int, ...]
    new: int


def zipf_traffic(adapters: int, requests: int, prompt: int, new: int, vocabulary: int, seed: int) -> list[Asked]:
    """Requests whose adapters are drawn with probability proportional to 1 / rank. All of them arrive at the start."""
    draw = random.Random(seed)
    chosen = draw.choices(range(adapters), [1 / (n + 1) for n in range(adapters)], k=requests)
    return [Asked(name_of(n), tuple(draw.randrange(1, vocabulary) for _ in range(prompt)), new) for n in chosen]


Side = Callable[[Sequence[Asked]], list[list[int]]]


class Ours:
    """This library's server without HTTP. Its state is kept between calls, as in a running server.

    Args:
        model: a model without adapters.
        folder: the folder with the adapters.
        pages: the number of pages in the pool.
        with_adapters: if False, all requests use the base model (d).
    """

    def __init__(self, model: GPT2, folder: Path, pages: int, with_adapters: bool = True) -> None:
        self.store = AdapterStore(model, PagePool(PageLayout.for_model(model.config), pages), folder)
        self.scheduler = Scheduler(model, self.store, ROWS)
        self.with_adapters = with_adapters

    def __call__(self, asked: Sequence[Asked]) -> list[list[int]]:
        requests = self.submit(asked)
        while self.scheduler.waiting or self.scheduler.running:
            for event in self.scheduler.step():
                assert event.error is None, event.error
        return [request.tokens for request in requests]

    def submit(self, asked: Sequence[Asked]) -> list[Request]:
        requests = []
        for one in asked:
            version = self.store.find(one.adapter) if self.with_adapters else None
            requests.append(Request(one.prompt, one.new, version))
            self.scheduler.submit(requests[-1])
        return requests


def windows(asked: Sequence[Asked]) -> Iterator[list[int]]:
    """The indices of the requests, one batch at a time, in order of arrival."""
    for start in range(0, len(asked), ROWS):
        yield list(range(start, min(start + ROWS, len(asked))))


def by_adapter(asked: Sequence[Asked], window: Sequence[int]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number in window:
        groups.setdefault(asked[number].adapter, []).append(number)
    return groups


def merge_and_switch(model: GPT2, folder: Path) -> Side:
    """(a) For each adapter in a batch: merge it into the weights in place of the last one, then answer its requests."""
    reader = AdapterReader(model)

    def run(asked: Sequence[Asked]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in asked]
        merged: Factors = {}
        for window in windows(asked):
            for name, group in by_adapter(asked, window).items():
                factors = factors_of(reader, folder / name)
                switch_task(model, merged, factors)
                merged = factors
                answer(model, asked, group, answers)
        switch_task(model, merged, {})
        return answers

    return run


def one_after_another(model: GPT2, folder: Path) -> Side:
    """(b) For each adapter in a batch: apply it without merging, then answer its requests."""
    reader = AdapterReader(model)

    def run(asked: Sequence[Asked]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in asked]
        bases = {name: module for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
        for window in windows(asked):
            for name, group in by_adapter(asked, window).items():
                layers: dict[str, nn.Module] = {}
                for place, factors in factors_of(reader, folder / name).items():
                    layer = BatchedLoRALinear(bases[place], [factors])
                    layer.adapter_index = torch.zeros(len(group), dtype=torch.long)
                    layers[place] = layer
                inject_lora(model, layers)
                answer(model, asked, group, answers)
                inject_lora(model, bases)
        return answers

    return run


def factors_of(reader: AdapterReader, directory: Path) -> Factors:
    return {name: (layer.A, layer.B.T) for name, layer in reader.read(directory).items()}


def answer(model: GPT2, asked: Sequence[Asked], group: Sequence[int], answers: list[list[int]]) -> None:
    texts = generate(model, [asked[n].prompt for n in group], max_new_tokens=asked[group[0]].new)
    for number, tokens in zip(group, texts, strict=True):
        answers[number] = tokens


class Peft:
    """(c) peft's `adapter_names` on transformers' model, whose `generate` processes one batch at a time.

    Its adapters are loaded before the requests are answered, and stay loaded until there are more than `held`; the
    least recently used ones are deleted first.

    Args:
        model: a model without adapters.
        folder: the folder with the adapters.
        held: the number of adapters for which there is room.
    """

    def __init__(self, model: GPT2, folder: Path, held: int = 64) -> None:
        method = LoRA(rank=1)
        method.adapt(model)
        self.model: Any = with_peft(model, method).eval()
        method.undo(model)
        self.folder, self.held = folder, held
        self.loaded: list[str] = []  # the least recently used first

    def make_room(self, asked: Sequence[Asked]) -> None:
        """Delete adapters that these requests do not need, until there is room for those that they need."""
        names = {one.adapter for one in asked}
        unused = [name for name in self.loaded if name not in names]
        for name in unused[: max(0, len(unused) + len(names) - self.held)]:
            self.model.delete_adapter(name)
            self.loaded.remove(name)

    def load(self, asked: Sequence[Asked]) -> int:
        """Load the adapters that these requests need, and return how many were missing."""
        names = list(dict.fromkeys(one.adapter for one in asked))
        missing = [name for name in names if name not in self.loaded]
        for name in missing:
            self.model.load_adapter(self.folder / name, adapter_name=name, low_cpu_mem_usage=True)
        self.loaded = [name for name in self.loaded if name not in names] + names
        return len(missing)

    def __call__(self, asked: Sequence[Asked]) -> list[list[int]]:
        answers: list[list[int]] = []
        for window in windows(asked):
            ids = torch.tensor([asked[n].prompt for n in window])
            with torch.no_grad():
                texts = self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    adapter_names=[asked[n].adapter for n in window],
                    max_new_tokens=asked[window[0]].new,
                    min_new_tokens=asked[window[0]].new,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=0,
                )
            answers += texts[:, ids.shape[1] :].tolist()
        return answers
