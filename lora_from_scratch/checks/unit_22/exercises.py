"""Unit 22, serving a thousand adapters: its exercises, their cases and hints, and its predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Data
from lora_from_scratch.checks.unit_22.explanations import (
    explain_evicted,
    explain_gathered,
    explain_joining,
    explain_segments,
    explain_table,
    explain_test,
)
from lora_from_scratch.checks.unit_22.prefix_keys import FAULTY, SOUND
from lora_from_scratch.checks.unit_22.probes import run_evict, run_joining, run_segments, run_table, run_test
from lora_from_scratch.museum.shared_prefix import test_block_keys
from lora_from_scratch.serving.adapter_store import to_evict
from lora_from_scratch.serving.page_pool import PageTable
from lora_from_scratch.serving.reference_products import gather_product, segment_product
from lora_from_scratch.serving.simulation import joining

TITLE = "Serving a thousand adapters"

# --- gather_product, segment_product -----------------------------------------------------------------


def gather_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, ranks: Sequence[int], of_rows: Sequence[int], *sentences: str, cells: int = 16) -> Case:
        """Row i has the adapter `of_rows[i]`; the cells are in random places, and all others are NaN."""
        places = draw.permutation(cells)
        own = torch.split(places[: sum(ranks)], list(ranks))
        A, B = draw.normal(cells, 5), draw.normal(cells, 4)
        A[places[sum(ranks) :]] = B[places[sum(ranks) :]] = torch.nan
        tables: list[Data] = [own[k].clone() if k >= 0 else own[0][:0].clone() for k in of_rows]
        return Case(name, {"x": draw.normal(len(of_rows), 5), "A": A, "B": B, "tables": tables}, sentences=sentences)

    product, cell, rank, own = (
        "whose rows have adapters of different ranks",
        "in numbered cells",
        "An adapter of rank r has r cells",
        "The sum for row i is over the cells",
    )
    same, other, empty, scaled = "Two rows may have", "Other cells may contain", "An empty one", "the scaling already"
    x, A, B, tables, shape = "x: (n, in)", "A: (cells, in)", "B: (cells, out)", "tables: the cells", "(n, out)."
    one = {"x": torch.tensor([[1.0, 2.0]]), "A": torch.tensor([[9.0, 9.0], [3.0, 4.0], [1.0, 0.0]])}
    B_rows = torch.tensor([[9.0, 9.0, 9.0], [1.0, 0.0, 2.0], [0.0, 5.0, 0.0]])
    small: dict[str, Data] = {**one, "B": B_rows, "tables": [torch.tensor([1, 2])]}
    yield Case("one row, whose adapter has the cells 1 and 2", small, sentences=(product, own, cell, scaled))
    yield case("two rows with adapters of rank 2", (2, 2), (0, 1), own, tables, A, B, x, shape, cells=4)
    yield case("three rows with adapters of the ranks 1, 3 and 2", (1, 3, 2), (0, 1, 2), product, rank, cell, cells=6)
    yield case("four rows, two adapters", (3, 1), (1, 0, 0, 1), same, own, shape, cells=4)
    yield case("other cells are NaN", (2, 3), (1, 0), other, rank)
    yield case("a row without an adapter", (2, 1), (0, -1, 1), empty, product, cells=3)
    yield case("a row without an adapter, and other cells are NaN", (2, 1), (-1, 0, 1), empty, other)
    yield case("no row has an adapter", (2,), (-1, -1), empty, shape)
    yield case("eight rows with adapters of the ranks 4, 1 and 2", (4, 1, 2), (0, 2, -1, 1, 1, 0, 2, 0), product, other)


def segment_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, ranks: Sequence[int], index: Sequence[int], *sentences: str, width: int = 5) -> Case:
        As: list[Data] = [draw.normal(rank, width) for rank in ranks]
        Bs: list[Data] = [draw.normal(width - 1, rank) for rank in ranks]
        scalings: list[Data] = [2.0, 0.5, -1.5, 4.0]
        given: dict[str, Data] = {
            "x": draw.normal(len(index), width),
            "As": As,
            "Bs": Bs,
            "scalings": scalings[: len(ranks)],
        }
        return Case(name, given | {"index": torch.tensor(index)}, sentences=sentences)

    product, together, most, x = (
        "many rows have the same adapter",
        "Rows with the same adapter are multiplied",
        "there are at most two matrix products",
        "x: (n, in)",
    )
    size = "no intermediate result has as many"
    pairs, ranks, index, none, shape = (
        "adapters: (A_k, B_k, s_k)",
        "Their ranks r_k may",
        "adapter_index: (n,)",
        "-1: no",
        "(n, out).",
    )
    yield case("three rows with one adapter of rank 2", (2,), (0, 0, 0), product, most, pairs, x)
    yield case("five rows, two adapters of rank 2, in order", (2, 2), (0, 0, 1, 1, 1), product, index, pairs, most)
    yield case("the same with rows in any order", (2, 2), (1, 0, 1, 1, 0), together, index, shape, most)
    yield case("three adapters of the ranks 1, 3 and 2", (1, 3, 2), (2, 0, 1, 1, 2, 0, 1), ranks, together, pairs)
    yield case("two rows without an adapter", (2, 2), (-1, 1, 0, -1, 1, 0), none, index)
    yield case("an adapter of which no row is", (2, 1, 2, 1), (3, 0, 3, 0, 3), most, ranks, index)
    yield case("no row has an adapter", (2, 3), (-1, -1, -1), none, shape, most)
    yield case("a weight of 31 x 32", (2, 1), (0, 1, 1, -1, 0, 1), size, together, width=32)


# --- PageTable, to_evict -----------------------------------------------------------------------------


def table_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, pages: int, steps: Sequence[tuple[Any, ...]], *sentences: str) -> Case:
        return Case(name, {"pages": pages, "steps": [list(step) for step in steps]}, sentences=sentences)

    free, place, numbered = "Which pages are free", "No page is ever in two places", "They are numbered from 0"
    count, of_free, tables, gone = "pages: the number", "free: the pages", "tables: the pages of", "is not in it"
    append, all_, few, unchanged = "Append this number", "All pages of the owner", "OutOfPages: too few", "nothing is"
    release, nobody = "Free all pages", "For an owner without pages"
    yield case("a text of 2 pages", 4, [("text", 2)], append, all_, free, of_free, tables, place, numbered, count)
    yield case("two owners", 5, [("text", 2), ("fox", 3)], place, free, append, tables)
    yield case("a text grows", 6, [("text", 2), ("fox", 1), ("text", 1), ("text", 2)], append, all_, place)
    yield case("an adapter is released", 4, [("text", 1), ("fox", 3), ("fox",)], release, gone, of_free, place)
    yield case("its pages go to others", 4, [("fox", 3), ("fox",), ("a", 2), ("b", 2)], release, place, of_free)
    yield case("exactly as many as are free", 3, [("text", 3), ("text",), ("fox", 1), ("text", 2)], few, release)
    yield case("one more than there are", 3, [("text", 4), ("fox", 3)], few, unchanged, count)
    yield case("one more than are free", 5, [("text", 2), ("fox", 1), ("text", 3), ("fox", 2)], unchanged, few)
    mixed = [("a", 2), ("b", 2), ("c", 2), ("a",), ("c",), ("b", 4), ("b",), ("c", 6)]
    yield case("free pages that are not neighbours", 6, mixed, append, release, place)
    yield case("a release of an unknown owner", 3, [("fox",), ("text", 3)], nobody)
    yield case("two releases of one owner", 4, [("fox", 2), ("text", 2), ("fox",), ("fox",), ("a", 2)], nobody, place)
    steps: list[tuple[Any, ...]] = []
    for _ in range(24):
        owner = draw.choice(["a", "b", "c"])
        steps.append((owner,) if draw.integer(0, 2) == 0 else (owner, draw.integer(1, 4)))
    yield case("a long story", 8, steps, place, release, unchanged)


def evict_cases(draw: Draw) -> Iterator[Case]:
    def case(name: str, adapters: Sequence[tuple[str, int, int]], missing: int, *sentences: str) -> Case:
        listed: list[Data] = [list(adapter) for adapter in adapters]
        return Case(name, {"adapters": listed, "missing": missing}, sentences=sentences)

    which, least, used, stops = (
        "Which adapters to evict",
        "The least recently used one goes",
        "is never evicted",
        "Evicting stops as soon",
    )
    all_, given, number, zero, names = (
        "If all unused adapters together",
        "adapters: the adapters in the pool",
        "missing: a number of pages",
        "If it is zero or negative",
        "Their names",
    )
    three = [("fox", 2, 0), ("king", 2, 0), ("owl", 2, 0)]
    yield case("three unused adapters of 2 pages, 1 page is missing", three, 1, which, least, names, number, given)
    yield case("the same, 3 pages are missing", three, 3, number, least, which, names)
    yield case("exactly 4 pages are missing", three, 4, stops, number)
    yield case("a running request uses the first", [("fox", 2, 1), *three[1:]], 2, used, least, given)
    yield case(
        "used and unused ones", [("a", 3, 0), ("b", 1, 2), ("c", 1, 0), ("d", 5, 0), ("e", 1, 0)], 4, used, stops
    )
    yield case("a small one is older than a large one", [("small", 1, 0), ("large", 6, 0)], 6, least, stops, names)
    yield case("a large one is older than a small one", [("large", 6, 0), ("small", 1, 0)], 1, least, stops)
    yield case("too few pages", [("a", 2, 0), ("b", 9, 1), ("c", 3, 0)], 8, all_, used)
    yield case("all are in use", [("a", 2, 1), ("b", 1, 3)], 2, used, all_)
    yield case("no adapter is in the pool", [], 3, all_, given)
    yield case("nothing is missing", three, 0, zero, stops)
    yield case("2 pages more than needed are free", three, -2, zero)
    many = [(f"adapter {k}", draw.integer(1, 4), int(draw.integer(0, 2) == 0)) for k in range(8)]
    yield case("eight adapters, 7 pages are missing", many, 7, which, stops, names)


# --- joining -----------------------------------------------------------------------------------------


def joining_cases(draw: Draw) -> Iterator[Case]:
    def case(
        name: str,
        waiting: Sequence[tuple[Any, int, int]],
        *sentences: str,
        running: Sequence[tuple[Any, int, int]] = (),
        pages: int = 6,
        max_rows: int = 8,
    ) -> Case:
        given: dict[str, Data] = {
            side: [list(one) for one in of] for side, of in (("waiting", waiting), ("running", running))
        }
        more: dict[str, Data] = {"sizes": {"fox": 2, "king": 3, "owl": 4}, "pages": pages, "max_rows": max_rows}
        return Case(name, given | more | {"tokens": 4}, sentences=sentences)

    many, order, first, fits = (
        "How many of the waiting requests",
        "in the order in which they wait",
        "The first one that does not fit",
        "A request fits if",
    )
    rows, never, once, others = (
        "at most `max_rows`",
        "they never need more",
        "An adapter needs its",
        "Adapters that none",
    )
    waiting, running, sizes, pages = "waiting: (adapter", "running: the same", "sizes: the number", "pages: the number"
    maximum, number = "max_rows: the maximum", "The number of requests that join"
    yield case("three small requests, all fit", [(None, 2, 2)] * 3, many, number, fits, waiting)
    yield case("eight requests of one page, six pages", [(None, 1, 3)] * 8, many, never, pages, number)
    yield case("texts that grow from 1 page to 3", [(None, 2, 10)] * 3, never, fits, waiting)
    yield case("a small one behind a large one", [(None, 7, 9), (None, 7, 9), (None, 3, 1)], first, order, many)
    yield case("a large one before two small ones", [(None, 7, 9), (None, 3, 9), (None, 3, 9)], order, fits)
    yield case("one finishes before another grows", [(None, 11, 1), (None, 3, 17)], never, waiting)
    yield case("the same beside one that runs", [(None, 3, 17)], never, running, running=[(None, 11, 1)])
    yield case("a running text grows", [(None, 3, 9)], running, never, running=[(None, 15, 5)])
    yield case("one more row is free", [(None, 0, 1)] * 3, rows, maximum, running=[(None, 0, 1)] * 2, max_rows=3)
    yield case("two rows are free", [(None, 0, 1)] * 5, rows, maximum, running=[(None, 0, 1)], max_rows=3)
    yield case("no row is free", [(None, 0, 1)], rows, number, running=[(None, 0, 1)] * 2, max_rows=2)
    yield case("three requests share an adapter", [("owl", 0, 2)] * 3, once, sizes, many, pages=6)
    yield case("two adapters", [("fox", 0, 3), ("king", 0, 3), ("fox", 0, 3)], sizes, once, fits, pages=7)
    yield case(
        "a running request has the same adapter", [("owl", 1, 2)], once, running, running=[("owl", 5, 3)], pages=7
    )
    yield case("a running request has another one", [("owl", 1, 2)], running, sizes, running=[("king", 5, 3)], pages=9)
    last = [("king", 2, 2), ("king", 0, 12)]
    yield case("the adapter stays until its last request has finished", last, once, never, pages=5)
    short = [("king", 0, 12), ("king", 2, 2), (None, 0, 12)]
    yield case("a request that finishes early shares the adapter of a longer one", short, once, never, pages=6)
    early = [("owl", 0, 1), (None, 3, 21)]
    yield case("the adapter goes before a text grows", early, once, never, pages=7)
    yield case("adapters that nobody uses", [(None, 3, 5)] * 3, others, sizes, pages=6)
    yield case("nobody waits", [], number, waiting, running=[("fox", 3, 4)])
    yield case("nobody fits", [("owl", 3, 12), (None, 0, 1)], first, number, running=[(None, 7, 9)], pages=7)
    names = [None, "fox", "king", "owl"]
    for pages_now in (14, 20):
        drawn = [(draw.choice(names), draw.integer(0, 9), draw.integer(1, 16)) for _ in range(9)]
        text = f"nine requests, two of which run, {pages_now} pages"
        yield case(text, drawn[2:], many, never, fits, running=drawn[:2], pages=pages_now)


def test_cases(draw: Draw) -> Iterator[Case]:
    sentences = {
        "the keys are made of the tokens alone": "adapters with different names",
        "the adapter's version is not in the keys": "two versions of an adapter",
        "the adapter's name is not in the keys": "adapters with different names",
        "the adapter is in the key of the first page alone": "adapters with different names",
        "the adapter is in the key of the last page alone": "two versions of an adapter",
        "a key is made of the tokens of its own page alone": "does not depend on all tokens",
        "the last token of a page is not in its key": "does not depend on all tokens",
        "the first token of the prompt is in no key": "does not depend on all tokens",
        "the whole prompt is in every key": "depends on tokens after that page",
        "a key contains one token of the next page": "depends on tokens after that page",
        "a page that is not full has a key": "more or fewer keys",
        "the last page has no key, even if it is full": "more or fewer keys",
        "only the first page has a key": "more or fewer keys",
        "every call makes new keys": "gives other keys when it is called",
    }
    for name in SOUND:
        yield Case(f"a sound function: {name}", {"function": name}, sentences=("A sound function passes",))
    for name in FAULTY:
        yield Case(f"a faulty function: {name}", {"function": name}, sentences=(sentences[name], "A test of a"))


# --- The lists ---------------------------------------------------------------------------------------

EXERCISES = [
    Exercise(
        gather_product,
        idea="mixed ranks",
        difficulty=2,
        minutes=10,
        points=2,
        hints=(
            "Write it for one row first: which rows of A and B does `tables[i]` select, and which two products follow?",
            "A loop over the rows is right. Without a loop: make a list of all entries, one for each pair of a row and "
            "one of its cells. An entry needs two numbers: the row of x, and the cell.",
            "`repeat_interleave` repeats the number of each row as often as its adapter has cells, `torch.cat` gives "
            "the cells, and `index_add` adds several entries to the same row.",
        ),
        cases=gather_cases,
        explain=explain_gathered,
    ),
    Exercise(
        segment_product,
        idea="mixed ranks",
        difficulty=2,
        minutes=8,
        points=2,
        hints=(
            "Which adapters occur in the batch? Take them one after the other, and select their rows.",
            "A mask such as `adapter_index == k` selects rows to read, and the same mask selects where the result is "
            "written.",
            "`adapter_index.unique()` gives the numbers that occur, -1 among them. Start from `x.new_zeros(...)`, so "
            "that rows without an adapter are done.",
        ),
        cases=segment_cases,
        probe=run_segments,
        explain=explain_segments,
    ),
    Exercise(
        PageTable,
        idea="memory in pages",
        difficulty=2,
        minutes=9,
        points=3,
        hints=(
            "Play it with paper: five numbered cards in a heap, and a row of cards for each owner. What do you look at "
            "before you move a card?",
            "Compare the number of pages with the length of `self.free` before anything else. Then move pages from "
            "the free list to the end of the owner's list.",
            "`self.tables.setdefault(owner, [])` is the owner's list, also of a new owner; `self.free.pop()` takes a "
            "page; `self.tables.pop(owner, [])` takes away a list, or an empty one.",
        ),
        cases=table_cases,
        probe=run_table,
        explain=explain_table,
        blank=("allocate", "release"),
        background=("An owner is a text or an adapter", "Which of the free pages it is given"),
    ),
    Exercise(
        test_block_keys,
        idea="tests of one's own",
        difficulty=3,
        minutes=10,
        points=3,
        hints=(
            "Take a prompt with two full pages and one more token. For which other calls must the keys be the same, "
            "and for which must they differ?",
            "Compare *all* keys of two calls, not just the first or the last: the fault may be in one of them. And "
            "change one token at a time, every one of them once.",
            "`not set(keys) & set(others)` says that two lists have no key in common. Try prompts of all lengths from "
            "0 to 7 for the number of keys: also lengths that are a multiple of the page.",
        ),
        cases=test_cases,
        probe=run_test,
        explain=explain_test,
        background=("block_keys: is called as", "It returns a list"),
    ),
    Exercise(
        to_evict,
        idea="a cache of adapters",
        difficulty=2,
        minutes=7,
        points=2,
        hints=(
            "The adapters are given in the order in which you should look at them. When do you skip one, and when do "
            "you stop?",
            "Keep count of the pages that are still missing. Look at the count before you evict the next one.",
            "A loop over `for name, pages, users in adapters` with one `break` and one `if`.",
        ),
        cases=evict_cases,
        probe=run_evict,
        explain=explain_evicted,
    ),
    Exercise(
        joining,
        idea="admission",
        difficulty=4,
        minutes=12,
        points=3,
        hints=(
            "Add the waiting requests to a list of the running ones, one at a time. After each, ask whether the list "
            "still fits; what do you return if it does not?",
            "`peak_pages(stored, left, adapters, layout)` does the arithmetic. Its `adapters` has one pair for each "
            "different adapter of the list: its pages, and the largest `left` of the requests that use it.",
            "A dictionary from the adapter's name to the largest `left` so far: "
            "`ends[adapter] = max(left, ends.get(adapter, 0))`. Leave None out.",
        ),
        cases=joining_cases,
        probe=run_joining,
        explain=explain_joining,
        background=("layout: the layout of a page",),
    ),
]

PREDICTIONS = [
    Prediction(
        "one_adapter_more",
        question=(
            "A server has room for 32 adapters and evicts the least recently used one. 33 adapters are asked for in "
            "turn: 1, 2, ..., 33, 1, 2, ... How many of the requests find their adapter in memory?"
        ),
        choices={
            "a": "about 97 %, which is 32 of 33",
            "b": "about half of them",
            "c": "none",
        },
        answer="c",
        explanation=(
            "When adapter 33 is loaded, adapter 1 is the least recently used one and is evicted, just before it is "
            "asked for. Loading it evicts adapter 2, which comes next, and so on. With 33 places every request after "
            "the first 33 would be a hit."
        ),
        replies={
            "a": "That needs an adapter that is always the one missing. Follow the requests 33, 1, 2 and 3 on paper.",
            "b": "Follow the requests 33, 1, 2 and 3 on paper: which one is evicted each time, and when is it needed?",
        },
        idea="a cache of adapters",
    ),
    Prediction(
        "thirty_two_adapters",
        question=(
            "32 requests generate 32 tokens each, with 32 different adapters of rank 18. The bundled model has 23 MB, "
            "such an adapter 1.8 MB. The mixed batch serves all of them in 32 passes. Merging one adapter after the "
            "other takes 32 times as many passes. How many times as many bytes are moved?"
        ),
        choices={
            "a": "32 times as many or more, because every pass reads the whole model, and merging comes on top",
            "b": "about 10 times as many",
            "c": "about twice as many",
        },
        answer="b",
        explanation=(
            "A pass of the mixed batch reads the model once and 32 adapters, and together these are more than twice as "
            "large as the model: 80 MB instead of 23 MB. So 32 times as many passes move only 10 times as many bytes. "
            "With a large model, whose adapters are small beside it, the ratio comes closer to 32."
        ),
        replies={
            "a": "The passes of the mixed batch are not free of additional bytes: what does each of them read?",
            "c": "Count for one token of each request: how often is the model read in either case?",
        },
        idea="mixed ranks",
    ),
]
