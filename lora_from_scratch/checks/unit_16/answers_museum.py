"""Unit 16, fewer numbers than rank one: mistakes that people make, and other right ways. The test of the museum."""

# The wrong answers are wrong on purpose, and the right ones are written differently on purpose.

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_from_scratch.checks.bank import changed, right, wrong
from lora_from_scratch.museum.reseeded_generator import test_random_combination

C = torch.tensor([1.0, -2.0, 0.5])
Combination = Callable[[Tensor, tuple[int, int], int], Tensor]


def state() -> Tensor:
    return torch.get_rng_state()


# --- Right -----------------------------------------------------------------------------------------------


@right("test_random_combination")
def by_what_is_drawn_afterwards(random_combination: Combination) -> None:
    found = []
    for seed, global_seed in ((1, 10), (1, 20), (2, 30)):
        draws = []
        for called in (False, True):
            torch.manual_seed(global_seed)
            torch.randn(7)
            if called:
                found.append(random_combination(C, (3, 3), seed))
            draws.append(torch.rand(20))
        assert (draws[0] == draws[1]).all()
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).any()


@right("test_random_combination")
def by_the_state_in_a_helper(random_combination: Combination) -> None:
    def called(seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        torch.rand(5)
        before = state().clone()
        result = random_combination(C, (1, 4), seed)
        if not bool((state() == before).all()):
            raise AssertionError("the global generator has moved")
        return result

    one, two = called(3, 70), called(3, 80)
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert one.tolist() != called(4, 90).tolist()


@right("test_random_combination")
def on_many_seeds(random_combination: Combination) -> None:
    seen = set()
    for seed in range(6):
        results = []
        for repetition in range(3):
            torch.manual_seed(100 * seed + repetition)
            torch.randperm(9)
            before = state()
            results.append(random_combination(torch.ones(4), (5, 2), seed))
            assert state().tolist() == before.tolist()
        assert all(torch.equal(result, results[0]) for result in results)
        seen.add(tuple(results[0].flatten().tolist()))
    assert len(seen) == 6


@right("test_random_combination")
def with_the_global_generator_object(random_combination: Combination) -> None:
    generator = torch.default_generator
    torch.nn.functional.dropout(torch.ones(3))
    before = generator.get_state()
    first = random_combination(C, (2, 2), 0)
    assert torch.equal(generator.get_state(), before)
    generator.manual_seed(99)
    torch.nn.functional.dropout(torch.ones(3))
    assert torch.equal(random_combination(C, (2, 2), 0), first), "another result"
    assert not torch.allclose(random_combination(C, (2, 2), 1), first), "the seed is not used"


@right("test_random_combination")
def library_test_after_a_warm_up(random_combination: Combination) -> None:
    torch.rand(2)
    before = state()
    expected = [random_combination(C, (2, 3), seed) for seed in (8, 9)]
    assert bool(torch.all(state() == before))
    torch.manual_seed(0)
    results = [random_combination(C, (2, 3), seed) for seed in (8, 9)]
    assert all(map(torch.equal, results, expected))
    assert not torch.equal(*results)


# --- Wrong -----------------------------------------------------------------------------------------------


@wrong(
    "test_random_combination",
    "Your test looks at the state of the global generator only. An implementation can leave it alone and still give "
    "other matrices in every call.",
)
def only_the_state(random_combination: Combination) -> None:
    torch.rand(1)
    before = state()
    random_combination(C, (2, 4), 5)
    assert torch.equal(state(), before)


@wrong(
    "test_random_combination",
    "Your test compares results only. Faults that leave the result right and change the global generator pass it.",
)
def only_the_results(random_combination: Combination) -> None:
    torch.manual_seed(1)
    first = random_combination(C, (2, 4), 5)
    torch.manual_seed(2)
    assert torch.equal(random_combination(C, (2, 4), 5), first)
    assert not torch.equal(random_combination(C, (2, 4), 6), first)


@wrong(
    "test_random_combination",
    "Between your two calls with the same seed, nothing happens to the global generator. A result that depends on it "
    "is then the same both times.",
)
def called_twice_in_a_row(random_combination: Combination) -> None:
    torch.manual_seed(1)
    torch.rand(1)
    before = state()
    first, again, other = (random_combination(C, (2, 4), seed) for seed in (5, 5, 6))
    assert torch.equal(state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@wrong(
    "test_random_combination",
    "Your test draws nothing between seeding the global generator and the call. An implementation that starts it again "
    "with its old seed is not noticed.",
)
@changed(
    test_random_combination,
    ("        torch.rand(1)  # so that its state is not the one right after seeding\n", ""),
)
def right_after_seeding() -> None: ...


@wrong(
    "test_random_combination",
    "Your test draws numbers between the calls, but the global generator keeps its seed. A result that depends on that "
    "seed is the same both times.",
)
@changed(
    test_random_combination,
    ("        torch.manual_seed(global_seed)\n", ""),
)
def never_seeded() -> None: ...


@wrong("test_random_combination", "Your test never tries another seed: an implementation that ignores it passes.")
@changed(
    test_random_combination, ('    assert not torch.equal(other, first), "another seed gives the same result"\n', "")
)
def no_other_seed() -> None: ...


@wrong(
    "test_random_combination",
    "Your test never compares two calls with the same seed.",
)
@changed(test_random_combination, ('    assert torch.equal(again, first), "the same seed gives another result"\n', ""))
def the_same_seed_is_not_compared() -> None: ...


@wrong(
    "test_random_combination",
    "Your test does not look at what becomes of the global generator in the first call for a seed. A fault that shows "
    "only then passes.",
)
def only_the_second_call(random_combination: Combination) -> None:
    first = random_combination(C, (2, 4), 5)
    other = random_combination(C, (2, 4), 6)
    torch.manual_seed(2)
    torch.rand(1)
    before = state()
    again = random_combination(C, (2, 4), 5)
    assert torch.equal(state(), before)
    assert torch.equal(again, first)
    assert not torch.equal(other, first)


@wrong(
    "test_random_combination",
    "Your test compares the seed of the global generator (`initial_seed`), not its state. Numbers can be drawn from it "
    "without a change of its seed.",
)
@changed(
    test_random_combination,
    ("before = torch.get_rng_state()", "before = torch.initial_seed()"),
    ("assert torch.equal(torch.get_rng_state(), before)", "assert torch.initial_seed() == before"),
)
def the_seed_in_place_of_the_state() -> None: ...


@wrong(
    "test_random_combination",
    "Your test compares with one implementation's numbers. A sound implementation may draw others.",
)
def compares_with_certain_numbers(random_combination: Combination) -> None:
    by_the_state_in_a_helper(random_combination)
    U = (2 * torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(5)) - 1) / math.sqrt(3)
    assert torch.allclose(random_combination(C, (2, 4), 5), torch.einsum("k,kij->ij", C, U))


@wrong(
    "test_random_combination",
    "Your test wants entries of a certain size. How the matrices are distributed is up to the implementation.",
)
def wants_small_entries(random_combination: Combination) -> None:
    by_the_state_in_a_helper(random_combination)
    assert random_combination(torch.ones(1), (20, 20), 5).abs().max() <= 1


@wrong(
    "test_random_combination",
    "Your test returns whether all is well. A test says so by an `assert`: nobody looks at what it returns.",
)
def returns_the_verdict(random_combination: Combination) -> bool:
    try:
        by_the_state_in_a_helper(random_combination)
    except AssertionError:
        return False
    return True


@wrong("test_random_combination", "Your test raises another error than an AssertionError for a fault. Use `assert`.")
def raises_a_value_error(random_combination: Combination) -> None:
    try:
        by_the_state_in_a_helper(random_combination)
    except AssertionError:
        raise ValueError("a fault") from None


@wrong("test_random_combination", "Your test fails with every implementation. Is an `assert` the wrong way round?")
@changed(test_random_combination, ("assert torch.equal(again, first)", "assert not torch.equal(again, first)"))
def the_wrong_way_round() -> None: ...


@wrong(
    "test_random_combination",
    "Your test expects that the global generator changes, as it does when numbers are drawn from it.",
)
@changed(
    test_random_combination,
    ("assert torch.equal(torch.get_rng_state(), before)", "assert not torch.equal(torch.get_rng_state(), before)"),
)
def expects_a_change() -> None: ...
