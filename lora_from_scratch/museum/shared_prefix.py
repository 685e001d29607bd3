"""A prefix cache that gives one adapter the keys and values of another.

Prompts often begin alike, for example with the same instructions. A prefix cache keeps the pages with the keys and
values of such a beginning, and finds them again by a key that is made from the tokens. But keys and values also depend
on the adapter that computed them. The fault was in vLLM (issue 3264, mended by pull request 3263, March 2024), whose
keys were made of the tokens alone. The same mistake was reported later in two other forms: for an adapter whose name
stays the same while its weights are exchanged (vLLM, issue 30931, version 0.11.1), and for a cache outside the server
(LMCache, reported as vLLM issue 44250). Without the fault, it is `block_keys`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any


def faulty_block_keys(tokens: Sequence[int], adapter: tuple[str, int] | None, page: int) -> list[Hashable]:
    """The keys under which the full pages of a prompt are stored and found again."""
    keys: list[Hashable] = []
    before = 0
    for start in range(0, len(tokens) - page + 1, page):
        before = hash((before, *tokens[start : start + page]))  # so a key depends on all pages up to its own
        keys.append(before)
    return keys


def block_keys(tokens: Sequence[int], adapter: tuple[str, int] | None, page: int) -> list[Hashable]:
    """The keys under which the full pages of a prompt are stored and found again.

    Args:
        tokens: the prompt.
        adapter: the name of the adapter and its version, which changes whenever its weights do; None: the base model.
        page: the number of tokens in a page.

    Returns:
        One key for each full page.
    """
    keys: list[Hashable] = []
    before = hash(adapter)
    for start in range(0, len(tokens) - page + 1, page):
        before = hash((before, *tokens[start : start + page]))
        keys.append(before)
    return keys


def test_block_keys(block_keys: Callable[..., Any]) -> None:
    """A test of a `block_keys`, in the manner of pytest: an AssertionError if it does not do what it should.

    - A sound function passes, whatever its keys are: numbers, text, tuples.
    - A function fails if it has the same key for adapters with different names and the same version.
    - A function fails if it has the same key for two versions of an adapter.
    - A function fails if the key of a page does not depend on all tokens before that page and in it.
    - A function fails if the key of a page depends on tokens after that page.
    - A function fails if it has more or fewer keys than the prompt has full pages.
    - A function fails if it gives other keys when it is called a second time.

    Args:
        block_keys: is called as `block_keys(tokens, adapter, page)`, with a list of token ids, the name and the version
            of the adapter as a tuple, such as ("king", 1), and the number of tokens in a page. It returns a list.
    """
    tokens, king = [5, 6, 7, 8, 9, 10, 11], ("king", 1)
    keys = block_keys(tokens, king, 3)  # two full pages, and one token
    numbers = [len(block_keys(tokens[:length], king, 3)) for length in range(8)]
    assert numbers == [0, 0, 0, 1, 1, 1, 2, 2], "not one key for each full page"
    assert block_keys(tokens, king, 3) == keys, "the second call has other keys"
    assert block_keys([5, 6, 7, 99, 99, 99], king, 3)[0] == keys[0], "a key depends on the next page"
    assert block_keys([5, 6, 7, 8, 9, 10, 99], king, 3) == keys, "a key depends on later tokens"
    for other in (("fox", 1), ("king", 2)):
        assert not set(block_keys(tokens, other, 3)) & set(keys), f"{king} and {other} have the same key"
    for place in range(6):
        changed = [*tokens[:place], 99, *tokens[place + 1 :]]
        later = block_keys(changed, king, 3)[place // 3 :]
        assert not set(later) & set(keys), f"a key does not depend on token {place}"
