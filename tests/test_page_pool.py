"""The pool: every page is free or has one owner, whatever happens; and rows of any width lie where they should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.serving.page_pool import OutOfPages, PageLayout, PagePool
from tests.helpers import tiny_config

PAGES = 7
owners = st.sampled_from(["text 1", "text 2", "adapter 1", ("adapter", 2)])


class PoolMachine(RuleBasedStateMachine):
    """Owners come, grow and go in any order; a dictionary of page counts says what each of them should have."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PageLayout.for_model(tiny_config()), PAGES)
        self.expected: dict[object, int] = {}

    @rule(owner=owners, pages=st.integers(0, PAGES))
    def allocate(self, owner: object, pages: int) -> None:
        if pages > PAGES - sum(self.expected.values()):
            before = {name: list(table) for name, table in self.pool.tables.items()}
            with pytest.raises(OutOfPages, match=rf"of {len(self.pool)} are free"):
                self.pool.allocate(owner, pages)
            assert self.pool.tables == before
            return
        old = list(self.pool.tables.get(owner, []))
        table = self.pool.allocate(owner, pages)
        assert table[: len(old)] == old
        self.expected[owner] = self.expected.get(owner, 0) + pages

    @rule(owner=owners)
    def release(self, owner: object) -> None:
        self.pool.release(owner)
        self.expected.pop(owner, None)

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        owned = [page for table in self.pool.tables.values() for page in table]
        assert sorted(owned + self.pool.free) == list(range(PAGES))
        assert {owner: len(table) for owner, table in self.pool.tables.items()} == self.expected

    def teardown(self) -> None:
        for owner in list(self.expected):
            self.pool.release(owner)
        assert sorted(self.pool.free) == list(range(PAGES))


PoolMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestPool = PoolMachine.TestCase


@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 40)),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2)), max_size=30),
)
def test_matrices_lie_side_by_side_in_whole_rows(
    heads: int, layers: int, inner: int | None, shapes: list[tuple[int, int]]
) -> None:
    layout = PageLayout.for_model(GPT2Config(n_embd=4 * heads, n_head=heads, n_layer=layers, n_inner=inner))
    assert layout.tokens >= 16
    assert all(layout.size % width == 0 for width in layout.widths)
    matrices = [(rows, layout.widths[kind % len(layout.widths)]) for rows, kind in shapes]
    first, pages = layout.place(matrices)
    numbers = [
        n for (rows, width), f in zip(matrices, first, strict=True) for n in range(f * width, (f + rows) * width)
    ]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < pages * layout.size for number in numbers)
    wasted = pages * layout.size - len(numbers)
    assert wasted < layout.size + sum(layout.widths)


@pytest.mark.parametrize(("config", "tokens"), [(GPT2Config(), 16), (tiny_config(), 18)])
def test_a_page_is_as_small_as_the_widths_allow(config: GPT2Config, tokens: int) -> None:
    layout = PageLayout.for_model(config)
    assert layout.tokens == tokens
    assert (layout.pages_for_tokens(1), layout.pages_for_tokens(tokens), layout.pages_for_tokens(tokens + 1)) == (
        1,
        1,
        2,
    )


def test_rows_are_views_of_the_pool() -> None:
    pool = PagePool(PageLayout.for_model(tiny_config()), 2)
    pool.rows(72)[3] = 1.0
    assert torch.equal(pool.data.flatten().nonzero().flatten(), torch.arange(3 * 72, 4 * 72))


def test_a_pool_without_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(PageLayout.for_model(tiny_config()), 0)
