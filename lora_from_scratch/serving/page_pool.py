"""One pool of memory for keys, values and adapters, divided into pages (S-LoRA, Sheng et al. 2023, arXiv:2311.03285).

A text's keys and values grow token by token, adapters come and go, and neither is known in advance. With a separate
memory for each, one is full while the other is empty. Here both take pages of the same pool, in any order, so nothing
is lost between them; a table says which pages an owner has, and in which order (PagedAttention, Kwon et al. 2023,
arXiv:2309.06180).

The pool is one vector of numbers. It is read as a matrix whose rows are as wide as what is stored there:

    the keys of a token in a layer     one row of width d; and so are its values
    A (r, in) of a layer               r rows of width `in`
    s B (out, r) of a layer            r rows of width `out`: B is stored transposed

The size of a page is a multiple of each of these widths, so every row begins at a multiple of its width and lies in
one page: `pool.rows(width)[index]` finds it, whatever else is in the pool.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_from_scratch.gpt2.config import GPT2Config

PAGE_TOKENS = 16  # the fewest tokens whose keys and values a page holds


@dataclass(frozen=True)
class PageLayout:
    """What is where in a page.

    As a part of a text, a page is (layers, 2, tokens, d): for each layer the keys of its tokens, then their values.
    """

    layers: int
    width: int  # d
    tokens: int
    widths: tuple[int, ...]  # of the rows of adapters, the widest first

    @classmethod
    def for_model(cls, config: GPT2Config) -> PageLayout:
        """The smallest page of at least `PAGE_TOKENS` tokens that is a multiple of the width of each row."""
        width = config.n_embd
        widths = tuple(sorted({width, 3 * width, config.mlp_width}, reverse=True))
        token = 2 * config.n_layer * width
        step = math.lcm(*widths, token) // token  # as many tokens, or a multiple of it, fit
        return cls(config.n_layer, width, step * math.ceil(PAGE_TOKENS / step), widths)

    @property
    def size(self) -> int:
        """The numbers in a page."""
        return 2 * self.layers * self.tokens * self.width

    def pages_for_tokens(self, tokens: int) -> int:
        return -(-tokens // self.tokens)

    def place(self, matrices: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
        """Where matrices go in a sequence of pages: the widest first, one behind the other.

        Args:
            matrices: (rows, width) of each.

        Returns:
            The number of each matrix's first row, counted in rows of its own width; and the number of pages.
        """
        first, end = [0] * len(matrices), 0
        for number in sorted(range(len(matrices)), key=lambda number: -matrices[number][1]):
            rows, width = matrices[number]
            first[number] = -(-end // width)
            end = (first[number] + rows) * width
        return first, -(-end // self.size)


class OutOfPages(ValueError):  # noqa: N818 (it is what happened)
    """The pool has fewer free pages than were asked for."""


class PagePool:
    """Pages, each either free or owned by exactly one owner.

    Args:
        layout: of a page.
        pages: how many there are.
        device: where they are.

    Raises:
        ValueError: there is not even one page.
    """

    def __init__(self, layout: PageLayout, pages: int, device: torch.device | str = "cpu") -> None:
        if pages < 1:
            raise ValueError(f"the pool must have at least one page of {4 * layout.size / 2**20:.1f} MiB, got {pages}")
        self.layout = layout
        self.data = torch.zeros(pages, layout.size, device=device)
        self.free = list(range(pages))  # a stack; the last one is the next to be given away
        self.tables: dict[Hashable, list[int]] = {}  # owner -> its pages, in order

    def __len__(self) -> int:
        """The number of pages, free or not."""
        return len(self.data)

    def rows(self, width: int) -> Tensor:
        """The whole pool as rows of this width (a view)."""
        return self.data.view(-1, width)

    def allocate(self, owner: Hashable, pages: int) -> list[int]:
        """Give an owner more pages, behind those that it has. What a former owner left there is still in them.

        Returns:
            All its pages.

        Raises:
            OutOfPages: so many are not free. Nothing is allocated then.
        """
        if pages > len(self.free):
            raise OutOfPages(f"{pages} pages are needed, but only {len(self.free)} of {len(self)} are free")
        new = [self.free.pop() for _ in range(pages)]
        self.tables.setdefault(owner, []).extend(new)
        return self.tables[owner]

    def release(self, owner: Hashable) -> None:
        """Take back all pages of an owner. Idempotent."""
        self.free.extend(self.tables.pop(owner, []))
