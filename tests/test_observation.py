"""The probe's half of a check: whatever an answer does, what is left is plain data and an untouched notebook."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_from_scratch.checks import observation
from lora_from_scratch.checks.observation import PRINTED, Opaque, Seen, identical, observe, plain, time_limit

DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def see(answer: Any, seconds: float = 4.0, **inputs: Any) -> Seen:
    """What there is to see of an answer that is called with these inputs."""
    return observe(lambda answer, **given: answer(**given), answer, [inputs], seconds)[0]


@given(DATA)
def test_plain_data_stays_what_it_is_and_is_identical_to_itself(value: Any) -> None:
    assert identical(plain(value), value)


@given(st.lists(st.floats(allow_nan=False), min_size=1), st.integers(0, 10))
def test_one_changed_entry_is_seen(numbers: list[float], place: int) -> None:
    one = torch.tensor(numbers, dtype=torch.float64)
    other = one.clone()
    other[place % len(numbers)] = 7.0 if numbers[place % len(numbers)] != 7 else 8.0
    assert not identical(one, other)


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (np.float32(0.5), 0.5),
        (np.array(3), 3),
        ((1, (2.0, "x")), [1, [2.0, "x"]]),
        (torch.Size([2, 3]), [2, 3]),
        ({1: True}, {"1": True}),
        (range(3), [0, 1, 2]),
        (range(10**12), Opaque("range")),
        (object(), Opaque("object")),
        (torch.empty(3, device="meta"), Opaque("tensor without values, on the device meta")),
    ],
)
def test_what_is_returned_becomes_plain_data(value: Any, seen: Any) -> None:
    assert plain(value) == seen
    assert type(plain(value)) is type(seen)


def test_arrays_parameters_and_sparse_tensors_become_dense_tensors_that_share_no_memory() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    array = np.ones(2, dtype=np.float32)
    for value in (weight, array, torch.ones(2).to_sparse()):
        seen = plain(value)
        assert type(seen) is torch.Tensor
        assert not seen.requires_grad
        assert torch.equal(seen, torch.ones(2))
        seen.zero_()
    assert torch.equal(weight.detach(), torch.ones(2))
    assert array.tolist() == [1, 1]


def test_an_answer_gets_copies_and_what_it_changes_is_noticed() -> None:
    matrix, names = torch.ones(2, 2), ["a"]

    def answer(matrix: torch.Tensor, names: list[str], scale: float) -> None:
        matrix[0, 0] = 5
        names.append("b")

    seen = see(answer, matrix=matrix, names=names, scale=2.0)
    assert seen.changed == ("matrix", "names")
    assert torch.equal(matrix, torch.ones(2, 2))
    assert names == ["a"]
    assert see(lambda matrix: matrix + 1, matrix=matrix).changed == ()


def test_a_change_of_dtype_or_of_nothing_but_nan_is_told_apart() -> None:
    assert not identical(torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert identical(torch.tensor([float("nan"), 1]), torch.tensor([float("nan"), 1]))
    assert not identical(torch.ones(1), [1.0])


def _tight_loop() -> None:
    while True:
        pass


def _sleeps_and_swallows_everything() -> None:
    while True:
        try:  # noqa: SIM105
            time.sleep(0.01)
        except:  # noqa: E722
            pass


def _swallows_twice() -> None:
    while True:
        try:
            try:
                time.sleep(0.05)
            except BaseException:
                time.sleep(0.002)
        except BaseException:
            pass


@pytest.mark.parametrize("endless", [_tight_loop, _sleeps_and_swallows_everything, _swallows_twice])
def test_an_answer_that_does_not_end_is_stopped_whatever_it_swallows(endless: Any) -> None:
    seen = see(endless, seconds=0.1)
    assert seen.stopped
    assert seen.errors == ()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_waiting_for_a_processor_does_not_count_and_neither_does_a_short_sleep() -> None:
    assert not see(lambda: time.sleep(0.3), seconds=0.1).stopped  # as if other programs ran for 0.3 seconds
    assert see(lambda: time.sleep(60), seconds=0.05).stopped


def test_an_alarm_that_comes_when_the_limit_is_over_does_nothing() -> None:
    alarm = observation._Alarm(0.0, observation.Stopwatch())
    alarm.over = True
    alarm.up(signal.SIGALRM, None)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("function", [observation._Alarm.up, time_limit.__wrapped__])  # type: ignore[attr-defined]
def test_an_alarm_does_not_raise_inside_its_own_machinery(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "setitimer", lambda *arguments: None)  # no alarm after this one
    alarm = observation._Alarm(0.0, observation.Stopwatch())
    time.sleep(0.001)
    alarm.up(signal.SIGALRM, SimpleNamespace(f_code=function.__code__))  # type: ignore[arg-type]
    with pytest.raises(observation.OutOfTime):
        alarm.up(signal.SIGALRM, SimpleNamespace(f_code=see.__code__))  # type: ignore[arg-type]


STORM = """
import time
from lora_from_scratch.checks import observation

def swallows():
    while True:
        try:
            time.sleep(0.001)
        except:
            pass

for _ in range(100):
    seen = observation.observe(lambda answer: answer(), swallows, [{}], seconds=0.002)
    assert seen[0].stopped
print("alive")
"""


def test_a_process_survives_a_hundred_answers_that_swallow_everything_beside_busy_neighbours() -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        done = subprocess.run([sys.executable, "-c", STORM], capture_output=True, text=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_after_one_case_that_does_not_end_the_others_are_not_tried() -> None:
    tried = []

    def answer(n: int) -> int:
        tried.append(n)
        while n == 1:
            pass
        return n

    seen = observe(lambda answer, n: answer(n), answer, [{"n": n} for n in range(4)], seconds=0.1)
    assert [one.stopped for one in seen] == [False, True, True, True]
    assert tried == [0, 1]


def test_the_alarm_of_whoever_called_is_put_back() -> None:
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        see(lambda: 1)
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGALRM, before)


def test_outside_the_main_thread_there_is_no_limit_and_no_error() -> None:
    result = []

    def elsewhere() -> None:
        with time_limit(0.001):
            result.append(see(lambda: 3).value)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert result == [3]


def test_a_flood_of_output_is_cut_and_goes_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    def answer() -> None:
        for _ in range(1000):
            print("x" * 1000)
            print("y", file=sys.stderr)

    assert see(answer).printed == ("x" * 1000 + "\n" + "x" * 1000)[:PRINTED]
    assert capsys.readouterr() == ("", "")


def test_warnings_cost_nothing_and_the_filters_stay(recwarn: pytest.WarningsRecorder) -> None:
    filters = list(warnings.filters)

    def answer() -> int:
        warnings.warn("careful", UserWarning, stacklevel=1)
        warnings.simplefilter("error")
        return 1

    assert see(answer) == Seen(value=1)
    assert [one for one in recwarn.list if str(one.message) == "careful"] == []
    assert warnings.filters == filters


def test_random_states_dtype_and_gradient_mode_are_afterwards_what_they_were() -> None:
    def answer() -> float:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        return float(torch.rand(()))

    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    numbers, python = np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    see(answer)
    assert torch.equal(torch.rand(3), expected)
    assert np.random.get_state()[1].tolist() == numbers  # type: ignore[index]
    assert random.getstate() == python
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_each_case_begins_from_a_random_state_of_its_own_that_its_seed_repeats() -> None:
    def seen(seed: int) -> list[Any]:
        return [one.value for one in observe(lambda answer: answer(), lambda: torch.rand(()), [{}, {}], seed=seed)]

    first, second = seen(5)
    assert first != second
    assert seen(5) == [first, second]
    assert seen(6)[0] == second


@pytest.mark.parametrize("error", [SystemExit("bye"), GeneratorExit("bye"), ValueError("bye"), RecursionError("bye")])
def test_any_error_is_data(error: BaseException) -> None:
    def answer() -> None:
        raise error

    seen = see(answer)
    assert seen.errors[0] == type(error).__name__
    assert seen.message == "bye"
    assert seen.where.startswith("answer, line ")


def test_ctrl_c_is_the_learners() -> None:
    def answer() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        see(answer)


def test_an_error_without_a_readable_text_has_none() -> None:
    class OddError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def answer() -> None:
        raise OddError

    assert see(answer).message == ""


def test_an_error_before_the_answers_first_line_has_no_place() -> None:
    from lora_from_scratch.checks.exercise import call

    seen = observe(call, lambda other: other, [{"n": 1}])[0]
    assert seen.errors[0] == "TypeError"
    assert seen.where == ""
