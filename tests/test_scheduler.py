"""Continuous batching: whatever shares its batch, a request gets what it gets alone, and everything comes to an end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.serving.adapter_store import AdapterStore
from lora_from_scratch.serving.page_pool import PageLayout, PagePool
from lora_from_scratch.serving.paged_model import Text
from lora_from_scratch.serving.sampling import Sampling
from lora_from_scratch.serving.scheduler import Event, Request, Scheduler, peak_pages
from tests.helpers import tiny_config, tiny_model
from tests.served_adapters import METHODS, write_adapters

NAMES = [None, *METHODS]
LAYOUT = PageLayout.for_model(tiny_config())
VOCABULARY = 61


class Adapters:
    """Adapter directories, and the models that they should amount to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models: dict[str | None, GPT2] = {None: tiny_model()}
        self.models.update(write_adapters(folder))
        self.exact = {name: tiny_model().double() for name in self.models}
        for name, model in self.exact.items():
            model.load_state_dict({key: tensor.double() for key, tensor in self.models[name].state_dict().items()})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def scheduler(adapters: Adapters) -> Iterator[Scheduler]:
    made = make_scheduler(adapters, pages=12, rows=4)
    yield made
    made.store.close()


def make_scheduler(adapters: Adapters, pages: int, rows: int, prompt_tokens: int = 512) -> Scheduler:
    model = tiny_model()
    store = AdapterStore(model, PagePool(LAYOUT, pages), adapters.folder)
    return Scheduler(model, store, rows, prompt_tokens)


def request(scheduler: Scheduler, name: str | None = None, length: int = 5, new: int = 6, **options: Any) -> Request:
    tokens = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length + 100 * new))
    version = None if name is None else scheduler.store.find(name)
    return Request(tokens.tolist(), new, version, **options)


def run(scheduler: Scheduler) -> list[Event]:
    events: list[Event] = []
    while scheduler.waiting or scheduler.running:
        events += scheduler.step()
    return events


def name_of(request: Request) -> str | None:
    return None if request.adapter is None else request.adapter.name


# --- Alone and together ----------------------------------------------------------------------------------


class Recorded:
    """A paged model that compares its logits with those of the merged model alone, in double precision."""

    def __init__(self, scheduler: Scheduler, adapters: Adapters) -> None:
        self.scheduler, self.adapters, self.model = scheduler, adapters, scheduler.model
        self.most, self.rows = 0.0, 0

    def __call__(self, texts: list[Text]) -> Tensor:
        by_table = {id(self.scheduler.pool.tables.get(r)): r for r in self.scheduler.running}
        logits = self.model(texts)
        for text, row in zip(texts, logits, strict=True):
            owner = by_table[id(text.pages)]
            whole = torch.tensor([[*owner.prompt, *owner.tokens]])
            with torch.no_grad():
                alone = self.adapters.exact[name_of(owner)](whole)[0, -1]
            self.most = max(self.most, float((row.double() - alone).abs().max()))
            self.rows += 1
        return logits


arrivals = st.lists(
    st.tuples(
        st.integers(0, 3),  # passes until it comes
        st.sampled_from(range(len(NAMES))),
        st.integers(1, 14),  # tokens of its prompt
        st.integers(1, 12),  # tokens that it may generate
        st.one_of(st.none(), st.integers(1, 6)),  # passes until it is cancelled
    ),
    min_size=1,
    max_size=12,
)


@given(arrivals, st.integers(6, 20), st.integers(1, 5), st.sampled_from([1, 20, 512]))
@settings(max_examples=20, deadline=None)
def test_a_request_gets_what_it_gets_alone(
    adapters: Adapters,
    plan: list[tuple[int, int, int, int, int | None]],
    pages: int,
    rows: int,
    prompts: int,
) -> None:
    scheduler = make_scheduler(adapters, pages, rows, prompts)
    recorded: Any = Recorded(scheduler, adapters)
    scheduler.model = recorded
    requests: list[Request] = []
    ends: dict[Request, str | None] = {}
    cancelled: set[Request] = set()
    events: list[Event] = []
    for gap, name, length, new, patience in plan:
        for _ in range(gap):
            events += scheduler.step()
            check_pool(scheduler)
        one = request(scheduler, NAMES[name], length, new)
        scheduler.submit(one)
        requests.append(one)
        if patience is not None and patience < 3:
            scheduler.cancel(one)
            cancelled.add(one)
        if patience == 6 and len(requests) > 2:
            scheduler.cancel(requests[-2])
            cancelled.add(requests[-2])
    events += run(scheduler)
    check_pool(scheduler)
    for event in events:
        assert event.error is None
        if event.finished:
            ends[event.request] = event.finished
    for one in requests:
        alone = generate(adapters.models[name_of(one)], [one.prompt], max_new_tokens=one.max_tokens)[0]
        if one in ends:
            assert (ends[one], one.tokens) == ("length", alone)
        else:
            assert one in cancelled
            assert one.tokens == alone[: len(one.tokens)]
    assert recorded.most < 1e-5
    assert not any(resident.users for resident in scheduler.store.resident.values())
    scheduler.store.make_room(pages)
    assert sorted(scheduler.pool.free) == list(range(pages))
    scheduler.store.close()


def check_pool(scheduler: Scheduler) -> None:
    pool = scheduler.pool
    owned = [page for table in pool.tables.values() for page in table]
    assert sorted(owned + pool.free) == list(range(len(pool)))
    assert set(pool.tables) <= {*scheduler.running, *scheduler.store.resident}


def test_many_rows_of_one_adapter_form_a_segment(adapters: Adapters) -> None:
    scheduler = make_scheduler(adapters, pages=60, rows=40)
    recorded: Any = Recorded(scheduler, adapters)
    scheduler.model = recorded
    for number in range(30):
        name = ("king", "king", "hare", None, "fox")[number % 5]
        scheduler.submit(request(scheduler, name, 1 + number % 7, 8))
    run(scheduler)
    assert recorded.rows == 30 * 8
    assert recorded.most < 1e-5
    scheduler.store.close()


def test_the_seed_of_a_request_decides_what_it_samples(adapters: Adapters, scheduler: Scheduler) -> None:
    def sampled(seed: int, beside: int) -> list[int]:
        for number in range(beside):
            scheduler.submit(request(scheduler, "fox", 2 + number, 9, sampling=Sampling(1.5, seed=99)))
        one = request(scheduler, "king", sampling=Sampling(1.5, top_k=40, top_p=0.95, seed=seed), new=9)
        scheduler.submit(one)
        run(scheduler)
        return one.tokens

    first = sampled(3, beside=0)
    assert sampled(3, beside=3) == first
    assert sampled(4, beside=3) != first


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"seed": -1}]
)
def test_a_setting_out_of_range_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        Sampling(**setting)


def test_a_stop_token_ends_a_text_and_is_not_part_of_it(adapters: Adapters, scheduler: Scheduler) -> None:
    whole = request(scheduler, "king", new=9)
    scheduler.submit(whole)
    run(scheduler)
    stop = whole.tokens[4]
    short = request(scheduler, "king", new=9, stop=frozenset({stop}))
    scheduler.submit(short)
    events = run(scheduler)
    assert short.tokens == whole.tokens[: whole.tokens.index(stop)]
    assert [event.finished for event in events if event.finished] == ["stop"]


# --- Turns -----------------------------------------------------------------------------------------------


def test_requests_join_in_the_order_in_which_they_came(adapters: Adapters) -> None:
    scheduler = make_scheduler(adapters, pages=4, rows=8)
    large = request(scheduler, None, 20, 12)  # needs more pages than the small ones leave
    requests = [request(scheduler, None, 4, 3 + n % 5) for n in range(6)]
    requests.insert(3, large)
    requests += [request(scheduler, None, 3, 4) for _ in range(20)]
    for one in requests:
        scheduler.submit(one)
    first: list[Request] = []
    while scheduler.waiting or scheduler.running:
        for event in scheduler.step():
            if event.request not in first:
                first.append(event.request)
    assert sorted(map(requests.index, first[: requests.index(large)])) == [0, 1, 2]
    assert first.index(large) == 3


@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(1, 40), st.one_of(st.none(), st.integers(0, 2))),
        min_size=1,
        max_size=6,
    ),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
)
@settings(max_examples=30, deadline=None)
def test_the_peak_is_that_of_the_worst_case_played_out(
    texts: list[tuple[int, int, int | None]], sizes: list[int]
) -> None:
    used = []
    for moment in range(1, 41):
        active = [text for text in texts if text[1] >= moment]
        held = sum(sizes[adapter] for adapter in {text[2] for text in active} if adapter is not None)
        used.append(held + sum(LAYOUT.pages_for_tokens(stored + moment) for stored, _, _ in active))
    ends = {a: max(left for _, left, other in texts if other == a) for a in {text[2] for text in texts} - {None}}
    adapters = [(sizes[a], end) for a, end in ends.items() if a is not None]
    assert peak_pages([t[0] for t in texts], [t[1] for t in texts], adapters, LAYOUT) == max(used)


# --- What cannot be served -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": [], "max_tokens": 3}, "at least one token"),
        ({"prompt": [1], "max_tokens": 0}, "max_tokens"),
        ({"prompt": [1, VOCABULARY], "max_tokens": 3}, "outside 0 to 60"),
        ({"prompt": [1] * 20, "max_tokens": 13}, "20 tokens; with max_tokens=13 that is 33, more than .* of 32"),
    ],
)
def test_a_request_that_cannot_be_run_is_refused(scheduler: Scheduler, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler.submit(Request(**bad))
    assert not scheduler.waiting


def test_what_needs_more_than_the_pool_fails_alone(adapters: Adapters) -> None:
    scheduler = make_scheduler(adapters, pages=1, rows=4)
    small, large, later = (request(scheduler, name) for name in (None, "king", None))
    for one in (small, large, later):
        scheduler.submit(one)
    ends = {event.request: event for event in run(scheduler) if event.finished}
    assert ends[large].finished == "error"
    assert "pages of memory; the server has 1" in str(ends[large].error)
    assert (ends[small].finished, ends[later].finished) == ("length", "length")
    with pytest.raises(ValueError, match="has only 1"):
        make_scheduler(adapters, pages=1, rows=4).submit(request(scheduler, None, 20, 10))


def test_an_adapter_whose_logits_overflow_harms_no_other(adapters: Adapters, scheduler: Scheduler) -> None:
    king = scheduler.store.find("king")
    scheduler.store.acquire(king)
    rows = scheduler.store.resident[king].rows["transformer.h.0.attn.c_attn"]
    scheduler.pool.rows(24)[rows.A] *= 1e30
    scheduler.pool.rows(72)[rows.B] *= 1e30
    broken, good = request(scheduler, "king", 5, 9), request(scheduler, "fox", 5, 9)
    later = [request(scheduler, None, 17 + n, 9) for n in range(6)]
    for one in (broken, good, *later):
        scheduler.submit(one)
    ends = {event.request: event for event in run(scheduler) if event.finished}
    assert "not numbers" in str(ends.pop(broken).error)
    assert {event.finished for event in ends.values()} == {"length"}
    for one in (good, *later):
        alone = generate(adapters.models[name_of(one)], [one.prompt], max_new_tokens=9)[0]
        assert one.tokens == alone
