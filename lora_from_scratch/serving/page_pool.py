"""One pool of memory for keys, values and adapters, divided into pages (S-LoRA, Sheng et al. 2023, arXiv:2311.03285).

A text's keys and values grow with every token, adapters are loaded and evicted, and neither can be predicted. If each
had its own memory, one could be full while the other is nearly empty. Here both take pages from the same pool, in any
order, which avoids this fragmentation. A table records which pages an owner has, and in which order (PagedAttention,
Kwon et al. 2023, arXiv:2309.06180).

The pool is stored as one contiguous tensor. It is viewed as a matrix whose rows are as wide as the data stored in them:

    the keys of a token in a layer     one row of width d; the same for its values
    A (r, in) of a layer               r rows of width `in`
    s B (out, r) of a layer            r rows of width `out`: B is stored transposed

The page size is a multiple of each of these widths, so every row starts at a multiple of its width and lies within one
page. Therefore `pool.rows(width)[index]` is that row, regardless of the pool's other contents.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_from_scratch.gpt2.config import GPT2Config

PAGE_TOKENS = 16  # a page holds the keys and values of at least this many tokens


@dataclass(frozen=True)
class PageLayout:
    """The layout of a page.

    A page with keys and values has the shape (layers, 2, tokens, d): for each layer the keys, then the values.
    """

    layers: int
    width: int  # d, or less if the model has fewer heads of keys and values than of queries
    tokens: int
    widths: tuple[int, ...]  # the row widths of adapters, in descending order

    @classmethod
    def for_model(cls, config: GPT2Config) -> PageLayout:
        """The layout for a GPT-2."""
        width = config.n_embd
        return cls.for_widths(config.n_layer, width, {width, 3 * width, config.mlp_width})

    @classmethod
    def for_widths(cls, layers: int, width: int, widths: Iterable[int]) -> PageLayout:
        """The smallest page of at least `PAGE_TOKENS` tokens whose size is a multiple of every row width.

        Args:
            layers: the number of blocks.
            width: the width of a token's keys in one block.
            widths: the row widths of adapters: the input and output widths of the linear layers.
        """
        token = 2 * layers * width
        step = math.lcm(*widths, token) // token  # the number of tokens must be a multiple of it
        return cls(layers, width, step * math.ceil(PAGE_TOKENS / step), tuple(sorted(set(widths), reverse=True)))

    @property
    def size(self) -> int:
        """The number of elements in a page."""
        return 2 * self.layers * self.tokens * self.width

    def pages_for_tokens(self, tokens: int) -> int:
        return -(-tokens // self.tokens)

    def place(self, matrices: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
        """Place matrices one after another in a sequence of pages, the widest first.

        Args:
            matrices: (rows, width) of each matrix.

        Returns:
            The index of each matrix's first row, counted in rows of its own width; and the number of pages.
        """
        first, end = [0] * len(matrices), 0
        for number in sorted(range(len(matrices)), key=lambda number: -matrices[number][1]):
            rows, width = matrices[number]
            first[number] = -(-end // width)
            end = (first[number] + rows) * width
        return first, -(-end // self.size)


class OutOfPages(ValueError):  # noqa: N818
    """The pool has fewer free pages than requested."""


class PageTable:
    """Which pages are free, and which owners have the others. No page is ever in two places.

    An owner is a text or an adapter. Which of the free pages it is given does not matter.

    Args:
        pages: the number of pages. They are numbered from 0.

    Attributes:
        free: the pages that are free, a list.
        tables: the pages of each owner, a dictionary of lists. An owner whose pages are released is not in it.
    """

    def __init__(self, pages: int) -> None:
        self.free = list(range(pages))  # a stack; the last one is allocated next
        self.tables: dict[Hashable, list[int]] = {}  # owner -> its pages, in order

    def allocate(self, owner: Hashable, pages: int) -> list[int]:
        """Append this number of free pages to those of an owner, which may be new.

        Returns:
            All pages of the owner, in the order in which they were allocated.

        Raises:
            OutOfPages: too few pages are free. In this case nothing is changed.
        """
        if pages > len(self.free):
            total = len(self.free) + sum(len(own) for own in self.tables.values())
            raise OutOfPages(f"{pages} pages are needed, but only {len(self.free)} of {total} are free")
        new = [self.free.pop() for _ in range(pages)]
        self.tables.setdefault(owner, []).extend(new)
        return self.tables[owner]

    def release(self, owner: Hashable) -> None:
        """Free all pages of an owner. For an owner without pages, nothing happens."""
        self.free.extend(self.tables.pop(owner, []))


class PagePool(PageTable):
    """The pages of a `PageTable` with their contents. A page that is allocated still holds its previous owner's data.

    Args:
        layout: the layout of a page.
        pages: the number of pages.
        device: the device of the pool.

    Raises:
        ValueError: `pages` is less than 1.
    """

    def __init__(self, layout: PageLayout, pages: int, device: torch.device | str = "cpu") -> None:
        if pages < 1:
            raise ValueError(f"the pool must have at least one page of {4 * layout.size / 2**20:.1f} MiB, got {pages}")
        super().__init__(pages)
        self.layout = layout
        self.data = torch.zeros(pages, layout.size, device=device)

    def __len__(self) -> int:
        """The total number of pages."""
        return len(self.data)

    def rows(self, width: int) -> Tensor:
        """The whole pool as rows of this width (a view)."""
        return self.data.view(-1, width)
