"""The result of grading one submission, as plain data: verdicts, findings about the notebook, and outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lora_from_scratch.checks.verdict import CaseResult, Failure, Verdict

Severity = Literal["note", "repaired", "lost", "human"]


@dataclass(frozen=True)
class Finding:
    """Something about a submission that its learner or the instructor should know.

    Attributes:
        kind: a fixed name: "duplicated cell", "exited", "memory", ...
        severity: "note" (for information), "repaired" (repaired, no points lost), "lost" (points were lost for a clear
            reason), "human" (a person should look).
        cell: the grade_id of the cell concerned; "" for the whole notebook.
        message: to the learner, in the second person: what was found, and what grading did about it.
    """

    kind: str
    severity: Severity
    cell: str
    message: str


@dataclass(frozen=True)
class Graded:
    """One submission, graded.

    Attributes:
        verdicts: by the grade_id of the check cell ("check-rank").
        open_questions: by grade_id, whether there is an answer for a person to grade.
        notebook: the autograded notebook as text (nbformat 4): the released structure, the learner's sources, outputs.
        isolation: "bubblewrap" or "none".
        key: identifies everything the result depends on (submission, release, checks, seed): equal keys, equal results.
    """

    learner: str
    unit: str
    verdicts: Mapping[str, Verdict]
    open_questions: Mapping[str, bool]
    findings: tuple[Finding, ...]
    notebook: str
    isolation: str
    key: str = field(default="")

    @property
    def points(self) -> float:
        return sum(verdict.points for verdict in self.verdicts.values())

    @property
    def needs_a_human(self) -> bool:
        return any(finding.severity == "human" for finding in self.findings)

    def to_json(self) -> str:
        """Serialise deterministically: equal results give equal bytes."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Graded:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not such a record.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            data["verdicts"] = {name: _verdict(verdict) for name, verdict in data["verdicts"].items()}
            data["findings"] = tuple(Finding(**finding) for finding in data["findings"])
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"this is not the record of a graded submission: {error}") from None


def _verdict(data: dict[str, Any]) -> Verdict:
    data["cases"] = tuple(CaseResult(**case) for case in data["cases"])
    data["failure"] = Failure(**data["failure"]) if data["failure"] else None
    data["notes"] = tuple(data["notes"])
    return Verdict(**data)
