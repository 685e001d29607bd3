"""Display verdicts, hints and progress: as HTML in a notebook, as plain text elsewhere.

Colour is never the only signal: every state has a symbol and a word. Text keeps the page's own colour, so it is
readable in light and dark themes and without any styles (JupyterLab strips some of them from untrusted notebooks).
Everything that comes from a learner's code is escaped. Verdicts are in English; what is shown of them is translated
into the learner's language here.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from lora_from_scratch.checks.verdict import CaseResult, Failure, Verdict
from lora_from_scratch.support.progress_bar import in_notebook
from lora_from_scratch.support.translation import translate, translate_sentence

WIDTH = 100  # columns of plain text
NBSP = "\N{NO-BREAK SPACE}"

# Status: symbol, title, and border colour (the JupyterLab theme's, with a fallback for other front ends).
LOOKS = {
    "passed": ("✓", "Passed", "var(--jp-success-color1, #2e7d32)"),
    "failed": ("✗", "Not right yet", "var(--jp-error-color1, #c62828)"),
    "stopped": ("■", "Stopped", "var(--jp-error-color1, #c62828)"),
    "not started": ("○", "Not started yet", "var(--jp-border-color1, #757575)"),
    "missing": ("○", "Missing", "var(--jp-warn-color1, #b26a00)"),
    "library": ("→", "The library's version", "var(--jp-info-color1, #00796b)"),
    "unknown": ("?", "No such exercise", "var(--jp-warn-color1, #b26a00)"),
    "broken": ("!", "The check itself failed", "var(--jp-warn-color1, #b26a00)"),
}
PREDICTED = {"passed": "Your prediction is right", "failed": "It comes out differently"}
FIRST = "First case that is not right:"

BOX = "border: 1px solid var(--jp-border-color2, #9e9e9e); border-left: 5px solid {colour}; padding: 0.5em 1em; "
BOX += "margin: 0.4em 0; max-width: 60em; line-height: 1.5;"
CELL = "text-align: left; vertical-align: top; padding: 0.15em 1.2em 0.15em 0; white-space: normal;"
NAME = CELL.replace("normal", "nowrap")
VALUE = CELL + " font-family: var(--jp-code-font-family, monospace); overflow-wrap: anywhere; white-space: pre-wrap;"
LIST = "list-style: none; margin: 0.2em 0 0.2em 1em; padding: 0;"
PARAGRAPH = "margin: 0.4em 0;"


def show(verdict: Verdict) -> None:
    """Show a verdict to the learner."""
    publish(as_html(verdict), as_text(verdict))


def show_text(text: str) -> None:
    """Show a short text."""
    text = translate(text)
    publish(_paragraph(text), _wrapped(_without_backticks(text)))


def show_hints(name: str, hints: Sequence[str], of: int) -> None:
    """Show the hints opened so far, the newest last, and say how to open the next one."""
    left = of - len(hints)
    stuck = f'Still stuck? `{name} = library("{name}")` lets you continue. It earns no points; your own still can.'
    then = translate(f'{left} more: `hint("{name}")` again.' if left else f"That was the last hint. {stuck}")
    hints = [translate(text) for text in hints]
    items = "".join(f'<li style="{PARAGRAPH}">{_inline(text)}</li>' for text in hints)
    body = f'<p style="{PARAGRAPH}"><strong>{translate("Hints for")} {_code(name)}</strong></p>'
    body += f'<ol style="margin: 0.4em 0 0.4em 1.5em; padding: 0;">{items}</ol>{_paragraph(then)}'
    numbered = [f"{translate(f'Hint {number} of {of}:')} {text}" for number, text in enumerate(hints, 1)]
    lines = [_wrapped(_without_backticks(text)) for text in numbered]
    publish(_box(body, LOOKS["library"][2]), "\n".join([*lines, _wrapped(_without_backticks(then))]))


def publish(as_html: str, as_text: str) -> None:
    """Display both forms in a notebook, which picks the richer one; elsewhere print the text."""
    if in_notebook():
        from IPython.display import display

        display({"text/html": as_html, "text/plain": as_text}, raw=True)
    else:
        print(as_text)


def as_text(verdict: Verdict, advice: bool = True) -> str:
    """The verdict as plain text, wrapped at `WIDTH` columns (long words are not broken).

    Args:
        advice: whether to add what to do next, including the seed that reproduces these inputs.
    """
    lines = [f"{_title(verdict)}: {verdict.exercise}{_points_after(verdict, ', ')}"]
    if verdict.message:
        lines.append(_wrapped(_without_backticks(translate(verdict.message)), "  "))
    if verdict.failure:
        lines.append(_wrapped(f"{translate(FIRST)} {translate(verdict.failure.case)}", "  "))
        width = max(len(name) for name, _ in _rows(verdict.failure))
        lines += [_wrapped(f"{name:<{width}}  {value}", "    ", width + 2) for name, value in _rows(verdict.failure)]
    if _shows_cases(verdict):
        lines.append(f"  {_count(verdict.cases)}")
        lines += [
            f"    {mark}" if heading else f"      {mark}" for heading, mark in _case_lines(verdict, verdict.failure)
        ]
    lines += [_wrapped(_without_backticks(text), "  ") for text in _next_steps(verdict, advice)]
    return "\n".join(lines)


def as_html(verdict: Verdict, advice: bool = True) -> str:
    """The verdict as HTML without scripts, style sheets or external resources. `advice`: see `as_text`."""
    heading = f"<strong>{html.escape(_title(verdict))}</strong> · {_code(verdict.exercise)}"
    body = f'<p style="{PARAGRAPH}">{heading}{html.escape(_points_after(verdict, " · "))}</p>'
    if verdict.message:
        body += _paragraph(translate(verdict.message))
    if verdict.failure:
        case = html.escape(translate(verdict.failure.case))
        body += f'<p style="{PARAGRAPH}">{translate(FIRST)} <strong>{case}</strong></p>{_table(_rows(verdict.failure))}'
    if _shows_cases(verdict):
        opened = " open" if verdict.failure else ""
        body += f'<details{opened} style="{PARAGRAPH}"><summary>{html.escape(_count(verdict.cases))}</summary>'
        body += f"{_case_list(verdict)}</details>"
    body += "".join(_paragraph(text) for text in _next_steps(verdict, advice))
    return _box(body, LOOKS[verdict.status][2])


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> tuple[str, str]:
    """A table, as HTML and as text. The first column contains the row headings."""
    headings, caption = [translate(text) for text in headings], translate(caption)
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    text = "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [headings, *rows]
    )
    head = "".join(f'<th scope="col" style="{CELL}">{html.escape(cell)}</th>' for cell in headings)
    body = "".join(
        f'<tr><th scope="row" style="{CELL} font-weight: normal;">{html.escape(row[0])}</th>'
        + "".join(f'<td style="{CELL}">{html.escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    caption_html = f'<caption style="text-align: left; font-weight: bold;">{html.escape(caption)}</caption>'
    page = f'<table style="margin: 0.4em 0; border-collapse: collapse;">{caption_html}<thead><tr>{head}</tr></thead>'
    return f"{page}<tbody>{body}</tbody></table>", f"{caption}\n{text}"


def _title(verdict: Verdict) -> str:
    symbol, words, _ = LOOKS[verdict.status]
    if not verdict.cases:
        words = PREDICTED.get(verdict.status, words)
    return f"{symbol} {translate(words)}"


def _points_after(verdict: Verdict, separator: str) -> str:
    points = translate(f"{verdict.points:.3g} of {verdict.max_points:g} points")
    return f"{separator}{points}" if verdict.max_points else ""


def _rows(failure: Failure) -> list[tuple[str, str]]:
    says = [("the exercise says", translate_sentence(failure.sentence))] if failure.sentence else []
    given = [(f"input {name}", value) for name, value in failure.inputs.items()]
    printed = [("your code printed", failure.printed.strip())] if failure.printed.strip() else []
    got = "your code gives" if failure.expected else "what the check saw"
    expected = [("expected", translate(failure.expected))] if failure.expected else []
    rows = [*says, *given, (got, translate(failure.got)), *printed, *expected]
    return [(translate(name), value) for name, value in rows]


def _shows_cases(verdict: Verdict) -> bool:
    return bool(verdict.cases) and verdict.status != "not started"


def _count(cases: Sequence[CaseResult]) -> str:
    right = sum(case.right for case in cases)
    tried = sum(case.tried for case in cases)
    words = f"{tried} of {len(cases)} cases tried" if tried < len(cases) else f"{tried} cases tried"
    words = words.replace("1 cases", "1 case") if tried == 1 else words
    return translate(f"{words}, all right" if right == len(cases) else f"{words}: {right} right, {tried - right} not")


def _parts(verdict: Verdict) -> Mapping[str, list[CaseResult]]:
    parts: dict[str, list[CaseResult]] = {}
    for case in verdict.cases:
        parts.setdefault(case.part, []).append(case)
    return parts


def _part_heading(verdict: Verdict, part: str, cases: Sequence[CaseResult], parts: int) -> str:
    """For example "elimination: 2.5 of 2.5 points"; empty if the exercise has only one part."""
    worth = verdict.max_points / parts
    earned = worth if all(case.right for case in cases) else 0.0
    return translate(f"{part}: {earned:.3g} of {worth:.3g} points") if parts > 1 else ""


def _mark(case: CaseResult) -> str:
    mark = "✓ right:" if case.right else "✗ not right:" if case.tried else "– not tried:"
    return f"{translate(mark)} {translate(case.name)}"


def _case_lines(verdict: Verdict, failure: Failure | None) -> list[tuple[bool, str]]:
    """The lines below the verdict, each with whether it is a heading; none if nothing failed."""
    lines: list[tuple[bool, str]] = []
    parts = _parts(verdict)
    for part, cases in parts.items() if failure else []:
        heading = _part_heading(verdict, part, cases, len(parts))
        lines += [(True, heading)] if heading else []
        lines += [(False, _mark(case)) for case in cases]
    return lines


def _case_list(verdict: Verdict) -> str:
    parts = _parts(verdict)
    page = ""
    for part, cases in parts.items():
        heading = _part_heading(verdict, part, cases, len(parts))
        page += f'<div style="{PARAGRAPH}">{html.escape(heading)}</div>' if heading else ""
        page += f'<ul style="{LIST}">' + "".join(f"<li>{html.escape(_mark(case))}</li>" for case in cases) + "</ul>"
    return page


def _next_steps(verdict: Verdict, advice: bool) -> list[str]:
    """The notes, followed, with `advice`, by what to do next."""
    steps = list(verdict.notes)
    if verdict.status in ("failed", "stopped", "not started") and verdict.cases and advice:
        name = verdict.exercise
        again = f' Inputs are new every time; these again: `check("{name}", seed={verdict.seed})`.'
        steps.append(f'For a hint: `hint("{name}")`.{again if verdict.status != "not started" else ""}')
    return [translate(step) for step in steps]


def _box(body: str, colour: str) -> str:
    return f'<div style="{BOX.format(colour=colour)}">{body}</div>'


def _table(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><th scope="row" style="{NAME}">{html.escape(name)}</th><td style="{VALUE}">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<table style="margin: 0.4em 0 0.4em 1em; border-collapse: collapse;"><tbody>{body}</tbody></table>'


def _paragraph(text: str) -> str:
    return f'<p style="{PARAGRAPH}">{_inline(text)}</p>'


def _inline(text: str) -> str:
    """The text escaped for HTML, with text in backticks as code."""
    short = r'<code style="white-space: nowrap;">\1</code>'
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", re.sub(r"`([^`]{1,60})`", short, html.escape(text)))


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _without_backticks(text: str) -> str:
    """The text without its backticks; code keeps to one line by no-break spaces, which `_wrapped` removes again."""
    return re.sub(r"`([^`]+)`", lambda found: found[1].replace(" ", NBSP), text)


def _wrapped(text: str, indent: str = "", hanging: int = 0) -> str:
    filled = textwrap.fill(
        text.replace("\n", " | "),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + " " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.replace(NBSP, " ")
