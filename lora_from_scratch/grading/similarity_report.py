"""The report on answers that are the same code apart from names and layout: reports/unit_NN-similar.html."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading import tasks
from lora_from_scratch.grading.course_folder import CourseFolder
from lora_from_scratch.grading.report import STYLE
from lora_from_scratch.grading.similarity import LEAST, SAME, HonestRate, Pair, honest_rate, published, similar_pairs
from lora_from_scratch.support.plain_text import in_html, plain

MOST_SHOWN = 40  # the maximum number of pairs of learners with code; further pairs are only listed
LONGEST = 20_000  # the maximum number of characters of an answer
MORE_STYLE = """\
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; max-width: 75rem; }
.two pre { overflow-x: auto; margin: 0.3rem 0 1rem; padding: 0.5rem; border: 1px solid #8886; font-size: 0.85em; }
@media print { .two pre { white-space: pre-wrap; } h2, h3 { break-after: avoid; } .two { break-inside: avoid; } }
"""
WHAT_IT_MEANS = (
    "These answers are the same code apart from names, layout, comments and annotations. There are harmless reasons: "
    "learners worked together where you allow it, had the same tutor or source, or the same obvious idea. No points "
    "are deducted and nothing is entered into the gradebook. Read the code, talk to the learners, then judge."
)


def write_similarity_report(unit: Unit, course: CourseFolder) -> tuple[Path, int]:
    """Compare the answers to a graded unit and write the report.

    Returns:
        The path of the report, and the number of pairs of learners in it.

    Raises:
        FileNotFoundError: no submission to the unit has been graded.
    """
    import nbformat

    learners, _ = course.learners()
    answers = {learner: found for learner in learners if (found := answers_of(course, learner))}
    if not answers:
        raise FileNotFoundError(f"no submission to {course.assignment} has been graded; run `grade` first")
    release = _sources(nbformat.read(course.released, as_version=4))
    pairs = []
    for exercise in unit.exercises:
        name, given = exercise.name, release.get(exercise.name, "")
        mine = {learner: found[name] for learner, found in answers.items() if found.get(name, given) != given}
        pairs += similar_pairs(name, mine, given, published(exercise))
    path = course.root / "reports" / f"{course.assignment}-similar.html"
    tasks.write_text(path, page(unit, answers, pairs, honest_rate(unit.exercises)))
    return path, len(by_learners(pairs))


def answers_of(course: CourseFolder, learner: str) -> dict[str, str]:
    """The answers in a graded submission, by grade_id; empty if it has not been graded."""
    import nbformat

    graded = tasks.stored_result(course.record(learner))
    return _sources(nbformat.reads(graded.notebook, as_version=4)) if graded else {}


def _sources(notebook: Any) -> dict[str, str]:
    cells = (cell for cell in notebook.cells if "grade_id" in cell.metadata.get("nbgrader", {}))
    return {cell.metadata.nbgrader["grade_id"]: cell.source[:LONGEST] for cell in cells}


def by_learners(pairs: Sequence[Pair]) -> list[tuple[tuple[str, str], list[Pair]]]:
    """Group pairs by learners, those with the most unpublished answers first, then those with the most exercises."""
    found: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        found[pair.learners].append(pair)
    return sorted(found.items(), key=lambda one: (-sum(not pair.published for pair in one[1]), -len(one[1]), one[0]))


def page(unit: Unit, answers: Mapping[str, Mapping[str, str]], pairs: Sequence[Pair], honest: HonestRate) -> str:
    """The HTML page, without scripts."""
    title = html.escape(f"Unit {unit.number}: {unit.title}. Similar answers")
    found = by_learners(pairs)
    body = "".join(f"<p>{in_html(sentence)}</p>\n" for sentence in [WHAT_IT_MEANS, *_how_sure(honest)])
    pairs_found = "1 pair" if len(found) == 1 else f"{len(found)} pairs"
    body += f"<p>{pairs_found} among {len(answers)} learners.</p>\n"
    for number, (learners, exercises) in enumerate(found):
        body += _pair(learners, exercises, answers, with_code=number < MOST_SHOWN)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>\n{STYLE}{MORE_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
    )


def _how_sure(honest: HonestRate) -> list[str]:
    compared = honest.pairs - honest.short
    return [
        f"Answers are listed if they share {SAME:.0%} of their fingerprints. How often do honest answers? Of "
        f"{compared} pairs of right answers to this unit in the course's bank, {honest.same}. In {honest.short} more "
        f"pairs, one has fewer than {LEAST} fingerprints; answers as short as that are not compared. The bank's "
        "answers were written to differ from each other, so answers of learners who work alone are alike more often; "
        "the shorter an exercise is, the less it says."
    ]


def _pair(
    learners: tuple[str, str], pairs: Sequence[Pair], answers: Mapping[str, Mapping[str, str]], with_code: bool
) -> str:
    one, other = (in_html(learner) for learner in learners)
    count = f"{len(pairs)} {'exercise' if len(pairs) == 1 else 'exercises'}"
    text = f"<h2>{one} and {other}: {count}</h2>\n"
    for pair in pairs:
        both = "; both are the published solution" if pair.published else ""
        text += f"<h3><code>{html.escape(pair.exercise)}</code>, {pair.similarity:.0%}{both}</h3>\n"
        if with_code:
            sources = [html.escape(plain(answers[learner][pair.exercise])) for learner in learners]
            text += '<div class="two">' + "".join(f"<pre>{source}</pre>" for source in sources) + "</div>\n"
    return text
