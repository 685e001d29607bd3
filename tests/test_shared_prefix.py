"""The exhibit of unit 22: a prefix cache whose keys do not contain the adapter."""

from __future__ import annotations

import pytest

from lora_from_scratch.museum import shared_prefix


def test_the_exhibit_fails_the_test_of_the_museum_and_the_mended_function_passes() -> None:
    shared_prefix.test_block_keys(shared_prefix.block_keys)
    with pytest.raises(AssertionError, match="have the same key"):
        shared_prefix.test_block_keys(shared_prefix.faulty_block_keys)


def test_two_prompts_of_an_adapter_share_the_keys_of_their_common_pages() -> None:
    one, other = list(range(20)), [*range(11), 99, *range(12, 20)]
    for function in (shared_prefix.faulty_block_keys, shared_prefix.block_keys):
        keys, others = function(one, ("fox", 1), 4), function(other, ("fox", 1), 4)
        assert len(keys) == len(others) == 5
        assert [key == other for key, other in zip(keys, others, strict=True)] == [True, True, False, False, False]


def test_the_exhibit_shares_the_keys_of_all_adapters() -> None:
    prompts = [
        shared_prefix.faulty_block_keys(list(range(9)), adapter, 3) for adapter in (("fox", 1), ("king", 2), None)
    ]
    assert prompts[0] == prompts[1] == prompts[2]
    mended = [shared_prefix.block_keys(list(range(9)), adapter, 3) for adapter in (("fox", 1), ("king", 2), None)]
    assert len({key for keys in mended for key in keys}) == 9
