"""The grading report: points per learner and per exercise, misconceptions, and what needs a human.

The same sections are written as a page (reports/unit_NN.html) and as Markdown.
"""

from __future__ import annotations

import html
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.grading.rubrics import rubrics
from lora_from_scratch.grading.tasks import write_text
from lora_from_scratch.support.plain_text import in_html, in_markdown, one_line

if TYPE_CHECKING:
    from lora_from_scratch.grading.summary import Row, Summary

SHOWN_LEARNERS = 8  # names listed per misconception; the others are only counted
MANY = 8  # columns; a wider table gets vertical headings
SAME = 0.005  # points: nbgrader rounds to two digits
STATES = {
    "passed": "passed",
    "failed": "not right",
    "stopped": "out of time",
    "not started": "not started",
    "missing": "missing",
    "library": "library's version",
    "broken": "check failed",
}
NO_SANDBOX = (
    "Graded without a sandbox (`--isolation none`): a submission could read and change whatever the person who "
    "graded can. The points were still computed outside the submissions' processes."
)
STYLE = """\
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; width: fit-content; }
p, ul { max-width: 75rem; }
table { border-collapse: collapse; margin: 0.5rem 0; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid #8886; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.many td, .many th { padding-right: 0.6rem; }
.many thead th:not(:first-child) { writing-mode: vertical-rl; vertical-align: bottom; font-weight: normal; }
.wide { overflow-x: auto; }
td.share { background: linear-gradient(to right, #4a90d955 var(--share), transparent var(--share)); min-width: 4em; }
code { font-size: 0.95em; overflow-wrap: anywhere; }
@media print {
  body { font-size: 10pt; width: auto; margin: 0; }
  .wide { overflow: visible; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
  td.share { print-color-adjust: exact; }
}
"""


@dataclass(frozen=True)
class Section:
    """A section of the report: sentences, then a table or a list. Plain text; backticks mark code."""

    title: str
    sentences: tuple[str, ...] = ()
    headings: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    items: tuple[str, ...] = ()


def write_report(summary: Summary) -> None:
    """Write reports/unit_NN.html and .md."""
    title, parts = title_of(summary), sections(summary)
    write_text(summary.course.report(".md"), as_markdown(title, parts))
    write_text(summary.course.report(".html"), as_html(title, parts))


def title_of(summary: Summary) -> str:
    return f"Unit {summary.unit.number}: {summary.unit.title}. Grading report"


def sections(summary: Summary) -> list[Section]:
    """The sections of the report, the most urgent first. Empty ones are left out, except the first two."""
    parts = [
        _overview(summary),
        _needs_a_human(summary),
        _rubrics(summary),
        _changes(summary),
        _misconceptions(summary),
        _exercises(summary),
        _learners(summary),
        _found(summary),
        _absent(summary),
    ]
    return [part for place, part in enumerate(parts) if place < 2 or part.rows or part.items]


def as_markdown(title: str, parts: Iterable[Section]) -> str:
    lines = [f"# {in_markdown(title)}", ""]
    for part in parts:
        lines += [f"## {part.title}", ""]
        for sentence in part.sentences:
            lines += [in_markdown(sentence), ""]
        if part.rows:
            lines.append("| " + " | ".join(map(_cell, part.headings)) + " |")
            lines.append("| " + " | ".join("---:" if _is_number(part, i) else "---" for i in _columns(part)) + " |")
            lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in part.rows] + [""]
        if part.items:
            lines += [f"- {in_markdown(item)}" for item in part.items] + [""]
    return "\n".join(lines).rstrip("\n") + "\n"


def as_html(title: str, parts: Iterable[Section]) -> str:
    """The report as a self-contained page without scripts."""
    title, body = html.escape(one_line(title)), "".join(_section(part) for part in parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
    )


# --- Sections ------------------------------------------------------------------------------------------


def _overview(summary: Summary) -> Section:
    rows = summary.rows
    count = f"{len(rows)} {'submission' if len(rows) == 1 else 'submissions'}"
    now = f"{summary.marked} graded now" + (f", {len(rows) - summary.marked} before" * (len(rows) > summary.marked))
    people = sum(row.needs_a_human for row in rows) + len(summary.refused)
    need = "needs" if people == 1 else "need"
    sentences = [
        f"{count} ({now}); {people} {need} a human. {datetime.now():%d %B %Y, %H:%M}.",
        NO_SANDBOX if summary.isolation == "none" else f"Graded in the sandbox ({summary.isolation}).",
    ]
    if rows:
        scores = sorted(row.entry.score - row.entry.penalty for row in _readable(rows) or rows)
        most = max(row.entry.max_score for row in rows)
        middle = (scores[(len(scores) - 1) // 2] + scores[len(scores) // 2]) / 2
        sentences.append(f"Points: median {middle:g} of {most:g}, from {scores[0]:g} to {scores[-1]:g}.")
    return Section("Overview", tuple(sentences))


def _needs_a_human(summary: Summary) -> Section:
    rows = []
    for row in summary.rows:
        reasons = [
            f"{f.kind}; message to the learner: {f.message}" for f in row.graded.findings if f.severity == "human"
        ]
        reasons += list(row.trouble)
        waiting, questions = row.entry.waiting, row.graded.open_questions
        again = [name for name in waiting if name in row.entry.by_hand]
        for words, names in {
            "open question to grade": [name for name in waiting if questions.get(name) and name not in again],
            "the answer has changed since it was graded by hand": [name for name in again if name in questions],
            "changed since a person set the points": [name for name in again if name not in questions],
        }.items():
            reasons += [f"{words}: {_names(names)}"] * bool(names)
        rows += [(row.learner, reason) for reason in reasons]
    rows += [("", reason) for reason in summary.refused]
    said = () if rows else ("Nothing: every point is decided.",)
    return Section("What needs a human", said, ("Learner", "What"), tuple(rows))


def _rubrics(summary: Summary) -> Section:
    """The rubrics of the open questions, from the solved notebook (learners' notebooks do not contain them)."""
    rows = [(name, item) for name, items in rubrics(summary.course.solved).items() for item in items]
    return Section("Rubrics of the open questions", (), ("Question", "What earns points"), tuple(rows))


def _changes(summary: Summary) -> Section:
    """Whose points have changed since the previous grading, and why."""
    rows = []
    for row in summary.rows:
        if row.previous is None:
            continue
        now = {name: verdict.points for name, verdict in row.graded.verdicts.items()}
        for name in sorted(now.keys() | row.previous.points.keys(), key=_place(summary)):
            old, new = row.previous.points.get(name, 0.0), now.get(name, 0.0)
            if abs(old - new) > SAME:
                rows.append((row.learner, _exercise(name), f"{old:g}", f"{new:g}", row.why or "graded again"))
    again = sum(1 for row in summary.rows if row.previous and row.previous.key != row.graded.key)
    were = "was" if again == 1 else "were"
    sentence = f"{again} {were} graded again since the previous grading; these points have changed."
    return Section("Changed points", (sentence,), ("Learner", "Exercise", "Before", "Now", "Why"), tuple(rows))


def _misconceptions(summary: Summary) -> Section:
    """The misconceptions, the most frequent first."""
    found: dict[tuple[str, str], list[tuple[str, Verdict]]] = defaultdict(list)
    for row in summary.rows:
        for verdict in row.graded.verdicts.values():
            if verdict.misconception and verdict.cases:
                found[verdict.exercise, verdict.misconception].append((row.learner, verdict))
    rows = []
    for (exercise, name), cases in sorted(found.items(), key=lambda item: (-len(item[1]), item[0])):
        message = Counter(verdict.message for _, verdict in cases).most_common(1)[0][0]
        who = [learner for learner, _ in cases]
        more = f" and {len(who) - SHOWN_LEARNERS} more" if len(who) > SHOWN_LEARNERS else ""
        rows.append((str(len(cases)), exercise, name, message, ", ".join(who[:SHOWN_LEARNERS]) + more))
    headings = ("Learners", "Exercise", "Misconception", "Message to the learner", "Who")
    return Section("What the class has not understood", (), headings, tuple(rows))


def _exercises(summary: Summary) -> Section:
    readable = _readable(summary.rows)
    columns = [state for state in STATES if any(v.status == state for v in _all(readable))]
    rows = []
    for name in (name for name in summary.cells if any(name in row.graded.verdicts for row in readable)):
        verdicts = [row.graded.verdicts[name] for row in readable if name in row.graded.verdicts]
        states = Counter(verdict.status for verdict in verdicts)
        mean = sum(verdict.points for verdict in verdicts) / len(verdicts)
        counts = (str(states[state]) if states[state] else "" for state in columns)
        rows.append((_exercise(name), f"{mean:.2f}", f"{verdicts[0].max_points:g}", *counts))
    headings = ("Exercise", "Mean points", "Of", *(STATES[state] for state in columns))
    left_out = len(summary.rows) - len(readable)
    said = (f"Left out of the means: {left_out} that could not be read or graded.",) * bool(left_out)
    return Section("Exercises", said, headings, tuple(rows))


def _learners(summary: Summary) -> Section:
    order = [name for name in summary.cells if any(name in row.entry.scores for row in summary.rows)]
    rows = []
    for row in summary.rows:
        cells = [_points(row, name) for name in order]
        late = f"-{row.entry.penalty:g}" if row.entry.penalty else "late" if row.entry.late_seconds > 0 else ""
        total = f"{row.entry.score - row.entry.penalty:g}"
        rows.append((row.learner, total, *cells, late))
    most = max((row.entry.max_score for row in summary.rows), default=0)
    note = ("? waiting for a human; ✋ set by a human. Points are taken from the gradebook.",)
    headings = ("Learner", f"Points of {most:g}", *map(_exercise, order), "Late")
    return Section("Learners", note, headings, tuple(rows))


def _points(row: Row, name: str) -> str:
    hand = " ✋" * (name in row.entry.by_hand)
    return f"{row.entry.scores.get(name, 0.0):g}{hand}" + " ?" * (name in row.entry.waiting)


def _found(summary: Summary) -> Section:
    words = {"repaired": "repaired", "lost": "points lost", "note": "noted"}
    rows = [
        (row.learner, words[finding.severity], finding.kind, finding.cell, finding.message)
        for row in summary.rows
        for finding in row.graded.findings
        if finding.severity in words
    ]
    headings = ("Learner", "Result", "Finding", "Cell", "Message to the learner")
    return Section("Found in the notebooks", (), headings, tuple(rows))


def _absent(summary: Summary) -> Section:
    return Section("Handed in nothing", (), items=summary.absent)


def _place(summary: Summary) -> Callable[[str], int]:
    """A sort key: the position of an exercise in the notebook."""
    return lambda name: summary.cells.index(name) if name in summary.cells else len(summary.cells)


def _readable(rows: Iterable[Row]) -> list[Row]:
    """The rows without unreadable submissions: all verdicts missing, and a finding on the whole notebook."""
    return [
        row
        for row in rows
        if any(verdict.status != "missing" for verdict in row.graded.verdicts.values())
        or not any(finding.severity == "human" and not finding.cell for finding in row.graded.findings)
    ]


def _all(rows: Iterable[Row]) -> Iterable[Verdict]:
    return (verdict for row in rows for verdict in row.graded.verdicts.values())


def _exercise(grade_id: str) -> str:
    return grade_id.removeprefix("check-")


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(_exercise, names))


# --- HTML ----------------------------------------------------------------------------------------------


def _section(part: Section) -> str:
    page = f"<h2>{html.escape(part.title)}</h2>\n"
    page += "".join(f"<p>{in_html(sentence)}</p>\n" for sentence in part.sentences)
    if part.rows:
        kinds = [' class="number"' if _is_number(part, i) else "" for i in _columns(part)]
        head = "".join(f'<th scope="col"{kind}>{in_html(t)}</th>' for t, kind in zip(part.headings, kinds, strict=True))
        many = ' class="many"' * (len(part.headings) > MANY)
        page += f'<div class="wide"><table{many}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        for row in part.rows:
            cells = [_data(text, kind) for text, kind in zip(row, kinds, strict=True)]
            cells[0] = cells[0].replace("<td", '<th scope="row"').replace("</td>", "</th>")
            page += f"<tr>{''.join(cells)}</tr>\n"
        page += "</tbody>\n</table></div>\n"
    if part.items:
        page += "<ul>\n" + "".join(f"<li>{in_html(item)}</li>\n" for item in part.items) + "</ul>\n"
    return page


def _data(text: str, kind: str) -> str:
    """A cell; a percentage gets a bar."""
    if re.fullmatch(r"\d+%", text):
        kind = f' class="number share" style="--share: {text}"'
    return f"<td{kind}>{in_html(text)}</td>"


def _columns(part: Section) -> range:
    return range(len(part.headings))


def _is_number(part: Section, column: int) -> bool:
    return all(re.fullmatch(r"-?[\d.]*%?( ✋)?( \?)?", row[column]) for row in part.rows) and column > 0


def _cell(text: str) -> str:
    return in_markdown(text).replace("|", "\\|")
