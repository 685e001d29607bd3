"""What the checks notice about the cells that a learner runs.

The first prediction that a cell sets is kept: it is made before the experiment, and a later one after it. And a cell
that is not valid Python defines nothing, so that the notebook still has the definition before it, if there was one.

Nothing is watched in a script, while notebooks are built, or in grading, where only the notebook's source is known.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from lora_from_scratch.checks import display, progress_file
from lora_from_scratch.checks.exercise import LARGEST_GUESS, Prediction
from lora_from_scratch.checks.judge import as_written, read_guess
from lora_from_scratch.checks.observation import plain
from lora_from_scratch.checks.units import units
from lora_from_scratch.support.figures import BUILDING

DEFINED = re.compile(r"^[ \t]*(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.MULTILINE)

_not_python: dict[str, str] = {}  # by name, what is wrong with the last cell that would have defined it


def watch() -> None:
    """Look at every cell after it has run, if this is a notebook's kernel."""
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel") and not os.environ.get(BUILDING):
        shell.events.register("post_run_cell", after_cell)


def after_cell(result: Any) -> None:
    """Take notice of a cell that has run: `result` is IPython's `ExecutionResult`. Never raises an error."""
    with contextlib.suppress(Exception):
        text = str(result.info.raw_cell)
        _notice_definitions(text, result.error_before_exec)
        for prediction in _mentioned(text):
            said = commit(prediction, sys.modules["IPython"].get_ipython().user_ns.get(prediction.name))
            if said:
                display.show_text(said)


def not_python(name: str) -> str:
    """The error of the last cell that would have defined this name; "" if that cell was valid Python."""
    return _not_python.get(name, "")


def commit(prediction: Prediction, value: Any) -> str:
    """Keep a prediction if it is the first, and say so; "" if there is nothing new to say."""
    given, problem = read_guess(prediction, plain(value))
    if given is None:
        return ""
    if problem:
        return problem
    before = first(prediction)
    if before is None and isinstance(given, str | int | float) and may_be_kept(given):
        progress_file.keep_guess(prediction.name, given)
        return f"Your prediction: {as_written(given)}. Now see what happens."
    if before is None or before == given:
        return ""
    return f"You first said {as_written(before)}; the first prediction counts."


def first(prediction: Prediction) -> str | float | None:
    """The prediction that was made first on this computer, or None."""
    entry = progress_file.load().entries.get(prediction.name)
    kept = None if entry is None else entry.guess
    return None if read_guess(prediction, kept)[1] else kept


def may_be_kept(given: str | float) -> bool:
    """Whether it is text, or a number that a file can hold."""
    return isinstance(given, str) or abs(given) <= LARGEST_GUESS


def _notice_definitions(text: str, error: BaseException | None) -> None:
    for name in DEFINED.findall(text):
        if error is None:
            _not_python.pop(name, None)
        else:
            _not_python[name] = _in_one_line(error)


def _in_one_line(error: BaseException) -> str:
    line = f" in line {error.lineno} of the cell" if isinstance(error, SyntaxError) and error.lineno else ""
    words = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}{line}: {words}"


def _mentioned(text: str) -> Iterator[Prediction]:
    """The predictions whose variables a cell sets."""
    for unit in units():
        for prediction in unit.predictions:
            if re.search(rf"^[ \t]*{prediction.name}[ \t]*=[^=]", text, re.MULTILINE):
                yield prediction
