"""The course's late policy, as an nbgrader plugin: a grace period, late days for the term, then a deduction.

    c.AssignLatePenalties.plugin_class = LatePolicy
    c.LatePolicy.grace_hours = 1
    c.LatePolicy.days = 3
    c.LatePolicy.percent_a_day = 20

The due date of a unit is taken from nbgrader, including the learner's extension, if any.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from nbgrader.plugins import LateSubmissionPlugin
from traitlets import Float, Integer

HOUR = 3600.0
DAY = 24 * HOUR


class LatePolicy(LateSubmissionPlugin):
    """The deduction for late submissions.

    A submission handed in within `grace_hours` after the due date counts as on time. After that, every started day is a
    late day. A learner has `days` late days for the whole term, which are used up in the order of submission. Each
    further late day costs `percent_a_day` of the points that the submission has earned.
    """

    grace_hours = Float(0.0, min=0.0, help="hours after the due date that still count as on time").tag(config=True)
    days = Integer(0, min=0, help="late days that a learner may spend in a term without a deduction").tag(config=True)
    percent_a_day = Float(
        0.0, min=0.0, max=100.0, help="percentage of the earned points that each further late day costs"
    ).tag(config=True)

    def late_submission_penalty(self, student_id: str, score: float, total_seconds_late: float) -> float:
        """The points to subtract. The learner's other submissions are read from nbgrader's gradebook."""
        left = max(0, self.days - self.late_days(self._seconds_late_before(student_id)))
        charged = max(0, self.late_days([total_seconds_late]) - left)
        return score * min(100.0, charged * self.percent_a_day) / 100

    def late_days(self, seconds_late: Iterable[float]) -> int:
        """The total late days of submissions: for each, the days started after the grace period."""
        grace = self.grace_hours * HOUR
        return sum(math.ceil(max(0.0, seconds - grace) / DAY) for seconds in seconds_late)

    def _seconds_late_before(self, student_id: str) -> list[float]:
        """The lateness of the learner's earlier submissions to other units."""
        gradebook, unit = self.parent.gradebook, self.parent.assignment_id
        submissions = {one.name: one for one in gradebook.student_submissions(student_id)}
        this = submissions.pop(unit)
        order = (this.timestamp, unit)
        return [
            other.total_seconds_late
            for name, other in submissions.items()
            if other.timestamp is not None and (other.timestamp, name) < order
        ]
