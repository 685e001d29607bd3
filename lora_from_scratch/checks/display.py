"""How verdicts and hints look: HTML in a notebook, plain text elsewhere."""

from __future__ import annotations

from lora_from_scratch.checks.verdict import Verdict


def show(verdict: Verdict) -> None:
    print(as_text(verdict))


def as_text(verdict: Verdict) -> str:
    lines = [f"{verdict.exercise}: {verdict.status} ({verdict.points:g} of {verdict.max_points:g} points)"]
    lines += [f"  {'ok ' if case.right else 'no '} {case.name}" for case in verdict.cases]
    if verdict.failure:
        lines += [f"  {verdict.failure}"]
    if verdict.message:
        lines += [f"  {verdict.message}"]
    return "\n".join(lines)


def show_text(text: str) -> None:
    print(text)


def show_hints(name: str, hints: tuple[str, ...], of: int) -> None:
    for number, text in enumerate(hints, 1):
        print(f"Hint {number} of {of}: {text}")
