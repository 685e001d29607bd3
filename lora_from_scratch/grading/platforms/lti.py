"""A plugin of `nbgrader export` that writes grades as LTI 1.3 score messages: one JSON file for each learner and unit.

    nbgrader export --exporter=lora_from_scratch.grading.platforms.lti.LtiExport --to scores

Each file, scores/unit_09/USER.json, is the body of one POST request to `LINE_ITEM/scores` with the media type
`application/vnd.ims.lis.v1.score+json` (1EdTech, "Assignment and Grade Services 2.0", section 3.4). A tool that is
registered with the platform must send them; this exporter has no keys and opens no connection. USER is the platform's
id of the learner (nbgrader's lms_user_id), percent-encoded.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nbgrader.plugins import ExportPlugin

from lora_from_scratch.grading.exporters import final_score, warn_of_waiting
from lora_from_scratch.support.files import write_json
from lora_from_scratch.support.plain_text import one_line

USER = re.compile(r"[!-~]{1,255}")  # OpenID Connect Core 1.0, section 2: at most 255 ASCII characters
LONGEST_NAME = 200  # characters of a file name


class LtiExport(ExportPlugin):
    """Exports score messages for all learners who have handed in something."""

    def export(self, gradebook: Any) -> None:
        """Write the messages to the folder given by --to."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        target, written = Path(self.to or "scores"), 0
        users = Counter(student.lms_user_id for student in gradebook.students)
        unknown, shared = set(), set()
        for unit in gradebook.assignments:
            found = [one for one in gradebook.assignment_submissions(unit.name) if self._wanted(unit.name, one)]
            for submission in found:
                user = submission.student.lms_user_id or ""
                if not USER.fullmatch(user):
                    unknown.add(one_line(submission.student.id))
                elif users[user] > 1:
                    shared.add(one_line(submission.student.id))
                else:
                    write_json(target / unit.name / file_name(user), message(submission, user, now))
                    written += 1
            warn_of_waiting(self.log, unit.name, sum(final_score(one) is None for one in found))
        if unknown:
            self.log.warning("no LTI user id (nbgrader's lms_user_id) is known of: %s", ", ".join(sorted(unknown)))
        if shared:
            self.log.warning("not exported, because they have the same lms_user_id: %s", ", ".join(sorted(shared)))
        self.log.info("Exported %d score messages to %s", written, target)

    def _wanted(self, unit: str, submission: Any) -> bool:
        return (not self.assignment or unit in self.assignment) and (
            not self.student or submission.student.id in self.student
        )


def file_name(user: str) -> str:
    """The name of a user's file. Ids may contain any ASCII character, such as "/" or "|"."""
    name = quote(user, safe="") if user.strip(".") else user.replace(".", "%2E")
    return f"{name if len(name) <= LONGEST_NAME else hashlib.sha256(user.encode()).hexdigest()}.json"


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
