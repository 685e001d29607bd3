"""What a server does with given traffic, without a model: passes, loads, evictions, waiting times, pages in use.

The decisions are those of `Scheduler` and `AdapterStore` (`tests/test_simulation.py` compares them), but only pages are
counted. A simulation takes milliseconds and gives the same numbers every time, so it answers questions about capacity:
how large must the pool be for this traffic?
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_from_scratch.serving import adapter_store, page_pool
from lora_from_scratch.serving.page_pool import PageLayout
from lora_from_scratch.serving.scheduler import peak_pages

InBatch = tuple[str | None, int, int]  # a request: its adapter, the tokens stored, the passes left


def joining(
    waiting: Sequence[InBatch],
    running: Sequence[InBatch],
    sizes: Mapping[str, int],
    pages: int,
    max_rows: int,
    layout: PageLayout,
) -> int:
    """How many of the waiting requests join the running ones in the next pass.

    They join in the order in which they wait. The first one that does not fit ends the step: those behind it do not
    overtake it, even if they are small. A request fits if, together with all that run or have just joined,

    - there are at most `max_rows` requests;
    - they never need more than `pages` pages, even if each runs until it has no passes left (`peak_pages`).

    An adapter needs its pages once, however many requests use it, until the last of them has finished. Adapters that
    none of these requests uses need no pages, since they can be evicted.

    Args:
        waiting: (adapter, stored, left) of each: the name of its adapter or None, the number of tokens that it has
            stored (before its first pass, the length of its prompt minus one), and the number of passes that it has
            left.
        running: the same of each running request.
        sizes: the number of pages of each adapter, by name.
        pages: the number of pages in the pool.
        max_rows: the maximum number of requests in the batch.
        layout: the layout of a page, for `peak_pages`.

    Returns:
        The number of requests that join, from 0 to `len(waiting)`.
    """
    batch = list(running)
    for count, request in enumerate(waiting):
        batch.append(request)
        ends: dict[str, int] = {}  # adapter -> the passes until its last request has finished
        for adapter, _, left in batch:
            if adapter is not None:
                ends[adapter] = max(left, ends.get(adapter, 0))
        adapters = [(sizes[adapter], end) for adapter, end in ends.items()]
        peak = peak_pages([stored for _, stored, _ in batch], [left for _, _, left in batch], adapters, layout)
        if len(batch) > max_rows or peak > pages:
            return count
    return len(waiting)


@dataclass(frozen=True)
class Job:
    """A request without its text: its adapter, the tokens of its prompt, and the tokens that it generates."""

    adapter: str | None
    prompt: int
    new: int


@dataclass
class Report:
    """What happened.

    Attributes:
        loads: the number of adapters that were read into the pool.
        evictions: the number of adapters that were evicted.
        joined: the pass in which each job joined, counted from 0.
        owners: the owner of each page after each pass: the name of an adapter, the number of a job, or None.
    """

    loads: int = 0
    evictions: int = 0
    joined: list[int] = field(default_factory=list)
    owners: list[list[str | int | None]] = field(default_factory=list)

    @property
    def passes(self) -> int:
        return len(self.owners)


def simulate(
    jobs: Sequence[Job],
    sizes: Mapping[str, int],
    pages: int,
    layout: PageLayout,
    max_rows: int = 32,
    *,
    table: Callable[[int], Any] | None = None,
    evict: Callable[..., Any] | None = None,
    join: Callable[..., int] | None = None,
) -> Report:
    """Serve these jobs, all of which wait at the start.

    Args:
        jobs: in the order of their arrival.
        sizes: the number of pages of each adapter, by name.
        pages: the number of pages in the pool.
        layout: the layout of a page.
        max_rows: the maximum number of jobs in a pass.
        table, evict, join: replace `PageTable`, `to_evict` and `joining`.

    Raises:
        ValueError: a job does not fit into the pool even on its own.
    """
    server = _Server(sizes, (table or page_pool.PageTable)(pages), evict or adapter_store.to_evict)
    join, report = join or joining, Report()
    waiting = deque(enumerate(jobs))
    while waiting or server.running:
        behind: list[InBatch] = [(job.adapter, job.prompt - 1, job.new) for _, job in waiting]
        count = join(behind[:max_rows], list(server.running.values()), sizes, pages, max_rows, layout)
        if not count and not server.running:
            raise ValueError(f"job {waiting[0][0]} and its adapter need more than {pages} pages")
        for _ in range(count):
            server.start(*waiting.popleft())
            report.joined.append(report.passes)
        server.run(layout)
        report.owners.append(server.owners(pages))
        server.finish()
    report.loads, report.evictions = server.loads, server.evictions
    return report


class _Server:
    """The state of a simulated server."""

    def __init__(self, sizes: Mapping[str, int], table: Any, evict: Callable[..., Any]) -> None:
        self.sizes, self.table, self.evict = sizes, table, evict
        self.running: dict[int, InBatch] = {}
        self.resident: list[str] = []  # adapters in the pool, the least recently used first
        self.loads = self.evictions = 0

    def start(self, number: int, job: Job) -> None:
        name = job.adapter
        if name is not None:
            if name in self.resident:
                self.resident.remove(name)
            else:
                self.make_room(self.sizes[name])
                self.table.allocate(name, self.sizes[name])
                self.loads += 1
            self.resident.append(name)
        self.running[number] = (name, job.prompt - 1, job.new)

    def run(self, layout: PageLayout) -> None:
        """One pass: every running job stores one more token, or its prompt."""
        for number, (name, stored, left) in self.running.items():
            missing = layout.pages_for_tokens(stored + 1) - len(self.table.tables.get(number, ()))
            if missing > 0:
                self.make_room(missing)
                self.table.allocate(number, missing)
            self.running[number] = (name, stored + 1, left - 1)

    def finish(self) -> None:
        for number in [number for number, (_, _, left) in self.running.items() if not left]:
            del self.running[number]
            self.table.release(number)

    def make_room(self, pages: int) -> None:
        used = [name for name, _, _ in self.running.values()]
        adapters = [(name, self.sizes[name], used.count(name)) for name in self.resident]
        for name in self.evict(adapters, pages - len(self.table.free)):
            self.resident.remove(name)
            self.table.release(name)
            self.evictions += 1

    def owners(self, pages: int) -> list[str | int | None]:
        place = {page: owner for owner, own in self.table.tables.items() for page in own}
        return [place.get(page) for page in range(pages)]
