"""The functions that learners call in a notebook: those of `__all__`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from lora_from_scratch.checks import cells, display, in_room, progress_file
from lora_from_scratch.checks.exercise import Exercise, Prediction
from lora_from_scratch.checks.in_room import join, leave
from lora_from_scratch.checks.judge import judge, judge_prediction
from lora_from_scratch.checks.observation import observe, plain
from lora_from_scratch.checks.progress_report import report
from lora_from_scratch.checks.units import find
from lora_from_scratch.checks.verdict import Verdict, describe
from lora_from_scratch.support.contention import watch
from lora_from_scratch.support.figures import BUILDING

__all__ = ["check", "hint", "join", "leave", "library", "progress", "working"]


class Points(float):
    """Points out of a maximum, returned by `check`; nbgrader reads the number as partial credit."""

    def __new__(cls, points: float, most: float) -> Points:
        made = super().__new__(cls, round(points, 2))
        made.most = most
        return made

    most: float

    def __repr__(self) -> str:
        return float.__repr__(self)

    def _repr_html_(self) -> str:
        """Nothing: a front end has just shown the verdict, which says the points."""
        return ""


class UnknownExerciseError(ValueError):
    """There is no exercise of that name. A notebook shows the message without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def check(name: str, seed: int | None = None, namespace: Mapping[str, Any] | None = None) -> Points:
    """Try the notebook's answer to an exercise on fresh inputs, show the verdict, and return the points.

    Whatever goes wrong becomes a verdict; `check` never raises.

    Args:
        name: the name of the exercise or prediction, which is also that of the function, class or variable.
        seed: the seed of the inputs, to see the same ones again; None draws fresh inputs.
        namespace: where to look up the answer; None means the notebook.
    """
    watch()  # other programs may need the processors too
    try:
        verdict = verdict_on(name, seed, namespace)
        _keep_prediction(name, namespace)
    except UnknownExerciseError as error:
        verdict = Verdict(name if isinstance(name, str) else "check", "unknown", 0, 0, message=str(error))
    except Exception as error:  # a bug in the check, not the learner's fault
        if os.environ.get("LORA_FROM_SCRATCH_DEBUG"):
            raise
        message = f"This is an error in the course, not in your code; please report it. {type(error).__name__}: {error}"
        verdict = Verdict(name, "broken", 0, find(name)[1].points, message=message)
    notes = [*progress_file.record(verdict), *(in_room.report_verdict(verdict) if namespace is None else [])]
    verdict = dataclasses.replace(verdict, notes=(*verdict.notes, *notes))
    display.show(verdict)
    return Points(verdict.points, verdict.max_points)


def verdict_on(name: str, seed: int | None = None, namespace: Mapping[str, Any] | None = None) -> Verdict:
    """The verdict that `check` gives, without showing or recording it.

    Raises:
        UnknownExerciseError: there is no exercise of that name.
    """
    item = _item(name)
    names = notebook() if namespace is None else namespace
    if isinstance(item, Prediction):
        return judge_prediction(item, plain(names.get(name)), cells.first(item))
    if names is notebook() and (problem := cells.not_python(name)):
        message = f"The last cell with `{name}` could not be run, so nothing is checked. {problem}. Correct it first."
        return Verdict(name, "missing", 0, item.points, message=message)
    if (why := unusable(item, names)) is not None:
        return why
    seed = seed % 2**32 if isinstance(seed, int) else 0 if os.environ.get(BUILDING) else fresh_seed()
    answer = names[name]
    return judge(item, seed, observe(item.probe, answer, [c.inputs for c in item.inputs(seed)], item.seconds, seed))


def _keep_prediction(name: str, namespace: Mapping[str, Any] | None) -> None:
    """If this is a prediction that no cell has set on this computer, the check's first sight of it counts."""
    item = find(name)[1]
    if isinstance(item, Prediction):
        cells.commit(item, (notebook() if namespace is None else namespace).get(name))


def fresh_seed() -> int:
    return int.from_bytes(os.urandom(3), "big")


def unusable(exercise: Exercise, names: Mapping[str, Any]) -> Verdict | None:
    """The verdict if the answer cannot be tried (missing, not a function or class, or the library's own), else None."""
    name, wanted = exercise.name, "class" if inspect.isclass(exercise.object) else "function"
    status = "missing"
    answer = names.get(name)
    if name not in names:
        message = f"There is no `{name}` in this notebook yet: run the cell that defines it, then this one."
    elif answer is exercise.object:
        status = "library"
        message = "You are using the library's version, which earns no points. Your own earns them once it passes."
    elif isinstance(answer, ModuleType):
        message = (
            f"`{name}` is a module here: an import has overwritten your {wanted}. Import it under another name, then "
            f"run the cell that defines your {wanted}."
        )
    elif not callable(answer):
        message = (
            f"`{name}` is {_in_words(answer)} here, but should be a {wanted}: another line of the notebook has "
            f"overwritten it. Run the cell that defines your {wanted} again."
        )
    elif wanted == "class" and not inspect.isclass(answer):
        message = f"`{name}` is {_in_words(answer)} here, but should be a class: `class {name}: ...`."
    else:
        return None
    return Verdict(name, status, 0, exercise.points, message=message)


def hint(name: str) -> None:
    """Show the exercise's next hint after those already opened."""
    try:
        item = _item(name)
    except UnknownExerciseError as error:
        display.show_text(str(error))
        return
    if isinstance(item, Prediction):
        display.show_text("Predictions have no hints. Make a guess and see what happens.")
        return
    opened = progress_file.open_hint(name, len(item.hints))
    in_room.report_hints(name, opened)
    display.show_hints(name, item.hints[:opened], len(item.hints))


def library(name: str) -> Any:
    """The library's own version of an exercise, for when you are stuck: `row_echelon = library("row_echelon")`.

    The rest of the notebook works with it. It earns no points; your own version does as soon as it passes.

    Raises:
        UnknownExerciseError: there is no exercise of that name.
    """
    exercise = _exercise(name)
    progress_file.took_library(name)
    in_room.report_library(name)
    display.show_text(
        f"The rest of the notebook now works with the library's `{name}`. As long as you use it, "
        f'`check("{name}")` gives 0 of {exercise.points} points. You can come back at any time: delete this line and '
        "run your own cell. When it passes its check, you get all the points."
    )
    return exercise.object


def working(name: str, namespace: Mapping[str, Any] | None = None) -> Any:
    """Your own version of an exercise if it is right, otherwise the library's, for the experiments to build on.

    Raises:
        UnknownExerciseError: there is no exercise of that name.
    """
    watch()
    exercise = _exercise(name)
    names = notebook() if namespace is None else namespace
    if verdict_on(name, 0, names).passed:
        display.show_text(f"With your own `{name}`.")
        return names[name]
    display.show_text(f"With the library's `{name}`, until yours passes its check.")
    return exercise.object


def progress(unit: str | int | None = None) -> None:
    """Show your progress by unit and by idea, or for each exercise of one unit: `progress("01")`."""
    try:
        tables, notes = report(unit)
    except ValueError as error:
        display.show_text(str(error))
        return
    for as_html, as_text in tables:
        display.publish(as_html, as_text)
    display.show_text(" ".join(notes))


def notebook() -> Mapping[str, Any]:
    """The names defined in the notebook (or in the script that is running)."""
    if "IPython" in sys.modules:
        shell = sys.modules["IPython"].get_ipython()
        if shell is not None:
            return shell.user_ns
    return vars(sys.modules["__main__"])


def _item(name: Any) -> Exercise | Prediction:
    if not isinstance(name, str):
        given = getattr(name, "__name__", "name_of_the_exercise")
        raise UnknownExerciseError(f'Write the name of the exercise in quotes: `check("{given}")`.')
    try:
        return find(name)[1]
    except ValueError as error:
        raise UnknownExerciseError(str(error)[0].upper() + str(error)[1:]) from None


def _exercise(name: str) -> Exercise:
    item = _item(name)
    if isinstance(item, Prediction):
        raise UnknownExerciseError(f"{name} is a prediction, not an exercise: there is no library version of it")
    return item


def _in_words(value: Any) -> str:
    """A value in words: "the number 3", "a list", ..."""
    if value is None:
        return "None"
    if isinstance(value, int | float):
        return f"the number {describe(plain(value))}"
    if inspect.isfunction(value):
        return "a function"
    return f"a {type(value).__name__}"


cells.watch()
