"""A report on how to improve a unit, based on a class's results: hints, sentences and diagnoses of each exercise.

The verdicts come from grading. The numbers of tries and opened hints and the times are known only for learners who hand
in their progress (`progress.json` next to the notebook, or files that the instructor has); everything else is computed
without it. The report contains no names of learners.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.progress_file import Entry
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.grading import tasks
from lora_from_scratch.grading.autograded import read_small
from lora_from_scratch.grading.course_folder import CourseFolder
from lora_from_scratch.grading.report import Section, as_html
from lora_from_scratch.support.plain_text import one_line

PROGRESS = "progress.json"
LARGEST = 500_000  # the maximum size of a progress file, in bytes
MOST = 10_000  # numbers of tries or hints from this on are considered invalid
LONGEST_PAUSE = 120.0  # minutes; a longer time between two passed exercises is considered a break
FEW = 3  # the minimum number of learners for a suggestion
SHOWN = 5  # the maximum number of groups of similar answers listed for each exercise
WRONG = ("failed", "stopped")


@dataclass
class Alike:
    """Wrong answers without a diagnosis that fail the same cases and give the same value in the first of them."""

    exercise: str
    failing: tuple[str, ...]
    case: str
    got: str
    expected: str
    count: int


@dataclass
class Findings:
    """The results of a class for one exercise.

    Attributes:
        exercise: the exercise.
        learners: the number of submissions with a verdict on the exercise.
        right, unwritten: the number of right answers, and of submissions without an answer.
        lost: the mean share of the points that was lost.
        tries: the number of checks until the exercise was passed, for each learner with known progress who passed.
        stuck: the number of learners with known progress who tried and did not pass.
        hints: (number of opened hints, passed or not) of each learner with known progress who tried.
        minutes: the time from passing the previous exercise to passing this one.
        misconceptions: (misconception, message) -> number of answers.
        sentences: sentence of the statement -> number of answers that fail on it.
        alike: groups of similar wrong answers without a diagnosis.
    """

    exercise: Exercise
    learners: int = 0
    right: int = 0
    unwritten: int = 0
    lost: float = 0.0
    tries: list[int] = field(default_factory=list)
    stuck: int = 0
    hints: list[tuple[int, bool]] = field(default_factory=list)
    minutes: list[float] = field(default_factory=list)
    misconceptions: Counter[tuple[str, str]] = field(default_factory=Counter)
    sentences: Counter[str] = field(default_factory=Counter)
    alike: list[Alike] = field(default_factory=list)


def write_teaching_report(unit: Unit, course: CourseFolder, progress: Path | None) -> Path:
    """Write reports/unit_NN-teaching.html.

    Args:
        unit: the unit.
        course: the course's folder.
        progress: a folder with the progress files LEARNER.json of the learners who agreed to this, or None.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: no submission to the unit has been graded, or the folder does not exist.
    """
    if progress is not None and not progress.is_dir():
        raise FileNotFoundError(f"there is no folder {progress}")
    learners, _ = course.learners()
    records = [graded for learner in learners if (graded := tasks.stored_result(course.record(learner)))]
    if not records:
        raise FileNotFoundError(f"no submission to {course.assignment} has been graded; run `grade` first")
    verdicts = [graded.verdicts for graded in records if any(v.status != "missing" for v in graded.verdicts.values())]
    entries = [known for learner in learners if (known := _progress_of(course, learner, progress))]
    found = [study(exercise, verdicts, entries, unit.exercises) for exercise in unit.exercises]
    title = f"Unit {unit.number}: {unit.title}. What the class teaches"
    path = course.root / "reports" / f"{course.assignment}-teaching.html"
    tasks.write_text(path, as_html(title, sections(found, len(verdicts), len(entries))))
    return path


def _progress_of(course: CourseFolder, learner: str, folder: Path | None) -> dict[str, Entry]:
    """The entries of a learner's progress file; empty if there is no valid file."""
    beside = read_small(course.handed_in(learner) / PROGRESS, LARGEST)
    content = beside if folder is None or beside is not None else read_small(folder / f"{learner}.json", LARGEST)
    try:
        exercises = json.loads(content or b"{}")["exercises"].items()
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}
    entries = {name: _entry(values) for name, values in exercises}
    return {name: entry for name, entry in entries.items() if entry is not None}


def _entry(values: Any) -> Entry | None:
    """Validate an entry, since the file comes from a learner; None if it is invalid."""
    try:
        tries, hints, passed = values["attempts"], values["hints"], values["passed"]
        if passed is not None:
            datetime.fromisoformat(passed)
    except (KeyError, TypeError, ValueError):
        return None
    sound = type(tries) is int and type(hints) is int and 0 <= tries < MOST and 0 <= hints < MOST
    return Entry(attempts=tries, hints=hints, passed=passed) if sound else None


def study(
    exercise: Exercise,
    verdicts: Sequence[Mapping[str, Verdict]],
    progress: Sequence[Mapping[str, Entry]],
    order: Sequence[Exercise],
) -> Findings:
    """Collect the results for an exercise.

    Args:
        exercise: the exercise.
        verdicts: for each submission, grade_id -> verdict.
        progress: for each learner with known progress, exercise -> entry.
        order: the unit's exercises, in order.
    """
    found = Findings(exercise)
    mine = [one[name] for one in verdicts if (name := f"check-{exercise.name}") in one]
    found.learners = len(mine)
    found.right = sum(verdict.passed for verdict in mine)
    found.unwritten = sum(verdict.status not in ("passed", *WRONG) for verdict in mine)
    if mine:
        found.lost = 1 - sum(verdict.points for verdict in mine) / (len(mine) * exercise.points)
    wrong = [verdict for verdict in mine if verdict.status in WRONG]
    found.misconceptions.update((v.misconception, one_line(v.message)) for v in wrong if v.misconception)
    found.sentences.update(v.failure.sentence for v in wrong if v.failure and v.failure.sentence)
    found.alike = group([verdict for verdict in wrong if not verdict.misconception])
    before = [other.name for other in order[: [other.name for other in order].index(exercise.name)]]
    for entries in progress:
        entry = entries.get(exercise.name)
        if entry is None or not entry.attempts:
            continue
        found.hints.append((entry.hints, entry.passed is not None))
        if entry.passed is None:
            found.stuck += 1
        else:
            found.tries.append(entry.attempts)
            found.minutes += _minutes(entry.passed, [entries[name].passed for name in before if name in entries])
    return found


def _minutes(passed: str, earlier: Iterable[str | None]) -> list[float]:
    """The minutes since the previous exercise was passed, as a list with one element; empty after a long break."""
    now = datetime.fromisoformat(passed)
    times = [datetime.fromisoformat(one) for one in earlier if one]
    try:
        gaps = [(now - one).total_seconds() / 60 for one in times if one <= now]
    except TypeError:  # only some of the times have a time zone
        return []
    return [gap for gap in [min(gaps, default=LONGEST_PAUSE)] if gap < LONGEST_PAUSE]


def group(verdicts: Iterable[Verdict]) -> list[Alike]:
    """Group wrong answers by behavior, the largest groups first. All learners in a cohort get the same inputs."""
    groups: dict[tuple[tuple[str, ...], str, str], list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        failing = tuple(case.name for case in verdict.cases if not case.right)
        case, got = (verdict.failure.case, verdict.failure.got) if verdict.failure else ("", verdict.status)
        groups[failing, case, got].append(verdict)
    made = []
    for (failing, case, got), alike in groups.items():
        expected = alike[0].failure.expected if alike[0].failure else ""
        made.append(Alike(alike[0].exercise, failing, case, got, expected, len(alike)))
    return sorted(made, key=lambda one: (-one.count, one.failing, one.got))


# --- The page ------------------------------------------------------------------------------------------


def sections(found: Sequence[Findings], learners: int, known: int) -> list[Section]:
    """The sections of the page: first the suggestions, then the evidence."""
    advice = [
        (f.exercise.name, what, why) for f in sorted(found, key=lambda f: -f.lost) for what, why in suggestions(f)
    ]
    about = (
        f"{learners} submissions that could be read; the progress of {known} learners is known. The exercises with the "
        "most lost points come first. Suggestions are rules of thumb: look at the evidence beside each.",
    )
    nothing = () if advice else ("Nothing stands out.",)
    parts = [
        Section("What to improve", (*about, *nothing), ("Exercise", "Improve", "Because"), tuple(advice)),
        Section("Exercises", _LEGEND, _HEADINGS, tuple(map(_row, found))),
        Section(
            "Commonest misconceptions",
            (),
            ("Learners", "Exercise", "Misconception", "Message to the learner"),
            tuple(
                (str(count), f.exercise.name, name, message)
                for f in found
                for (name, message), count in f.misconceptions.most_common(SHOWN)
            ),
        ),
        Section(
            "Wrong answers without a diagnosis, grouped by behavior",
            ("Answers in a group fail the same cases and give the same value in the first: one mistake, one message.",),
            ("Learners", "Exercise", "Fails", "First", "Gives", "Expected"),
            tuple(
                (str(one.count), one.exercise, ", ".join(one.failing), one.case, one.got[:300], one.expected[:300])
                for f in found
                for one in f.alike[:SHOWN]
            ),
        ),
        Section(
            "Sentences of the statements on which answers fail",
            (),
            ("Learners", "Exercise", "Sentence"),
            tuple((str(n), f.exercise.name, text) for f in found for text, n in f.sentences.most_common(SHOWN)),
        ),
    ]
    return [part for place, part in enumerate(parts) if place < 2 or part.rows]


_LEGEND = (
    "First try: of the learners whose progress is known and who passed. Tries: median up to the first that passed. "
    "Gave up: tried without passing. Hints: share of those who opened any. Minutes: median since the exercise before "
    "was passed, beside what the course says.",
)
_HEADINGS = (
    "Exercise",
    "Right",
    "Not written",
    "Points lost",
    "First try",
    "Tries",
    "Gave up",
    "Hints",
    "Minutes",
    "Of",
)


def _row(f: Findings) -> tuple[str, ...]:
    return (
        f.exercise.name,
        _share(f.right, f.learners),
        _share(f.unwritten, f.learners),
        f"{f.lost:.0%}" if f.learners else "",
        _share(sum(tries == 1 for tries in f.tries), len(f.tries)),
        f"{statistics.median(f.tries):g}" if f.tries else "",
        str(f.stuck or ""),
        _share(sum(count > 0 for count, _ in f.hints), len(f.hints)),
        f"{statistics.median(f.minutes):.0f}" if f.minutes else "",
        str(f.exercise.minutes),
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def suggestions(f: Findings) -> list[tuple[str, str]]:
    """Suggestions for improving an exercise, each with its evidence."""
    made = []
    for one in f.alike:
        if one.count >= max(FEW, 0.05 * f.learners):
            where = f"`{one.case}`: {one.got[:120]}" if one.case else one.got
            made.append(
                ("a wrong answer for the bank", f"{one.count} answers behave alike without a diagnosis ({where})")
            )
    for (name, _), count in f.misconceptions.most_common(1):
        if count >= max(FEW, 0.1 * f.learners):
            made.append((f"the message about “{name}”", f"{count} of {f.learners} still hand it in"))
    for sentence, count in f.sentences.most_common(1):
        if count >= max(FEW, 0.1 * f.learners):
            made.append((f"the sentence “{sentence}”", f"{count} answers fail on it"))
    made += _about_hints(f)
    if len(f.minutes) >= FEW and (median := statistics.median(f.minutes)) > 2 * f.exercise.minutes:
        made.append(("the minutes, or the statement", f"{median:.0f} minutes (median) instead of {f.exercise.minutes}"))
    return made


def _about_hints(f: Findings) -> list[tuple[str, str]]:
    """Suggest improving hints after which few learners pass, and statements with which too many need a hint."""
    made = []
    last = len(f.exercise.hints)
    for number, text in enumerate(f.exercise.hints, 1):
        opened = [(count, passed) for count, passed in f.hints if count >= number]
        helped = sum(count == number and passed for count, passed in opened)
        if len(opened) >= FEW and helped / len(opened) < (0.6 if number == last else 0.2):
            words = "pass" if number == last else "pass without the next one"
            made.append((f"hint {number}: “{text[:80]}”", f"of {len(opened)} who opened it, {helped} {words}"))
    first = sum(tries == 1 for tries in f.tries)
    needed = sum(count > 0 for count, _ in f.hints)
    if len(f.hints) >= FEW and first < 0.4 * len(f.hints) and needed > 0.5 * len(f.hints):
        made.append(("the statement", f"{first} of {len(f.hints)} pass at the first try, {needed} open a hint"))
    return made
