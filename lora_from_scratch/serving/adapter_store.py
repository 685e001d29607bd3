"""A directory of thousands of adapters; the pool holds those in use.

An adapter is in one or more of three places:

- **on disk**, as an adapter directory, ours or PEFT's. It is read when a request first uses it, so the startup time
  does not depend on the number of adapters, and an unused adapter takes no memory.
- **staged** in host memory, already divided into pages, by a thread that reads ahead for waiting requests. The files
  are memory-mapped, so the operating system caches the recently read ones.
- **resident** in the pool. It stays there after its last request has finished, until its pages are needed; the least
  recently used adapter is evicted first.

If the files in a directory change, they form a new version: running requests keep the old version, and new requests
use the new one.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_from_scratch.methods.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lora_from_scratch.models.checkpoint import LanguageModel
from lora_from_scratch.serving.adapter_reading import AdapterFactors, AdapterReader
from lora_from_scratch.serving.mixed_product import LayerRows, PoolRows
from lora_from_scratch.serving.page_pool import PageLayout, PagePool
from lora_from_scratch.support.linear_layers import in_and_out

NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)  # an adapter's name: a relative path; no part starts with a dot
READ_AHEAD = 8  # the maximum number of staged adapters


class UnknownAdapter(ValueError):  # noqa: N818
    """There is no adapter with this name."""


@dataclass(frozen=True)
class AdapterVersion:
    """One version of an adapter on disk."""

    name: str
    directory: Path
    stamp: tuple[int, ...]  # modification time, size and inode of its files


@dataclass(frozen=True)
class Staged:
    """An adapter in host memory, as pages."""

    pages: Tensor  # (pages, page size)
    first: dict[str, tuple[int, ...]]  # layer -> the first row of A, B and g, each counted in rows of its own width
    ranks: dict[str, int]


@dataclass
class Resident:
    """An adapter in the pool."""

    version: AdapterVersion
    pages: int
    rows: LayerRows
    users: int = field(default=0)  # running requests that use it


def to_evict(adapters: Iterable[tuple[Any, int, int]], missing: int) -> list[Any]:
    """Which adapters to evict from the pool, so that `missing` more pages become free.

    The least recently used one goes first. An adapter that a running request uses is never evicted. Evicting stops as
    soon as enough pages are free. If all unused adapters together have fewer pages than are missing, all of them go.

    Args:
        adapters: the adapters in the pool, the least recently used first: the name of each, its number of pages, and
            the number of running requests that use it.
        missing: a number of pages. If it is zero or negative, no adapter goes.

    Returns:
        Their names, in the order in which they are evicted.
    """
    evicted = []
    for name, pages, users in adapters:
        if missing <= 0:
            break
        if not users:
            evicted.append(name)
            missing -= pages
    return evicted


def stage(factors: AdapterFactors, layout: PageLayout) -> Staged:
    """Arrange an adapter in pages.

    Raises:
        ValueError: the adapter has infinite or NaN values.
    """
    parts = {name: [part for part in layer if part is not None] for name, layer in factors.items()}
    parts = {name: [part if part.ndim == 2 else part[None] for part in layer] for name, layer in parts.items()}
    matrices = [(part.shape[0], part.shape[1]) for layer in parts.values() for part in layer]
    places, count = layout.place(matrices)
    pages = torch.zeros(count, layout.size)
    by_width = {width: pages.view(-1, width) for width in layout.widths}
    numbers, first = iter(places), {}
    for name, layer in parts.items():
        first[name] = tuple(next(numbers) for _ in layer)
        for start, part in zip(first[name], layer, strict=True):
            rows, width = part.shape
            by_width[width][start : start + rows] = part
    if count and not all(bound.isfinite() for bound in pages.aminmax()):
        raise ValueError("the adapter's numbers are not all finite: its training diverged")
    return Staged(pages, first, {name: len(layer[0]) for name, layer in parts.items()})


class AdapterStore:
    """The adapters in a directory, for one model and one pool.

    `find`, `names`, `add` and `remove` may be called from other threads than the remaining methods.

    Args:
        model: the base model, without adapters.
        pool: stores the adapters, and also the model's keys and values.
        directory: contains one directory for each adapter, with the adapter's name. If None, only adapters passed to
            `add` are available.
    """

    def __init__(self, model: LanguageModel, pool: PagePool, directory: str | Path | None = None) -> None:
        self.pool, self.reader = pool, AdapterReader(model)
        self.directory = None if directory is None else Path(directory)
        if self.directory is not None and not self.directory.is_dir():
            raise FileNotFoundError(f"there is no directory of adapters {self.directory}")
        self.widths = {name: in_and_out(layer) for name, layer in self.reader.layers.items()}
        self.added: dict[str, Path] = {}
        self.removed: set[str] = set()
        self.staged: dict[AdapterVersion, Future[Staged]] = {}
        self.resident: OrderedDict[AdapterVersion, Resident] = OrderedDict()  # the least recently used first
        self.loads = self.evictions = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    # --- Names ---

    def find(self, name: str) -> AdapterVersion:
        """The current version of the adapter with this name. Its files are not opened, only their status is read.

        Raises:
            UnknownAdapter: there is no such adapter.
        """
        place = self.added.get(name)
        if place is None and self.directory is not None and name not in self.removed and NAME.fullmatch(name):
            place = self.directory / name
        if place is None:
            raise UnknownAdapter(f"there is no adapter {name!r}")
        try:
            files = [os.stat(place / file) for file in (CONFIG_FILE, WEIGHTS_FILE)]
        except OSError:
            raise UnknownAdapter(f"there is no adapter {name!r}") from None
        return AdapterVersion(
            name, place, tuple(n for file in files for n in (file.st_mtime_ns, file.st_size, file.st_ino))
        )

    def names(self) -> list[str]:
        """The names of all adapters, sorted. Lists the directory; adapters in subdirectories are not included."""
        found = set(self.added)
        if self.directory is not None:
            with os.scandir(self.directory) as entries:
                places = [entry.name for entry in entries if NAME.fullmatch(entry.name)]
            found |= {name for name in places if os.path.exists(self.directory / name / CONFIG_FILE)}
            found -= self.removed
        return sorted(found)

    def add(self, name: str, directory: str | Path) -> None:
        """Serve the adapter in a directory under a name, which may be that of a removed adapter.

        Raises:
            FileNotFoundError, ValueError: the adapter cannot be served (see `AdapterReader.read` and `stage`), or the
                name is invalid. The store is then unchanged.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"an adapter's name consists of letters, digits and the signs _ . - /, got {name!r}")
        stage(self.reader.read(directory), self.pool.layout)
        self.added[name] = Path(directory)
        self.removed.discard(name)

    def remove(self, name: str) -> None:
        """Stop serving an adapter. Running requests that use it are completed.

        Raises:
            UnknownAdapter: there is no adapter with this name.
        """
        self.find(name)
        self.added.pop(name, None)
        self.removed.add(name)

    # --- Staging, loading and evicting ---

    def read_ahead(self, versions: Iterable[AdapterVersion]) -> None:
        """Start staging the first `READ_AHEAD` of these adapters that are not resident."""
        wanted = list(dict.fromkeys(version for version in versions if version not in self.resident))[:READ_AHEAD]
        for version, staged in list(self.staged.items()):
            if version not in wanted and staged.done():
                del self.staged[version]  # its request was cancelled
        for version in wanted:
            if version not in self.staged and len(self.staged) < READ_AHEAD:
                self.staged[version] = self._thread.submit(self._stage, version)

    def is_ready(self, version: AdapterVersion, patience: float = 0.0) -> bool:
        """Whether `pages_for` and `acquire` will not wait for the disk. Waits up to `patience` seconds for this."""
        if version in self.resident:
            return True
        return version in self.staged and bool(wait([self.staged[version]], patience).done)

    def pages_for(self, version: AdapterVersion) -> int:
        """The number of pages that an adapter takes.

        Raises:
            ValueError, OSError: the adapter cannot be served; see `AdapterReader.read` and `stage`.
        """
        resident = self.resident.get(version)
        return resident.pages if resident is not None else len(self._staged(version).pages)

    def acquire(self, version: AdapterVersion) -> Resident:
        """Keep an adapter in the pool until `release`, loading it if necessary. Unused adapters are evicted for it.

        Raises:
            OutOfPages: too few pages are free, even after eviction.
            ValueError, OSError: as for `pages_for`.
        """
        resident = self.resident.get(version)
        if resident is None:
            resident = self.resident[version] = self._load(version)
        self.resident.move_to_end(version)
        resident.users += 1
        return resident

    def release(self, resident: Resident) -> None:
        """Record that a request no longer uses this adapter."""
        resident.users -= 1

    def pages_to_evict(self) -> int:
        """The number of pages of resident adapters that no request uses."""
        return sum(resident.pages for resident in self.resident.values() if not resident.users)

    def make_room(self, pages: int) -> None:
        """Evict unused adapters until `pages` pages are free or no unused adapter is left."""
        resident = ((version, one.pages, one.users) for version, one in self.resident.items())
        for version in to_evict(resident, pages - len(self.pool.free)):
            del self.resident[version]
            self.pool.release(version)
            self.evictions += 1

    def close(self) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _stage(self, version: AdapterVersion) -> Staged:
        return stage(self.reader.read(version.directory), self.pool.layout)

    def _staged(self, version: AdapterVersion) -> Staged:
        if version not in self.staged:
            self.staged[version] = self._thread.submit(self._stage, version)
        try:
            return self.staged[version].result()
        except Exception:
            del self.staged[version]
            raise

    def _load(self, version: AdapterVersion) -> Resident:
        staged = self._staged(version)
        self.make_room(len(staged.pages))
        pages = self.pool.allocate(version, len(staged.pages))
        del self.staged[version]
        self.loads += 1
        for page, numbers in zip(pages, staged.pages, strict=True):
            self.pool.data[page] = numbers
        return Resident(version, len(pages), self._rows(staged, pages))

    def _rows(self, staged: Staged, pages: list[int]) -> LayerRows:
        """The indices of the pool's rows that hold the adapter's matrices."""
        layout, table = self.pool.layout, torch.tensor(pages, device=self.pool.data.device)[:, None]
        by_width = {}  # width -> the indices of the rows in these pages, in order
        for width in layout.widths:
            inside = torch.arange(layout.size // width, device=table.device)
            by_width[width] = (table * len(inside) + inside).flatten()
        rows = {}
        for name, (A, B, *gain) in staged.first.items():
            inputs, outputs = self.widths[name]
            rank, wide = staged.ranks[name], by_width[outputs]
            g = wide[gain[0] : gain[0] + 1] if gain else wide[:0]
            rows[name] = PoolRows(by_width[inputs][A : A + rank], wide[B : B + rank], g)
        return rows
