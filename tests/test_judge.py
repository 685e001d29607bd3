"""The judge's half: points, the first case that fails, what is said of it, and what is never said."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_from_scratch.checks import bank, judge, units
from lora_from_scratch.checks.comparing import same
from lora_from_scratch.checks.exercise import Case, Draw, Exercise, Prediction
from lora_from_scratch.checks.observation import Seen, dtype_of, observe
from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.linear_algebra.rank import check_rank
from lora_from_scratch.methods.prompt_tuning import initial_prompt

NUMBERS = st.lists(st.integers(-1000, 1000).map(lambda n: n / 8), min_size=1, max_size=5)


def halves(values: Tensor, keep: int = 0) -> Tensor:
    """Half of every entry; a negative `keep` is refused."""
    if keep < 0:
        raise ValueError(f"keep must be at least 0, got {keep}")
    result = values / 2
    result[:keep] = values[:keep]
    return result


def cases(draw: Draw) -> Iterator[Case]:
    yield Case("four numbers", {"values": draw.normal(4)}, "halving")
    yield Case("one number", {"values": torch.tensor([3.0])}, "halving")
    yield Case("the first two kept", {"values": draw.normal(4), "keep": 2}, "keeping")
    yield Case("a negative number to keep", {"values": draw.normal(2), "keep": -1}, "refusing")


HALVES = Exercise(halves, "an idea", 1, 5, 6, ("one", "two", "three"), cases)


def verdict(answer: Any, exercise: Exercise = HALVES, seed: int = 3) -> Verdict:
    seen = observe(exercise.probe, answer, [case.inputs for case in exercise.inputs(seed)], 0.5, seed)
    return judge.judge(exercise, seed, seen)


@pytest.fixture
def wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank in which somebody doubles."""

    def doubles(values: Tensor, keep: int = 0) -> Tensor:
        return values * 2

    bank.exercises()  # loads the real one
    monkeypatch.setitem(bank._bank, "halves", [bank.Answer("halves", doubles, "doubles", False, "You double.")])


# --- comparing ------------------------------------------------------------------------------------------


@given(NUMBERS)
def test_a_value_is_the_same_in_another_dtype_and_another_container(numbers: list[float]) -> None:
    exact = torch.tensor(numbers, dtype=torch.float64)
    assert same(exact.float(), exact)
    assert same([*numbers], [*numbers])
    assert same([exact, 1], [exact.float(), torch.tensor(1)])


@given(NUMBERS, st.integers(0, 4), st.floats(1e-3, 10))
def test_an_error_of_a_thousandth_of_the_largest_entry_is_seen(numbers: list[float], place: int, size: float) -> None:
    exact = torch.tensor(numbers, dtype=torch.float64)
    scale = float(exact.abs().max())
    off = exact.clone()
    off[place % len(numbers)] += size * scale + (size if scale == 0 else 0)
    assert not same(off, exact)


@given(st.floats(), st.floats(-1e-3, 1e-3) | st.floats())
def test_two_numbers_are_compared_as_two_tensors_are(exact: float, off: float) -> None:
    for seen in (exact + off, exact * (1 + off), off):
        one, other = torch.tensor([[seen], [exact]], dtype=torch.float64)
        assert same(seen, exact) == same(one, other)


def test_what_is_not_the_same() -> None:
    assert not same(torch.zeros(3), torch.zeros(1, 3))
    assert not same([1, 2], [1, 2, 3])
    assert not same(2, 3)
    assert not same(True, "True")
    assert not same(torch.tensor([1 + 0j]), torch.ones(1))
    assert not same(torch.tensor([float("nan")]), torch.tensor([1.0]))
    assert not same({"a": 1}, {"b": 1})
    assert not same(torch.tensor([float("inf"), 1]), torch.tensor([float("inf"), 2]))  # what is infinite sets no scale
    assert same(torch.tensor([float("nan"), 1]), torch.tensor([float("nan"), 1]))


def test_whole_numbers_are_compared_exactly_whatever_their_size() -> None:
    assert not same(2**53 + 1, 2**53)
    assert not same(10**30, 175_000_000_000)
    assert same(10**30, 10**30)
    assert same(10**30, 1e30)
    assert not same(-(10**400), 1e300)
    assert not same(10**400, torch.tensor(3))


# --- points ---------------------------------------------------------------------------------------------


def test_the_librarys_own_answer_earns_everything() -> None:
    seen = verdict(halves)
    assert (seen.status, seen.points, seen.max_points) == ("passed", 6, 6)


def test_each_part_that_is_all_right_earns_its_share() -> None:
    def refuses_nothing(values: Tensor, keep: int = 0) -> Tensor:
        return torch.cat([values[: max(0, keep)], values[max(0, keep) :] / 2])

    seen = verdict(refuses_nothing)
    assert seen.points == pytest.approx(4)
    assert seen.failure is not None
    assert seen.failure.case == "a negative number to keep"
    assert seen.failure.expected == "a ValueError"
    assert seen.misconception == "no error"

    one_of_two = verdict(lambda values, keep=0: values / 2 if len(values) == 4 else values)
    assert one_of_two.points == 0


@given(st.integers(0, 2**31))
def test_an_answer_is_judged_alike_on_whatever_seed(seed: int) -> None:
    assert verdict(halves, seed=seed).passed
    assert verdict(lambda values, keep=0: -values / 2, seed=seed).points == 0


def test_the_judge_wants_an_observation_of_every_case() -> None:
    with pytest.raises(ValueError, match="has 4 cases of seed 0, got 1 observations"):
        judge.judge(HALVES, 0, [Seen()])


# --- what is said ---------------------------------------------------------------------------------------


def test_a_failure_of_the_librarys_own_answer_is_no_agreement() -> None:
    def broken(values: Tensor, keep: int = 0) -> Tensor:
        """Fails where the learner's fails."""
        raise AttributeError("a half-imported module")

    exercise = dataclasses.replace(HALVES, object=broken)
    with pytest.raises(RuntimeError, match="own broken failed"):
        judge.judge(exercise, 0, observe(exercise.probe, broken, [c.inputs for c in exercise.inputs(0)]))


def test_an_answer_that_does_what_one_of_the_bank_does_gets_its_message(wrong_answer: None) -> None:
    assert verdict(lambda values, keep=0: values + values).message == "You double."

    def doubles_and_refuses(values: Tensor, keep: int = 0) -> Tensor:
        return 4 * halves(values, abs(keep)) if keep < 0 else values * 2

    assert verdict(doubles_and_refuses).message == "You double."  # the same wherever nothing has to be refused
    assert verdict(lambda values, keep=0: 3 * values).message != "You double."


def _in_place(values: Tensor, keep: int = 0) -> Tensor:
    result = halves(values, keep)
    values.zero_()
    return result


def _prints(values: Tensor, keep: int = 0) -> None:
    print(halves(values, keep))


def _wrong_error(values: Tensor, keep: int = 0) -> Tensor:
    if keep < 0:
        raise KeyError("keep")
    return halves(values, keep)


def _raises(values: Tensor, keep: int = 0) -> Tensor:
    return values / unknown  # type: ignore[name-defined]  # noqa: F821


def _loops(values: Tensor, keep: int = 0) -> Tensor:
    while True:
        pass


@pytest.mark.parametrize(
    ("answer", "misconception", "said"),
    [
        (lambda values, keep=0: None, "returns nothing", "`return`"),
        (_prints, "prints", "returns nothing"),
        (lambda values, keep=0: "text", "another type", "should be a tensor of shape (4,), but your code returns text"),
        (lambda values, keep=0: [values, values], "another type", "your code returns 2 results"),
        (lambda values, keep=0: values[None] / 2, "shape", "should be (4,), but your code returns (1, 4)"),
        (lambda values, keep=0: values / 0, "not finite", "divided by zero"),
        (lambda values, keep=0: -halves(values, abs(keep)), "sign", "opposite sign"),
        (lambda values, keep=0: halves(values, abs(keep)) * 3, "factor", "constant factor"),
        (lambda values, keep=0: values.sin(), "values", "by hand"),
        (_in_place, "changes its input", "Your code modifies values in place"),
        (_wrong_error, "another error", "should raise a ValueError for this input, but it raised KeyError"),
        (_raises, "raises", "Run the cell that defines or imports it"),
        (_loops, "too slow", "stopped after"),
        (lambda: None, "arguments", "`halves(values, keep=0)`"),
        (lambda data: None, "arguments", "got an unexpected keyword argument 'values'"),
    ],
)
def test_a_general_rule_says(answer: Any, misconception: str, said: str) -> None:
    seen = verdict(answer, dataclasses.replace(HALVES, seconds=0.5))
    assert seen.misconception == misconception
    assert said in seen.message
    assert seen.status == ("stopped" if answer is _loops else "failed")


def test_a_matrix_that_is_the_right_one_turned_round_is_called_transposed() -> None:
    def doubled(matrix: Tensor) -> Tensor:
        """Twice the matrix."""
        return 2 * matrix

    exercise = dataclasses.replace(
        HALVES, object=doubled, cases=lambda draw: [Case("2 x 3", {"matrix": draw.normal(2, 3)})]
    )
    assert verdict(lambda matrix: 2 * matrix.T, exercise).misconception == "transposed"


def test_what_a_probe_adds_is_not_said_to_be_the_learners_result() -> None:
    def records(answer: Any, **inputs: Any) -> Any:
        return {"half": answer(**inputs), "kept": True}

    record = verdict(lambda values, keep=0: values, dataclasses.replace(HALVES, probe=records)).failure
    assert record is not None
    assert record.expected == ""  # not "a dictionary": the function shall return none

    def with_dtype(answer: Any, **inputs: Any) -> Any:
        result = answer(**inputs)
        return [result, dtype_of(result)]

    typed = dataclasses.replace(HALVES, probe=with_dtype)
    one = verdict(lambda values, keep=0: values[:2], typed)
    assert one.message == "The shape should be (4,), but your code returns (2,)."
    assert one.failure is not None
    assert one.failure.expected == "a tensor of shape (4,)"
    assert "result" not in one.failure.got
    assert verdict(lambda values, keep=0: halves(values, keep).double(), typed).status == "failed"


def test_what_the_exercise_explains_comes_before_the_general_rules_and_may_fail() -> None:
    explains = dataclasses.replace(HALVES, explain=lambda case, seen, expected: ("own", f"In {case.name}."))
    assert verdict(lambda values, keep=0: values, explains).message == "In four numbers."
    fails = dataclasses.replace(HALVES, explain=lambda case, seen, expected: [("never", "")][1])
    assert verdict(lambda values, keep=0: values, fails).misconception == "factor"


@given(st.integers(0, 1000))
def test_of_a_large_input_the_right_values_are_not_shown(seed: int) -> None:
    large = dataclasses.replace(HALVES, cases=lambda draw: [Case("many numbers", {"values": draw.normal(50)})])
    seen = verdict(lambda values, keep=0: values + 100, large, seed=seed)  # no entry comes near one that is right
    answer = halves(large.inputs(seed)[0].inputs["values"])  # type: ignore[arg-type]
    said = f"{seen.message} {seen.failure}".split("got=")[1]
    assert {f"{number:.4g}" for number in answer.tolist()}.isdisjoint(re.findall(r"-?[\d.]+(?:e-?\d+)?", said))


def test_a_wrong_value_of_the_right_kind_is_not_what_was_expected_of_it() -> None:
    def expected(right: Any, wrong: Any, **changes: Any) -> str:
        inputs = {"values": torch.zeros(judge.MOST_NUMBERS_BY_HAND)}  # too many to work it out by hand
        exercise = dataclasses.replace(HALVES, cases=lambda draw: [Case("many", inputs)], **changes)
        return judge._expected(exercise, exercise.inputs(0)[0], Seen(right), Seen(wrong))

    assert expected(31, 32) == "another whole number"
    assert expected(0.5, 0.25) == "another number"
    assert expected(True, False) == "the opposite"
    assert expected(torch.zeros(2), torch.ones(2)) == "a tensor of shape (2,) with other values"
    assert expected([1, 2.5], [1, 3.5]) == "2 results: a whole number and a number; not right: number 2"
    assert expected([1, 2.5], [2, 3.5]) == "2 results: a whole number and a number with other values"
    assert expected(31, 3.5) == "a whole number"


def test_values_that_look_alike_are_not_both_shown_as_the_same() -> None:
    case = Case("one number", {"values": 1.0})
    exercise = dataclasses.replace(HALVES, cases=lambda draw: [case])
    assert judge._expected(exercise, case, Seen(1 / 3), Seen(0.33333340)) == "0.333333, in more digits"
    assert judge._expected(exercise, case, Seen(0.5), Seen(0.5, changed=("values",))) == "0.5, and unchanged inputs"


def test_of_a_small_input_the_right_values_are_shown() -> None:
    one = dataclasses.replace(HALVES, cases=lambda draw: [Case("one number", {"values": torch.tensor([3.0])})])
    failure = verdict(lambda values, keep=0: values, one).failure
    assert failure is not None
    assert failure.expected == "[1.5] (shape (1,), float32)"


@pytest.mark.parametrize("wrong", [lambda values, keep=0: halves(values, keep).double(), halves])
def test_the_dtype_counts_where_the_exercise_says_so(wrong: Any) -> None:
    typed = dataclasses.replace(HALVES, dtypes=True)
    assert verdict(wrong).passed
    assert verdict(wrong, typed).passed == (wrong is halves)
    if wrong is not halves:
        assert verdict(wrong, typed).message == (
            "The values are right, but the dtype should be float32, and your code returns float64."
        )


def test_what_was_printed_in_the_first_case_that_fails_is_kept() -> None:
    def answer(values: Tensor, keep: int = 0) -> Tensor:
        print(f"keep is {keep}")
        return halves(values)

    seen = verdict(answer).failure
    assert seen is not None
    assert seen.printed == "keep is 2\n"


# --- not started ----------------------------------------------------------------------------------------


def _stub(*arguments: Any, **keywords: Any) -> None:
    raise NotImplementedError


def test_a_stub_is_not_started_yet_and_no_failure() -> None:
    seen = verdict(_stub)
    assert (seen.status, seen.failure, seen.misconception) == ("not started", None, "")


def test_an_answer_that_calls_another_exercise_that_is_not_written_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def row_echelon(matrix: Tensor) -> None:
        raise NotImplementedError

    seen = verdict(lambda values, keep=0: row_echelon(values))
    assert seen.status == "not started"
    assert seen.message.startswith("row_echelon, which your code calls, is not written yet.")


def test_an_error_of_pytorchs_own_is_not_taken_for_not_started() -> None:
    seen = verdict(lambda values, keep=0: values.to("meta").cpu())
    assert seen.status == "failed"


def test_cases_that_were_not_tried_any_more_are_told_from_those_that_failed() -> None:
    seen = verdict(_loops)
    assert [(case.right, case.tried) for case in seen.cases] == [(False, True)] + [(False, False)] * 3


# --- predictions ----------------------------------------------------------------------------------------

CHOICE = Prediction("guess", "Which?", "b", "Because.", "an idea", {"a": "one", "b": "two"}, points=2)
NUMBER = Prediction("guess", "How many?", 100, "Because.", "an idea", within=2)


@pytest.mark.parametrize(
    ("prediction", "given_", "status", "points"),
    [
        (CHOICE, "b", "passed", 2),
        (CHOICE, " B", "passed", 2),
        (CHOICE, "a", "failed", 0),
        (CHOICE, None, "not started", 0),
        (CHOICE, "c", "not started", 0),
        (CHOICE, [1], "not started", 0),
        (NUMBER, 100, "passed", 1),
        (NUMBER, 199.9, "passed", 1),
        (NUMBER, 51, "passed", 1),
        (NUMBER, torch.tensor(120), "passed", 1),
        (NUMBER, 201, "failed", 0),
        (NUMBER, -100, "failed", 0),
        (NUMBER, 0, "failed", 0),
        (NUMBER, float("nan"), "failed", 0),
        (NUMBER, True, "not started", 0),
        (NUMBER, "100", "not started", 0),
    ],
)
def test_a_prediction(prediction: Prediction, given_: Any, status: str, points: int) -> None:
    seen = judge.judge_prediction(prediction, given_)
    assert (seen.status, seen.points) == (status, points)
    assert seen.message.endswith("Because.") == (status in ("passed", "failed"))


@given(st.floats(0.01, 1e6), st.floats(1, 100), st.floats(0.5, 2))
def test_a_number_counts_within_its_factor_on_either_side(answer: float, within: float, off: float) -> None:
    prediction = Prediction("guess", "How many?", answer, "Because.", "an idea", within=within)
    inside = within**0.99
    assert prediction.right(answer * inside)
    assert prediction.right(answer / inside)
    assert not prediction.right(answer * within * (1 + off))
    assert not prediction.right(answer / (within * (1 + off)))
    assert not prediction.right(-answer)


def gaussian_start(
    in_features: int, out_features: int, rank: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    check_rank(rank, min(in_features, out_features), "the smaller side of W")
    return torch.randn(rank, in_features, generator=generator) / in_features**0.5, torch.zeros(out_features, rank)


def with_replacement(
    table: Tensor,
    num_virtual_tokens: int,
    init: str = "vocabulary",
    init_ids: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    if init != "vocabulary":
        return initial_prompt(table, num_virtual_tokens, init, init_ids, generator)
    return table.detach()[torch.randint(len(table), (num_virtual_tokens,), generator=generator)]


def too_few_rows(table: Tensor, num_virtual_tokens: int, *rest: Any) -> Tensor:
    return initial_prompt(table, num_virtual_tokens, *rest)[: len(table)]


@pytest.mark.parametrize(
    ("exercise", "answer", "said"),
    [
        ("initial_factors", gaussian_start, "A has entries beyond 1/sqrt(in)"),
        ("initial_prompt", with_replacement, "without replacement"),
        ("initial_prompt", too_few_rows, "50 rows were asked for and 30 came back"),
    ],
)
def test_what_is_drawn_at_random_is_explained_and_not_to_be_tried_by_hand(
    exercise: str, answer: Any, said: str
) -> None:
    found = units.find(exercise)[1]
    assert isinstance(found, Exercise)
    assert said in verdict(answer, dataclasses.replace(found, seconds=10)).message
