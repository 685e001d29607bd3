"""Which requests are in the next forward pass (continuous batching; Orca, Yu et al. 2022, OSDI).

A batch is not kept until its longest text is finished: before every pass, requests that are finished leave and waiting
ones join, in the order in which they came. The first of those that wait joins as soon as

- there is a row for it,
- its adapter has been read from the disk, and
- the pool is large enough for it and all that run, up to the last token that each of them may generate.

The last condition looks ahead (`peak_pages`; S-LoRA, Sheng et al. 2023, section 5.2, has it from LightLLM), so that no
request that runs ever has to make way for another. Nobody overtakes the first one, and all that run come to an end, so
every request gets its turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.serving.adapter_store import READ_AHEAD, AdapterStore, AdapterVersion, Resident
from lora_from_scratch.serving.page_pool import PageLayout
from lora_from_scratch.serving.paged_model import PagedModel, Text, order
from lora_from_scratch.serving.sampling import Sampling, choose_tokens

PATIENCE = 0.02  # seconds that a pass waits for the adapter of the next request; most are read in less


@dataclass(eq=False)
class Request:
    """A text to be continued.

    Attributes:
        prompt: at least one token id.
        max_tokens: the most tokens to generate, at least one.
        adapter: None: the base.
        stop: token ids that end the text; they are not part of it.
        tokens: that have been generated so far.
    """

    prompt: Sequence[int]
    max_tokens: int
    adapter: AdapterVersion | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """What has happened to a request: a new token, or its end, or both.

    Attributes:
        token: None: no new one.
        finished: "stop", "length", "error" (it cannot be run) or "failure" (the program's own); None: it runs on.
        error: what is wrong with the request.
    """

    request: Request
    token: int | None = None
    finished: str | None = None
    error: str | None = None


@dataclass(eq=False)
class _Running:
    request: Request
    adapter: Resident | None
    generator: torch.Generator
    stored: int = 0  # tokens whose keys and values are in the pool

    @property
    def unread(self) -> Sequence[int]:
        return self.request.tokens[-1:] if self.stored else self.request.prompt

    @property
    def passes_left(self) -> int:
        return self.request.max_tokens - len(self.request.tokens)


class Scheduler:
    """Runs requests on a model. Not for several threads (`engine.py` is).

    Args:
        model: not adapted.
        store: the adapters, and the pool.
        max_rows: the most requests in a pass.
        max_prompt_tokens: the most tokens of prompts in a pass, unless one prompt alone has more: those that run wait
            for them.
    """

    def __init__(self, model: GPT2, store: AdapterStore, max_rows: int = 32, max_prompt_tokens: int = 512) -> None:
        self.store, self.pool = store, store.pool
        self.model = PagedModel(model, self.pool)
        self.config = model.config
        self.max_rows, self.max_prompt_tokens = max_rows, max_prompt_tokens
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, _Running] = {}

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn.

        Raises:
            ValueError: it can never be run; see `check`.
        """
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Raise a ValueError if a request is malformed, longer than the context, or needs more than the whole pool."""
        prompt, context = request.prompt, self.config.n_positions
        if not prompt or request.max_tokens < 1:
            raise ValueError("a request needs at least one token of prompt, and max_tokens of at least 1")
        if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
            raise ValueError(f"the prompt has a token id outside 0 to {self.config.vocab_size - 1}")
        total = len(prompt) + request.max_tokens
        if total > context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; with max_tokens={request.max_tokens} that is {total}, more than "
                f"the model's context of {context}"
            )
        pages = self.pool.layout.pages_for_tokens(total - 1)  # the last token is not read again
        if pages > len(self.pool):
            raise ValueError(f"the request needs {pages} pages of memory, and the server has only {len(self.pool)}")

    def cancel(self, request: Request) -> None:
        """Forget a request, waiting or running. Idempotent."""
        if request in self.running:
            self._leave(self.running[request])
        elif request in self.waiting:
            self.waiting.remove(request)

    def step(self) -> list[Event]:
        """Let requests join, run one forward pass, let those that are finished leave.

        Returns:
            What has happened, a new token of each running request among it; empty: there is nothing to do.
        """
        events = list(self._admit())
        if not self.running:
            return events
        rows = self._rows()
        logits = self.model([self._text(row) for row in rows])
        tokens = choose_tokens(logits, [row.request.sampling for row in rows], [row.generator for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            row.stored += len(row.unread)
            events.append(self._take(row, token))
        return events

    # --- Joining ---

    def _admit(self) -> Iterator[Event]:
        self.store.read_ahead(r.adapter for r in islice(self.waiting, 2 * READ_AHEAD) if r.adapter is not None)
        joined, patience = 0, PATIENCE  # tokens of prompts; for the first adapter only
        while self.waiting and len(self.running) < self.max_rows:
            request = self.waiting[0]
            if joined and joined + len(request.prompt) > self.max_prompt_tokens:
                return
            if request.adapter is not None and self.running:
                if not self.store.is_ready(request.adapter, patience):
                    return
                patience = 0.0
            try:
                if not self._fits(request):
                    return
                resident = None if request.adapter is None else self.store.acquire(request.adapter)
            except (ValueError, OSError) as error:
                self.waiting.popleft()
                yield Event(request, finished="error", error=str(error))
                continue
            self.waiting.popleft()
            joined += len(request.prompt)
            self.running[request] = _Running(request, resident, request.sampling.generator())

    def _fits(self, request: Request) -> bool:
        """Whether the pool is large enough for a request beside all that run.

        Raises:
            ValueError: it would not be even if nothing else ran; or its adapter cannot be read.
        """
        stored = [len(request.prompt) - 1]
        left = [request.max_tokens]
        adapters = (
            {} if request.adapter is None else {request.adapter: (self.store.pages_for(request.adapter), left[0])}
        )
        alone = peak_pages(stored, left, list(adapters.values()), self.pool.layout)
        if alone > len(self.pool):
            raise ValueError(
                f"the request and its adapter need {alone} pages of memory; the server has {len(self.pool)}"
            )
        for row in self.running.values():
            stored.append(row.stored or len(row.request.prompt) - 1)
            left.append(row.passes_left)
            if row.adapter is not None:
                version = row.adapter.version
                longest = max(row.passes_left, adapters.get(version, (0, 0))[1])
                adapters[version] = (row.adapter.pages, longest)
        return peak_pages(stored, left, list(adapters.values()), self.pool.layout) <= len(self.pool)

    # --- Running ---

    def _rows(self) -> list[_Running]:
        """The requests in the order of the packed batch: decoding first, then prompts, equal adapters together."""
        decoding = [row for row in self.running.values() if row.stored]
        places = order([None if row.adapter is None else row.adapter.rows for row in decoding])
        return [decoding[place] for place in places] + [row for row in self.running.values() if not row.stored]

    def _text(self, row: _Running) -> Text:
        tokens = row.unread
        have = len(self.pool.tables.get(row.request, ()))
        missing = self.pool.layout.pages_for_tokens(row.stored + len(tokens)) - have
        if missing:
            self.store.make_room(missing)
            self.pool.allocate(row.request, missing)
        adapter = None if row.adapter is None else row.adapter.rows
        return Text(tokens, row.stored, self.pool.tables[row.request], adapter)

    def _take(self, row: _Running, token: int | None) -> Event:
        """Give a request its next token."""
        request = row.request
        if token is None:
            self._leave(row)
            why = "the model's logits are not numbers (NaN): the adapter is damaged or its training diverged"
            return Event(request, finished="error", error=why)
        if token in request.stop:
            self._leave(row)
            return Event(request, finished="stop")
        request.tokens.append(token)
        if row.passes_left:
            return Event(request, token)
        self._leave(row)
        return Event(request, token, finished="length")

    def _leave(self, row: _Running) -> None:
        del self.running[row.request]
        self.pool.release(row.request)
        if row.adapter is not None:
            self.store.release(row.adapter)


def peak_pages(
    stored: Sequence[int], left: Sequence[int], adapters: Sequence[tuple[int, int]], layout: PageLayout
) -> int:
    """The most pages that texts and their adapters will have at a time, if each text generates all that it may.

    A text takes pages until it is finished, and then returns them, so the most are in use just before one of them is.

    Args:
        stored: tokens of each text that are in the pool already; for a prompt that is read in the next pass, its length
            minus one.
        left: how many more passes each text takes part in; each adds a token.
        adapters: (pages, the passes until its last text is finished) of each.
    """
    ends = np.array(left)  # (texts,): the moments at which a text is about to finish
    runs = ends[None, :] >= ends[:, None]  # (moments, texts)
    pages = -(-(np.array(stored)[None, :] + ends[:, None]) // layout.tokens)
    total = (pages * runs).sum(axis=1)
    for size, end in adapters:
        total += size * (end >= ends)
    return int(total.max())
