"""Convert a graded submission to results.json for Gradescope and for PrairieLearn.

The results contain no inputs, expected values or output of the learner's code: all learners in a cohort get the same
inputs, and on these platforms learners see the results while others are still working.
"""

from __future__ import annotations

from typing import Any, Literal

from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.grading.graded import Graded
from lora_from_scratch.support.plain_text import one_line

Visibility = Literal["visible", "after_due_date", "after_published", "hidden"]
LONGEST = 2_000  # the maximum number of characters of a message
STATES = {"passed": "Right.", "not started": "Not started.", "stopped": "Stopped: out of time."}


def is_readable(graded: Graded) -> bool:
    """Whether the notebook could be read. If not, it gets no score, instead of a score of 0."""
    whole = any(finding.severity == "human" and not finding.cell for finding in graded.findings)
    return not (whole and all(verdict.status == "missing" for verdict in graded.verdicts.values()))


def for_gradescope(graded: Graded, visibility: Visibility) -> dict[str, Any]:
    """results.json for Gradescope ("Output Format" in https://gradescope-autograders.readthedocs.io/en/latest/specs/)."""
    return {
        "output": found_in(graded),
        "output_format": "text",
        "test_output_format": "text",
        "stdout_visibility": "hidden",
        "visibility": visibility,
        "tests": [
            {
                "name": verdict.exercise,
                "score": verdict.points,
                "max_score": verdict.max_points,
                "status": "passed" if verdict.passed else "failed",
                "output": _said(verdict),
            }
            for verdict in graded.verdicts.values()
        ],
    }


def for_prairielearn(graded: Graded) -> dict[str, Any]:
    """results.json for PrairieLearn ("Grading results" in its documentation of external grading)."""
    if not is_readable(graded):
        return {"gradable": False, "format_errors": [found_in(graded)]}
    most = sum(verdict.max_points for verdict in graded.verdicts.values())
    return {
        "gradable": True,
        "score": graded.points / most if most else 0.0,
        "message": found_in(graded),
        "tests": [
            {
                "name": verdict.exercise,
                "points": verdict.points,
                "max_points": verdict.max_points,
                "message": _said(verdict),
            }
            for verdict in graded.verdicts.values()
        ],
    }


def found_in(graded: Graded) -> str:
    """The findings about the notebook, one per line."""
    lines = [f"{one_line(finding.message)[:LONGEST]}" for finding in graded.findings[:50]]
    return "\n".join(lines).replace("`", "")


def _said(verdict: Verdict) -> str:
    """The diagnosis, and for each part of the exercise whether it is right."""
    lines = [one_line(verdict.message)[:LONGEST] or STATES.get(verdict.status, "Not right.")]
    parts: dict[str, list[bool]] = {}
    for case in verdict.cases:
        parts.setdefault(case.part, []).append(case.right and case.tried)
    lines += [f"{part}: {'right' if all(right) else 'not right'}" for part, right in parts.items()]
    return "\n".join(lines).replace("`", "")
