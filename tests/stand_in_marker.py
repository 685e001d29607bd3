"""A stand-in for `marking.mark_file` that runs nothing: what a cell says decides its points."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import nbformat

from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.checks.verdict import CaseResult, Failure, Verdict
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.grading.marking import Settings

HALF = "You have done half of it: `x < 0` is missing."
SLOW = "TESTS_SECONDS_A_SUBMISSION"


def mark_file(
    path: Path, released: Any, unit: Unit, learner: str, secret: str, settings: Settings, *, key: str = ""
) -> Graded:
    """ "half" in a solution is worth half the points; "doubtful" asks for a human; "die" ends this process."""
    time.sleep(float(os.environ.get(SLOW, "0")))
    notebook = nbformat.read(path, as_version=4)
    sources = {cell.metadata.nbgrader.grade_id: cell for cell in notebook.cells if "nbgrader" in cell.metadata}
    stubs = {cell.metadata.nbgrader.grade_id: cell.source for cell in released.cells if "nbgrader" in cell.metadata}
    verdicts, findings = {}, []
    for item in unit.checked:
        text = sources[item.name].source
        if "die" in text:
            os._exit(7)
        if "raise RuntimeError" in text:
            raise RuntimeError("the judge\nfell over")
        verdicts[f"check-{item.name}"] = _verdict(item, text, text == stubs[item.name])
        if "doubtful" in text:
            findings.append(Finding("doubtful", "human", item.name, "We are not sure about this."))
        if "twice" in text:
            findings.append(Finding("duplicated cell", "repaired", item.name, "It was there twice; <b>one</b> counts."))
        check = sources[f"check-{item.name}"]
        points = repr(verdicts[f"check-{item.name}"].points)
        check.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": points}, execution_count=1)]
    questions = {"why_count": sources["why_count"].source != stubs["why_count"]}
    text = nbformat.writes(notebook)
    return Graded(learner, f"unit_{unit.number}", verdicts, questions, tuple(findings), text, settings.isolation, key)


def _verdict(item: Any, text: str, empty: bool) -> Verdict:
    points = float(item.points)
    if not isinstance(item, Exercise):
        return Verdict(item.name, "not started" if empty else "passed", 0 if empty else points, points)
    cases = (CaseResult("some numbers", "the result", not empty),)
    if empty:
        return Verdict(item.name, "not started", 0, points, cases)
    if "half" not in text:
        return Verdict(item.name, "passed", points, points, cases)
    failure = Failure("some numbers", {"x": "1"}, "2", "a number")
    return Verdict(item.name, "failed", points / 2, points, cases, 7, failure, "half", HALF)
