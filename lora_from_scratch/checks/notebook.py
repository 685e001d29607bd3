"""What a learner calls in a notebook: `check`, `hint`, `library`, `working`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from lora_from_scratch.checks import display
from lora_from_scratch.checks.exercise import Exercise, Prediction
from lora_from_scratch.checks.judge import judge, judge_prediction
from lora_from_scratch.checks.observation import observe, plain
from lora_from_scratch.checks.progress import Progress
from lora_from_scratch.checks.units import find
from lora_from_scratch.checks.verdict import Verdict


class Points(float):
    """Points out of a maximum. It is what `check` returns: nbgrader reads the number as partial credit."""

    def __new__(cls, points: float, most: float) -> Points:
        made = super().__new__(cls, round(points, 2))
        made.most = most
        return made

    most: float

    def __repr__(self) -> str:
        return float.__repr__(self)

    def _repr_html_(self) -> str:
        return f"{self:g} of {self.most:g} points"


def check(name: str, seed: int | None = None, namespace: Mapping[str, Any] | None = None) -> Points:
    """Try the notebook's answer to an exercise on fresh inputs, show the verdict, and return the points.

    Args:
        name: the exercise's or prediction's name: that of the function, class or variable.
        seed: of the inputs, to see the same ones again; None: fresh ones.
        namespace: where the answer is; None: the notebook.

    Raises:
        ValueError: there is no exercise of that name.
    """
    verdict = verdict_on(name, seed, namespace)
    Progress.load().record(verdict)
    display.show(verdict)
    return Points(verdict.points, verdict.max_points)


def verdict_on(name: str, seed: int | None = None, namespace: Mapping[str, Any] | None = None) -> Verdict:
    """The verdict of `check`, neither shown nor recorded."""
    _, item = find(name)
    names = notebook() if namespace is None else namespace
    if isinstance(item, Prediction):
        return judge_prediction(item, plain(names.get(name)))
    if name not in names:
        message = f"There is no {name} in this notebook yet: run the cell that defines it, then this one."
        return Verdict(name, "missing", 0, item.points, message=message)
    answer = names[name]
    if answer is item.object:
        message = "This is the library's version. Go on with it; the points are for your own."
        return Verdict(name, "library", 0, item.points, message=message)
    seed = int.from_bytes(os.urandom(3), "big") if seed is None else seed
    return judge(item, seed, observe(item.probe, answer, [c.inputs for c in item.inputs(seed)], item.seconds, seed))


def hint(name: str) -> None:
    """Show the exercise's next hint, and those that are already open.

    Raises:
        ValueError: there is no exercise of that name.
    """
    _, item = find(name)
    if isinstance(item, Prediction):
        display.show_text("There are no hints for a prediction: a wrong guess is worth as much as a right one.")
        return
    display.show_hints(name, item.hints[: Progress.load().open_hint(name, len(item.hints))], len(item.hints))


def library(name: str) -> Any:
    """The library's own version of an exercise, for whoever is stuck: `row_echelon = library("row_echelon")`.

    The rest of the notebook works with it. It earns no points; your own version does, whenever it passes.

    Raises:
        ValueError: there is no exercise of that name.
    """
    exercise = _exercise(name)
    display.show_text(
        f"This is the library's {name}. The rest of the notebook works with it; it earns none of the {exercise.points} "
        f"points. You can come back: when your own {name} passes its check, the points are yours."
    )
    return exercise.object


def working(name: str, namespace: Mapping[str, Any] | None = None) -> Any:
    """Your own version of an exercise if it is right, otherwise the library's: experiments go on with that.

    Raises:
        ValueError: there is no exercise of that name.
    """
    exercise = _exercise(name)
    verdict = verdict_on(name, 0, namespace)
    if verdict.passed:
        display.show_text(f"With your own {name}.")
        return (notebook() if namespace is None else namespace)[name]
    display.show_text(f"With the library's {name}, until yours passes its check.")
    return exercise.object


def notebook() -> Mapping[str, Any]:
    """The names that are defined in the notebook (or in the script that was started)."""
    if "IPython" in sys.modules:
        shell = sys.modules["IPython"].get_ipython()
        if shell is not None:
            return shell.user_ns
    return vars(sys.modules["__main__"])


def _exercise(name: str) -> Exercise:
    _, item = find(name)
    if isinstance(item, Prediction):
        raise ValueError(f"{name} is a prediction, not an exercise: there is no library version of a guess")
    return item
