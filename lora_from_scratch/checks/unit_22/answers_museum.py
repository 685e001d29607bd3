"""Unit 22, serving a thousand adapters: mistakes that people make, and other right ways. Tests of a prefix cache."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import itertools

from lora_from_scratch.checks.bank import right, wrong

PROMPT = [4, 8, 15, 16, 23, 42, 7]  # two full pages of three tokens, and one token more


def apart(keys, others):
    return not set(keys) & set(others)


def other_adapters(block_keys, adapters=(("king", 1), ("king", 2), ("fox", 1), ("fox", 2))):
    for one, other in itertools.combinations(adapters, 2):
        assert apart(block_keys(PROMPT, one, 3), block_keys(PROMPT, other, 3))


def other_tokens(block_keys, places=range(6)):
    keys = block_keys(PROMPT, ("king", 1), 3)
    for place in places:
        prompt = list(PROMPT)
        prompt[place] += 100
        others = block_keys(prompt, ("king", 1), 3)
        assert others[: place // 3] == keys[: place // 3]
        assert apart(keys, others[place // 3 :])


def later_tokens(block_keys):
    keys = block_keys(PROMPT, ("king", 1), 3)
    assert block_keys([*PROMPT[:6], 99], ("king", 1), 3) == keys


def number(block_keys, lengths=range(8)):
    for length in lengths:
        assert len(block_keys(PROMPT[:length], ("king", 1), 3)) == length // 3


def twice(block_keys):
    assert block_keys(PROMPT, ("king", 1), 3) == block_keys(PROMPT, ("king", 1), 3)


@right("test_block_keys")
def piece_by_piece(block_keys):
    number(block_keys)
    twice(block_keys)
    other_adapters(block_keys)
    other_tokens(block_keys)
    later_tokens(block_keys)


@right("test_block_keys")
def against_tuples(block_keys):
    """The keys are equal exactly where these tuples are."""
    prompts = [PROMPT, PROMPT[:6], PROMPT[:5], PROMPT[:3], [*PROMPT, 1, 2]]
    prompts += [[*PROMPT[:place], 99, *PROMPT[place + 1 :]] for place in range(7)]
    found, wanted = [], []
    for prompt, adapter in itertools.product(prompts, (("king", 1), ("king", 2), ("fox", 1))):
        found += block_keys(prompt, adapter, 3)
        tuples = [(adapter, *prompt[:end]) for end in range(3, len(prompt) + 1, 3)]
        assert len(block_keys(prompt, adapter, 3)) == len(tuples)
        wanted += tuples
    for (key, one), (other, two) in itertools.combinations(zip(found, wanted), 2):
        assert (key == other) == (one == two)


@right("test_block_keys")
def as_a_cache_would(block_keys):
    """Store the pages of one prompt, and see how many another one finds."""

    def hits(stored, asked, adapter=("king", 1), other=("king", 1), page=2):
        cache = set(block_keys(stored, adapter, page))
        return sum(key in cache for key in block_keys(asked, other, page))

    text = [1, 2, 3, 4, 5, 6, 7, 8]
    expected = {
        (1, 2, 3, 4, 5, 6, 7, 8): 4,
        (1, 2, 3, 4, 5, 6, 7): 3,
        (1, 2, 3, 4, 5, 6, 7, 9): 3,
        (1, 2, 3, 4, 5, 9, 7, 8): 2,
        (1, 2, 3, 4, 9, 6, 7, 8): 2,
        (1, 2, 3, 9, 5, 6, 7, 8): 1,
        (1, 2, 9, 4, 5, 6, 7, 8): 1,
        (1, 9, 3, 4, 5, 6, 7, 8): 0,
        (9, 2, 3, 4, 5, 6, 7, 8): 0,
        (5, 6, 7, 8): 0,
        (1,): 0,
    }
    for asked, count in expected.items():
        if hits(text, list(asked)) != count:
            raise AssertionError(asked)
        assert hits(text, list(asked), other=("king", 7)) == 0
        assert hits(text, list(asked), other=("queen", 1)) == 0
        assert len(block_keys(list(asked), ("king", 1), 2)) == len(asked) // 2


@right("test_block_keys")
def with_one_assertion(block_keys):
    keys = {
        (adapter, tuple(prompt)): block_keys(list(prompt), adapter, 2)
        for adapter in (("a", 1), ("b", 1), ("a", 2))
        for length in range(5)
        for prompt in itertools.product((3, 4), repeat=length)
    }
    places, fine = {}, True
    for (adapter, prompt), own in keys.items():
        fine &= len(own) == len(prompt) // 2
        for page, key in enumerate(own):
            place = (adapter, prompt[: 2 * page + 2])
            fine &= places.setdefault(key, place) == place
    fine &= len(places) == 3 * (4 + 16)
    assert fine


@wrong("test_block_keys", "Your test passes every function, the faulty ones too: it never raises an AssertionError.")
def never_fails(block_keys):
    keys = block_keys(PROMPT, ("king", 1), 3)
    return keys != block_keys(PROMPT, ("fox", 1), 3) and len(keys) == 2


@wrong("test_block_keys", "Your test refuses every function, the sound ones too.")
def always_fails(block_keys):
    assert block_keys(PROMPT, ("king", 1), 3) is None


@wrong("test_block_keys", "Your test demands that the keys are numbers. They may be text or tuples.")
def keys_are_numbers(block_keys):
    assert all(isinstance(key, int) for key in block_keys(PROMPT, ("king", 1), 3))
    piece_by_piece(block_keys)


@wrong(
    "test_block_keys",
    "Your test never compares two adapters that differ in the name alone. With another version too, the version would "
    "be enough to tell them apart.",
)
def names_are_not_compared(block_keys):
    number(block_keys)
    twice(block_keys)
    other_adapters(block_keys, (("king", 1), ("king", 2)))
    other_tokens(block_keys)
    later_tokens(block_keys)


@wrong(
    "test_block_keys",
    "Your test never compares two versions of one adapter. An adapter that was trained again may have the same name.",
)
def versions_are_not_compared(block_keys):
    number(block_keys)
    twice(block_keys)
    other_adapters(block_keys, (("king", 1), ("fox", 1)))
    other_tokens(block_keys)
    later_tokens(block_keys)


@wrong(
    "test_block_keys",
    "Your test compares the whole lists of two adapters, which differ even if only one of the keys does. No key may be "
    "the same.",
)
def lists_are_compared(block_keys):
    number(block_keys)
    twice(block_keys)
    adapters = (("king", 1), ("king", 2), ("fox", 1))
    for one, other in itertools.combinations(adapters, 2):
        assert block_keys(PROMPT, one, 3) != block_keys(PROMPT, other, 3)
    other_tokens(block_keys)
    later_tokens(block_keys)


@wrong("test_block_keys", "Your test compares only the last keys of two adapters. Look at all of them.")
def only_the_last_keys(block_keys):
    number(block_keys)
    twice(block_keys)
    for other in (("king", 2), ("fox", 1)):
        assert block_keys(PROMPT, ("king", 1), 3)[-1] != block_keys(PROMPT, other, 3)[-1]
    other_tokens(block_keys)
    later_tokens(block_keys)


@wrong(
    "test_block_keys",
    "Your test compares only the first keys of two adapters, or prompts with one page. Look at all of them.",
)
def only_the_first_keys(block_keys):
    number(block_keys)
    twice(block_keys)
    for other in (("king", 2), ("fox", 1)):
        assert block_keys(PROMPT, ("king", 1), 3)[0] != block_keys(PROMPT, other, 3)[0]
    other_tokens(block_keys)
    later_tokens(block_keys)


@wrong(
    "test_block_keys",
    "Your test does not change the tokens of earlier pages. A key depends on everything before its page too.",
)
def earlier_tokens_are_not_changed(block_keys):
    number(block_keys)
    twice(block_keys)
    other_adapters(block_keys)
    keys = block_keys(PROMPT, ("king", 1), 3)
    for place in range(6):
        prompt = list(PROMPT)
        prompt[place] += 100
        others = block_keys(prompt, ("king", 1), 3)
        assert others[: place // 3] == keys[: place // 3]
        assert others[place // 3] != keys[place // 3]
    later_tokens(block_keys)


@wrong("test_block_keys", "Your test changes only some of the tokens. Change each of them once.")
def only_one_token_is_changed(block_keys):
    number(block_keys)
    twice(block_keys)
    other_adapters(block_keys)
    other_tokens(block_keys, [1])
    keys = block_keys(PROMPT, ("king", 1), 3)
    assert block_keys([*PROMPT[:3], 99, 99, 99], ("king", 1), 3)[0] == keys[0]
    later_tokens(block_keys)


@wrong("test_block_keys", "Your test does not demand that prompts which begin alike have keys in common.")
def nothing_need_be_found(block_keys):
    number(block_keys)
    twice(block_keys)
    other_adapters(block_keys)
    keys = block_keys(PROMPT, ("king", 1), 3)
    for place in range(6):
        others = block_keys([*PROMPT[:place], 99, *PROMPT[place + 1 :]], ("king", 1), 3)
        assert apart(keys, others[place // 3 :])


@wrong("test_block_keys", "Your test does not look at the number of keys.")
def the_number_is_not_seen(block_keys):
    twice(block_keys)
    other_adapters(block_keys)
    keys = block_keys(PROMPT, ("king", 1), 3)
    assert block_keys([*PROMPT[:3], 99, 99, 99], ("king", 1), 3)[:1] == keys[:1]
    for place in range(6):
        others = block_keys([*PROMPT[:place], 99, *PROMPT[place + 1 :]], ("king", 1), 3)
        assert apart(keys, others[place // 3 :])


@wrong(
    "test_block_keys",
    "In your test no prompt ends with a full page. Then a function that forgets this page passes.",
)
def no_prompt_ends_with_a_page(block_keys):
    number(block_keys, [1, 2, 4, 5, 7])
    twice(block_keys)
    other_adapters(block_keys)
    other_tokens(block_keys)
    later_tokens(block_keys)


@wrong(
    "test_block_keys",
    "In your test all prompts end with a full page. Then a function that has a key for an unfilled page passes.",
)
def all_prompts_end_with_a_page(block_keys):
    prompt = PROMPT[:6]
    keys = block_keys(prompt, ("king", 1), 3)
    assert block_keys(prompt, ("king", 1), 3) == keys
    assert len(keys) == 2
    other_adapters(block_keys)
    for place in range(6):
        others = block_keys([*prompt[:place], 99, *prompt[place + 1 :]], ("king", 1), 3)
        assert others[: place // 3] == keys[: place // 3]
        assert apart(keys, others[place // 3 :])


@wrong("test_block_keys", caught_by="raises")
def another_exception(block_keys):
    try:
        piece_by_piece(block_keys)
    except AssertionError:
        raise ValueError("the keys are not sound") from None
