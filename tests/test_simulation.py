"""The simulated server does what the real one does; and what holds of it whatever the traffic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_from_scratch.serving.adapter_store import AdapterStore, AdapterVersion, to_evict
from lora_from_scratch.serving.page_pool import PageLayout, PagePool
from lora_from_scratch.serving.scheduler import Request, Scheduler
from lora_from_scratch.serving.simulation import Job, simulate
from tests.helpers import tiny_config, tiny_model
from tests.served_adapters import METHODS, write_adapters

LAYOUT = PageLayout.for_model(tiny_config())
SIZES = {"fox": 2, "king": 3, "owl": 1}
jobs = st.lists(
    st.builds(Job, st.sampled_from([None, *SIZES]), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    write_adapters(place)
    return place


@pytest.mark.parametrize("seed", range(4))
def test_passes_loads_and_evictions_are_those_of_the_scheduler(
    folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(seed)
    names = [None, *METHODS]
    store = AdapterStore(tiny_model(), PagePool(LAYOUT, 6), folder)
    monkeypatch.setattr(store, "is_ready", lambda version, patience=0.0: True)  # whatever the speed of the disk
    versions: dict[Any, AdapterVersion] = {name: store.find(name) for name in METHODS}
    sizes = {name: store.pages_for(version) for name, version in versions.items()}
    scheduler = Scheduler(tiny_model(), store, max_rows=3, max_prompt_tokens=10**6)
    asked = []
    for _ in range(12):
        name, prompt, new = (int(torch.randint(most, (), generator=draw)) for most in (len(names), 12, 20))
        asked.append(Job(names[name], prompt + 1, new + 1))
        scheduler.submit(Request([1] * (prompt + 1), new + 1, versions.get(names[name])))
    passes = 0
    while scheduler.waiting or scheduler.running:
        passes += bool(scheduler.step())
    store.close()
    report = simulate(asked, sizes, 6, LAYOUT, max_rows=3)
    assert (report.passes, report.loads, report.evictions) == (passes, store.loads, store.evictions)
    assert report.evictions > 0


@given(jobs, st.integers(7, 16), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_every_job_runs_in_order_of_arrival_in_neighbouring_passes_and_no_page_is_missing(
    asked: list[Job], pages: int, rows: int
) -> None:
    report = simulate(asked, SIZES, pages, LAYOUT, rows)
    assert report.joined == sorted(report.joined)
    assert len(report.joined) == len(asked)
    for number, job in enumerate(asked):
        held = [owners.count(number) for owners in report.owners]
        start, end = report.joined[number], report.joined[number] + job.new
        wanted = [math.ceil((job.prompt + passed) / LAYOUT.tokens) for passed in range(job.new)]
        assert held == [0] * start + wanted + [0] * (report.passes - end)
        if job.adapter is not None:
            assert {owners.count(job.adapter) for owners in report.owners[start:end]} == {SIZES[job.adapter]}
    assert max(report.joined.count(moment) for moment in report.joined) <= rows


def test_a_job_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="job 0 and its adapter need more than 2 pages"):
        simulate([Job("king", 1, 1)], SIZES, 2, LAYOUT)


@given(st.lists(st.tuples(st.integers(), st.integers(1, 5), st.integers(0, 2)), max_size=8), st.integers(-3, 20))
def test_evicting_frees_enough_and_no_shorter_beginning_would(adapters: list[Any], missing: int) -> None:
    unused = [(name, pages) for name, pages, users in adapters if not users]
    evicted = to_evict(iter(adapters), missing)
    assert evicted == [name for name, _ in unused[: len(evicted)]]
    freed = [sum(pages for _, pages in unused[:count]) for count in range(len(unused) + 1)]
    assert len(evicted) == next((count for count, pages in enumerate(freed) if pages >= missing), len(unused))
