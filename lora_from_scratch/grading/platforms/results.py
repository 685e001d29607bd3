"""A graded submission as results.json of Gradescope and of PrairieLearn.

Neither contains inputs, expected values or anything that the learner's code printed: everybody in a cohort gets the
same inputs, and on these platforms learners see the results while others are still working.
"""

from __future__ import annotations

from typing import Any, Literal

from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.grading.graded import Graded
from lora_from_scratch.support.plain_text import one_line

Visibility = Literal["visible", "after_due_date", "after_published", "hidden"]
LONGEST = 2_000  # characters of a text
STATES = {"passed": "Right.", "not started": "Not started.", "stopped": "Stopped: out of time."}


def is_readable(graded: Graded) -> bool:
    """Whether the notebook could be read; if not, it has no points rather than none of the points."""
    whole = any(finding.severity == "human" and not finding.cell for finding in graded.findings)
    return not (whole and all(verdict.status == "missing" for verdict in graded.verdicts.values()))


def for_gradescope(graded: Graded, visibility: Visibility) -> dict[str, Any]:
    """The document of https://gradescope-autograders.readthedocs.io/en/latest/specs/ ("Output Format")."""
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
    """The document of PrairieLearn's "External Grading" ("Grading results")."""
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
    """The findings about the notebook, one on each line."""
    lines = [f"{one_line(finding.message)[:LONGEST]}" for finding in graded.findings[:50]]
    return "\n".join(lines).replace("`", "")


def _said(verdict: Verdict) -> str:
    """What is right and what is not, part by part, and the diagnosis."""
    lines = [one_line(verdict.message)[:LONGEST] or STATES.get(verdict.status, "Not right.")]
    parts: dict[str, list[bool]] = {}
    for case in verdict.cases:
        parts.setdefault(case.part, []).append(case.right and case.tried)
    lines += [f"{part}: {'right' if all(right) else 'not right'}" for part, right in parts.items()]
    return "\n".join(lines).replace("`", "")
