"""A setting of the C library that makes training on a CPU faster: keep freed memory, in large pages.

A training step allocates and frees some hundred tensors of a few megabytes. By default, glibc returns many of them to
Linux immediately and requests new memory in the next step. Linux provides it in pages of 4 KiB and fills each with
zeros on first access, which causes thousands of page faults in a step of the bundled model (`benchmarks/allocator.py`
counts and times them). The setting must be present when a process starts, so it applies only to processes started by
this package. Systems without glibc (macOS, Windows) ignore the variable. The computed numbers do not change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "GLIBC_TUNABLES"
# hugetlb=1 requests transparent huge pages (2 MiB; madvise). Blocks smaller than mmap_threshold come from the heap (32
# MiB is the largest value that every glibc accepts), which keeps up to trim_threshold of freed memory at its end.
SETTING = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in (("hugetlb", 1), ("mmap_threshold", 32 * 2**20), ("trim_threshold", 4 * 2**30))
)


@contextmanager
def quick_allocator() -> Iterator[None]:
    """Apply the setting to processes started inside, unless the environment already sets the variable."""
    if VARIABLE in os.environ:
        yield
        return
    os.environ[VARIABLE] = SETTING
    try:
        yield
    finally:
        del os.environ[VARIABLE]
