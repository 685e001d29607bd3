"""Unit 22: functions that make the keys of a prefix cache, on which the learner's test is tried, sound and faulty.

They use nothing of the exercises, whose solutions are missing where submissions are graded.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable, Sequence

Adapter = tuple[str, int] | None
Keys = Callable[[Sequence[int], Adapter, int], list[Hashable]]

_numbers = itertools.count()


def ends(tokens: Sequence[int], page: int) -> range:
    """The end of each full page."""
    return range(page, len(tokens) + 1, page)


def chained(tokens: Sequence[int], start: Hashable, page: int) -> list[Hashable]:
    """Each key is made of the key before and of the tokens of the page."""
    keys, before = [], hash(start)
    for end in ends(tokens, page):
        before = hash((before, *tokens[end - page : end]))
        keys.append(before)
    return list(keys)


def chain(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return chained(tokens, adapter, page)


def tuples(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return [(adapter, *tokens[:end]) for end in ends(tokens, page)]


def digests(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return [hashlib.sha256(repr((adapter, list(tokens[:end]))).encode()).hexdigest() for end in ends(tokens, page)]


def adapter_last(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return [f"{' '.join(map(str, tokens[:end]))} for {adapter}" for end in ends(tokens, page)]


def tokens_alone(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    """The fault of the museum."""
    return chained(tokens, 0, page)


def name_alone(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return chained(tokens, adapter and adapter[0], page)


def version_alone(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return chained(tokens, adapter and adapter[1], page)


def adapter_in_the_first(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return chained(tokens, adapter, page)[:1] + chained(tokens, 0, page)[1:]


def adapter_in_the_last(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return chained(tokens, 0, page)[:-1] + chained(tokens, adapter, page)[-1:]


def own_tokens(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return [(adapter, *tokens[end - page : end]) for end in ends(tokens, page)]


def last_token_missing(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return [(adapter, end, *tokens[: end - 1]) for end in ends(tokens, page)]


def first_token_missing(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return [(adapter, *tokens[1:end]) for end in ends(tokens, page)]


def whole_prompt(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return [(adapter, end, *tokens) for end in ends(tokens, page)]


def one_token_more(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return [(adapter, end, *tokens[: end + 1]) for end in ends(tokens, page)]


def unfilled_page(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return [(adapter, *tokens[: start + page]) for start in range(0, len(tokens), page)]


def last_page_missing(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return tuples(tokens[:-1], adapter, page)


def first_page_alone(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return tuples(tokens, adapter, page)[:1]


def always_new(tokens: Sequence[int], adapter: Adapter, page: int) -> list[Hashable]:
    return [next(_numbers) for _ in ends(tokens, page)]


SOUND: dict[str, Keys] = {
    "each key is made from the one before": chain,
    "a key is a tuple of the adapter and all tokens so far": tuples,
    "a key is a digest, in text": digests,
    "a key is a text with the adapter at its end": adapter_last,
}
FAULTY: dict[str, Keys] = {
    "the keys are made of the tokens alone": tokens_alone,
    "the adapter's version is not in the keys": name_alone,
    "the adapter's name is not in the keys": version_alone,
    "the adapter is in the key of the first page alone": adapter_in_the_first,
    "the adapter is in the key of the last page alone": adapter_in_the_last,
    "a key is made of the tokens of its own page alone": own_tokens,
    "the last token of a page is not in its key": last_token_missing,
    "the first token of the prompt is in no key": first_token_missing,
    "the whole prompt is in every key": whole_prompt,
    "a key contains one token of the next page": one_token_more,
    "a page that is not full has a key": unfilled_page,
    "the last page has no key, even if it is full": last_page_missing,
    "only the first page has a key": first_page_alone,
    "every call makes new keys": always_new,
}
FUNCTIONS = SOUND | FAULTY
