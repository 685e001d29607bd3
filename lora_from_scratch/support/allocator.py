"""A setting of the C library that makes training on a CPU faster: keep freed memory, in large pages.

A training step makes and drops some hundred tensors of a few megabytes. With its defaults, glibc gives many of them
back to Linux at once and asks for new memory in the next step. Linux hands it out in pages of 4 KiB and fills each with
zeros when it is first touched: thousands of interruptions in a step of the bundled model (`benchmarks/allocator.py`
counts and times them). The setting has to be there when a process starts, so it is for the processes that we start.
Systems without glibc (macOS, Windows) do not know the variable and ignore it. The numbers that are computed do not
change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "GLIBC_TUNABLES"
# hugetlb=1: ask for transparent huge pages (2 MiB; madvise). Below mmap_threshold a block comes from the heap, which
# keeps what is freed (32 MiB is the most that every glibc accepts), up to trim_threshold at its free end.
SETTING = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in (("hugetlb", 1), ("mmap_threshold", 32 * 2**20), ("trim_threshold", 4 * 2**30))
)


@contextmanager
def quick_allocator() -> Iterator[None]:
    """Processes that are started inside have the setting, unless the environment has one of its own."""
    if VARIABLE in os.environ:
        yield
        return
    os.environ[VARIABLE] = SETTING
    try:
        yield
    finally:
        del os.environ[VARIABLE]
