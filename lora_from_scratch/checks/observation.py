"""The probe's half of a check: run an answer on inputs and record the observations as plain data.

This half runs in the learner's process. It contains no right answer and makes no decision.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import os
import random
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

Data = Union[None, bool, int, float, str, Tensor, "list[Data]", "dict[str, Data]"]
"""Plain data: can be written as JSON and safetensors, and so sent from the learner's process to the judge's."""

PRINTED = 2_000  # number of printed characters that are kept
LONGEST_RANGE = 100_000  # longer ranges are not expanded
REPEAT_DELAYS = (20e-6, 50e-6, 0.02, 100e-6, 200e-6, 0.005)  # seconds until `OutOfTime` is raised again
SHORTEST_DELAY = 0.01  # seconds until the time is looked at again
PATIENCE = 5.0  # so many seconds on the clock count as one of processor time
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclass(frozen=True)
class Seen:
    """What was observed when an answer was tried on one case.

    Attributes:
        value: what the probe returned, as plain data; None if it raised.
        errors: the names of the exception's classes, the most specific first; empty if nothing was raised.
        message: the exception's text.
        where: the answer's innermost running function and its line: "rank, line 7".
        changed: the names of inputs that the answer modified.
        printed: the beginning of the printed output.
        stopped: whether it ran out of time.
    """

    value: Data = None
    errors: tuple[str, ...] = ()
    message: str = ""
    where: str = ""
    changed: tuple[str, ...] = ()
    printed: str = ""
    stopped: bool = False

    @property
    def raised(self) -> bool:
        return bool(self.errors)


class Opaque(str):
    """Stands for a value that is not plain data; the text is the name of its type."""


class OutOfTime(BaseException):
    """Derived from BaseException, so that an answer's own `except Exception` does not swallow it."""


def observe(
    probe: Callable[..., Any], answer: Any, inputs: list[Mapping[str, Data]], seconds: float = 4.0, seed: int = 0
) -> list[Seen]:
    """Try an answer on each of the inputs. Its errors are recorded, not raised (except for Ctrl-C by the learner).

    The answer gets copies of the inputs. The random state of each case depends only on `seed` and its position; the
    learner's own random state is restored afterwards.

    Args:
        seconds: the time limit for all inputs together (see `Stopwatch`); inputs not reached in time count as stopped.
    """
    tried = try_on(probe, answer, inputs, seconds, seed)
    return [
        dataclasses.replace(seen, changed=changed(given, after))
        for given, (seen, after) in zip(inputs, tried, strict=True)
    ]


def try_on(
    probe: Callable[..., Any], answer: Any, inputs: list[Mapping[str, Data]], seconds: float, seed: int
) -> list[tuple[Seen, dict[str, Data]]]:
    """Like `observe`, but returns each case's inputs as they are afterwards instead of filling in `changed`."""
    tried: list[tuple[Seen, dict[str, Data]]] = []
    with _state_kept():
        for place, given in enumerate(inputs):
            if tried and tried[-1][0].stopped:
                tried.append((Seen(stopped=True), {}))
                continue
            seed_everything(seed + place)
            watch = Stopwatch()
            tried.append(_try_on_one(probe, answer, given, seconds))
            seconds = max(0.05, seconds - watch.seconds)
    return tried


def changed(given: Mapping[str, Data], after: Mapping[str, Data]) -> tuple[str, ...]:
    """The names of modified inputs. `after` is empty if the answer ran out of time."""
    return tuple(name for name in given if after and not (name in after and identical(given[name], after[name])))


def _try_on_one(
    probe: Callable[..., Any], answer: Any, given: Mapping[str, Data], seconds: float
) -> tuple[Seen, dict[str, Data]]:
    theirs = copy.deepcopy(dict(given))
    printed = _Start()
    value: Data = None
    errors: tuple[str, ...] = ()
    message = where = ""
    try:
        with _captured(printed), time_limit(seconds):
            value = plain(probe(answer, **theirs))
    except KeyboardInterrupt:
        raise
    except OutOfTime:
        return Seen(printed=printed.getvalue(), stopped=True), {}
    except BaseException as error:
        errors = tuple(kind.__name__ for kind in type(error).__mro__ if kind not in (BaseException, object))
        message, where = _text(error), _where(error)
    return Seen(value, errors, message, where, (), printed.getvalue()), {name: _after(theirs[name]) for name in given}


def _after(value: Any) -> Data:
    try:
        return plain(value)
    except Exception:  # an answer can put anything into a list that it gets, even the list itself
        return Opaque(f"{type(value).__name__} that can no longer be read")


def plain(value: Any) -> Data:
    """Convert a value to plain data: arrays become tensors, tuples lists, keys text; other objects become `Opaque`."""
    if value is None or type(value) in (bool, int, float, str, Opaque):
        return value
    if isinstance(value, Tensor):
        if value.is_meta:
            return Opaque("tensor without values, on the device meta")
        value = value if value.layout == torch.strided else value.to_dense()
        return value.detach().to("cpu", copy=True).as_subclass(Tensor)
    if isinstance(value, np.generic | np.ndarray):
        return _from_numpy(np.asarray(value))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    for kind in (bool, int, float, str):  # for a subclass, only the plain value is kept
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, torch.Size | set | frozenset) or (isinstance(value, range) and len(value) <= LONGEST_RANGE):
        return [plain(item) for item in value]
    return Opaque(type(value).__name__)


def dtype_of(x: Any) -> str:
    """The dtype of a tensor or NumPy array as text ("int8"), for exercises in which the dtype matters."""
    return str(getattr(x, "dtype", type(x).__name__)).removeprefix("torch.")


def identical(one: Data, other: Data) -> bool:
    """Whether two values are exactly equal; NaN equals NaN."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same_kind = one.shape == other.shape and one.dtype == other.dtype
        return same_kind and bool(torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(identical, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return type(one) is type(other) and (one == other or one != one)


class Stopwatch:
    """The time that counts against a limit: processor time of this thread, so that a busy machine costs nothing.

    Waiting uses none, so time on the clock counts as well, but `patience` times less: code that sleeps is stopped too.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience, self.processor, self.clock = patience, time.thread_time(), time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.thread_time() - self.processor, (time.monotonic() - self.clock) / self.patience)


@contextlib.contextmanager
def time_limit(seconds: float, patience: float = PATIENCE) -> Iterator[None]:
    """Raise `OutOfTime` in the block when the time is up (see `Stopwatch`), repeatedly until the block ends.

    Args:
        patience: how many seconds on the clock count as one; 1: the clock decides.

    It is repeated because a bare `except:` swallows it. The repetitions come at varying intervals, so that one of them
    eventually arrives while the code is in the handler rather than in the `try`.

    Needs the main thread and a system with interval timers (not Windows); otherwise there is no limit.
    """
    possible = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not possible:
        yield
        return
    alarm = _Alarm(seconds, Stopwatch(patience))
    before = signal.signal(signal.SIGALRM, alarm.up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        alarm.over = True  # first of all: from here on the alarm neither raises nor sets the timer again
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # discards an alarm that is on its way; the default would kill
        signal.signal(signal.SIGALRM, before)


class _Alarm:
    """The handler of `time_limit`'s signal."""

    def __init__(self, seconds: float, watch: Stopwatch) -> None:
        self.limit, self.watch = seconds, watch
        self.over = False
        self.delays = itertools.cycle(REPEAT_DELAYS)

    def up(self, number: int, frame: FrameType | None) -> None:
        if self.over:
            return
        left = self.limit - self.watch.seconds
        if left > 0:  # so far most of the time went to other programs
            signal.setitimer(signal.ITIMER_REAL, max(left, SHORTEST_DELAY))
            return
        signal.setitimer(signal.ITIMER_REAL, next(self.delays))
        if frame is not None and frame.f_code not in _MACHINERY:  # raising there would leave the timer running
            raise OutOfTime


_MACHINERY = frozenset(
    function.__code__
    for function in (
        time_limit.__wrapped__,  # type: ignore[attr-defined]
        contextlib._GeneratorContextManager.__enter__,
        contextlib._GeneratorContextManager.__exit__,
        _try_on_one,
        _Alarm.up,  # a second alarm may come while the first is handled
    )
)


@contextlib.contextmanager
def _captured(printed: io.StringIO) -> Iterator[None]:
    """Capture standard output in `printed`; discard warnings and standard error."""
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Start(io.StringIO):
    """Keeps only the beginning of what is written."""

    def write(self, text: str) -> int:
        room = PRINTED - self.tell()
        if room > 0:
            super().write(text[:room])
        return len(text)


def _from_numpy(array: np.ndarray) -> Data:
    if array.ndim == 0 and array.dtype.kind in "biufSU":
        return array.item()
    if array.dtype.kind in "biuf":
        return torch.from_numpy(np.array(array, copy=True, order="C"))
    return Opaque(f"array of {array.dtype}")


def _text(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:300]
    except Exception:
        return ""


def _where(error: BaseException) -> str:
    """The learner's own line: the last frame outside the library and installed packages."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and not frame.filename.startswith(PACKAGE + os.sep)
    ]
    return f"{frames[-1].name}, line {frames[-1].lineno}" if frames else ""


def seed_everything(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also queues a call for every GPU, with a traceback
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def _state_kept() -> Iterator[None]:
    """Restore random states, default dtype and gradient mode afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            torch.set_grad_enabled(True)
            torch.set_default_dtype(torch.float32)  # as in the judge
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(gradients)
            np.random.set_state(numpy_state)
            random.setstate(python_state)
