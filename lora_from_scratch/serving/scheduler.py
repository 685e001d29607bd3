"""Selecting the requests for the next forward pass (continuous batching; Orca, Yu et al. 2022, OSDI).

The batch changes at every pass, without waiting for its longest text: before each pass, finished requests leave and
waiting requests join, in order of arrival. The first waiting request joins as soon as

- there is a free row,
- its adapter has been read from disk, and
- the pool is large enough for it and all running requests, even if each generates its maximum number of tokens.

The last condition looks ahead (`peak_pages`; S-LoRA, Sheng et al. 2023, section 5.2, adopts it from LightLLM), so a
running request never has to be preempted. Waiting requests are never overtaken and every running request finishes, so
no request waits forever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from lora_from_scratch.models.checkpoint import LanguageModel
from lora_from_scratch.serving.adapter_store import READ_AHEAD, AdapterStore, AdapterVersion, Resident
from lora_from_scratch.serving.any_model import paged_model
from lora_from_scratch.serving.page_pool import PageLayout
from lora_from_scratch.serving.paged_model import Text, order
from lora_from_scratch.serving.sampling import Sampling, choose_tokens

PATIENCE = 0.02  # seconds that a pass waits for the next request's adapter; most are read in less time


@dataclass(eq=False)
class Request:
    """A request to continue a text.

    Attributes:
        prompt: at least one token id.
        max_tokens: the maximum number of tokens to generate, at least 1.
        adapter: the adapter to use; None for the base model.
        sampling: the sampling settings.
        stop: token ids that end the text; they are not part of it.
        tokens: the tokens generated so far.
    """

    prompt: Sequence[int]
    max_tokens: int
    adapter: AdapterVersion | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """An event of a request: a new token, its end, or both.

    Attributes:
        request: the request.
        token: the new token, if any.
        finished: "stop", "length", "error" (the request cannot be run) or "failure" (an error in the server); None if
            the request is still running.
        error: the error message, if `finished` is "error".
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
    """Runs requests on a model. Not thread-safe; see `engine.py`.

    Args:
        model: a model without adapters.
        store: the adapters and the pool.
        max_rows: the maximum number of requests in a pass.
        max_prompt_tokens: the maximum number of prompt tokens in a pass, which limits how long the running requests
            are delayed. A single prompt may be longer.
    """

    def __init__(
        self, model: LanguageModel, store: AdapterStore, max_rows: int = 32, max_prompt_tokens: int = 512
    ) -> None:
        self.store, self.pool = store, store.pool
        self.model = paged_model(model, self.pool)
        self.config = model.config
        self.max_rows, self.max_prompt_tokens = max_rows, max_prompt_tokens
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, _Running] = {}

    def submit(self, request: Request) -> None:
        """Add a request to the queue.

        Raises:
            ValueError: the request can never be run; see `check`.
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
        pages = self.pool.layout.pages_for_tokens(total - 1)  # the last token's keys and values are not needed
        if pages > len(self.pool):
            raise ValueError(f"the request needs {pages} pages of memory, and the server has only {len(self.pool)}")

    def cancel(self, request: Request) -> None:
        """Remove a request, waiting or running. Idempotent."""
        if request in self.running:
            self._leave(self.running[request])
        elif request in self.waiting:
            self.waiting.remove(request)

    def step(self) -> list[Event]:
        """Admit waiting requests, run one forward pass, and remove the finished requests.

        Returns:
            The events, including one for each running request; empty if there is nothing to do.
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
        joined, patience = 0, PATIENCE  # `joined` counts prompt tokens; only the first adapter is waited for
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
        """Whether the pool is large enough for a request in addition to all running ones.

        Raises:
            ValueError: the pool is too small for the request even on its own, or its adapter cannot be read.
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
        """The requests in the order of the packed batch: decoding ones, grouped by adapter, then prompts."""
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
        """Append the next token to a request."""
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
    """The peak number of pages in use by texts and their adapters, if each text reaches its maximum length.

    A text takes more pages until it finishes and then frees them all, so the peak occurs just before a text finishes.

    Args:
        stored: the number of tokens of each text in the pool; for a prompt that is processed in the next pass, its
            length minus one.
        left: the number of passes left for each text; each pass adds a token.
        adapters: (number of pages, passes until its last text is finished) of each adapter.
    """
    ends = np.array(left)  # (texts,): the passes after which a text finishes
    runs = ends[None, :] >= ends[:, None]  # (moments, texts)
    pages = -(-(np.array(stored)[None, :] + ends[:, None]) // layout.tokens)
    total = (pages * runs).sum(axis=1)
    for size, end in adapters:
        total += size * (end >= ends)
    return int(total.max())
