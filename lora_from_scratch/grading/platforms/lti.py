"""A plugin of `nbgrader export` that writes grades as LTI 1.3 score messages: one JSON file for each learner and unit.

    nbgrader export --exporter=lora_from_scratch.grading.platforms.lti.LtiExport --to scores

Each file, scores/unit_09/USER.json, is the body of one POST request to `LINE_ITEM/scores` with the media type
`application/vnd.ims.lis.v1.score+json` (1EdTech, "Assignment and Grade Services 2.0", section 3.4). A tool that is
registered with the platform must send them; this exporter has no keys and opens no connection. USER is the platform's
id of the learner (nbgrader's lms_user_id).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nbgrader.plugins import ExportPlugin

from lora_from_scratch.grading.exporters import final_score
from lora_from_scratch.support.files import write_json

FILE_NAME = re.compile(r"[\w.-]{1,128}")


class LtiExport(ExportPlugin):
    """Exports score messages for all learners who have handed in something."""

    def export(self, gradebook: Any) -> None:
        """Write the messages to the folder given by --to."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        written, unknown = 0, set()
        for unit in gradebook.assignments:
            for submission in gradebook.assignment_submissions(unit.name):
                student = submission.student
                if (self.assignment and unit.name not in self.assignment) or (
                    self.student and student.id not in self.student
                ):
                    continue
                user = student.lms_user_id or ""
                if not FILE_NAME.fullmatch(user) or not user.strip("."):
                    unknown.add(student.id)
                    continue
                write_json(Path(self.to or "scores") / unit.name / f"{user}.json", message(submission, user, now))
                written += 1
        if unknown:
            self.log.warning("no LTI user id (nbgrader's lms_user_id) is known of: %s", ", ".join(sorted(unknown)))
        self.log.info("Exported %d score messages to %s", written, self.to or "scores")


def message(submission: Any, user: str, now: str) -> dict[str, Any]:
    """The score message. While a submission needs grading by hand, it has no score, which clears an earlier score."""
    score = final_score(submission)
    said: dict[str, Any] = {
        "timestamp": now,
        "userId": user,
        "activityProgress": "Submitted",
        "gradingProgress": "PendingManual",
    }
    if submission.timestamp is not None:
        handed_in = submission.timestamp.replace(tzinfo=UTC).isoformat(timespec="milliseconds")
        said["submission"] = {"submittedAt": handed_in}
    if score is None:
        return said
    points = {"scoreGiven": round(score, 2), "scoreMaximum": submission.max_score}
    return said | points | {"activityProgress": "Completed", "gradingProgress": "FullyGraded"}
