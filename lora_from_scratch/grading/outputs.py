"""The outputs of a graded notebook: verdicts and points under the checks, what was printed under the cells that ran."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_from_scratch.checks import display
from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.grading.sandbox import Observed, Output

SKIPPED = "Not run in grading: the cell is as it was released, and no answer needs it.\n"
NOT_PRINTED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def write(notebook: Any, verdicts: Mapping[str, Verdict], observed: Observed | None) -> None:
    """Put the outputs under the cells.

    Args:
        verdicts: by the grade_id of the check's cell.
        observed: None: nothing was run.
    """
    count = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        verdict = verdicts.get(cell.metadata.get("nbgrader", {}).get("grade_id", ""))
        output = observed.outputs.get(cell.id) if observed is not None else None
        if verdict is not None:
            count += 1
            cell.execution_count = count
            cell.outputs = _of_check(verdict, count)
        elif output is not None:
            count += 1
            cell.execution_count = count
            cell.outputs = _of_cell(output)
        elif observed is not None and cell.source.strip():
            cell.outputs = [_stream("stdout", SKIPPED)]


def as_text(notebook: Any) -> str:
    """The notebook as nbformat writes it, the same bytes for the same notebook."""
    import nbformat

    return nbformat.v4.writes(notebook) + "\n"


def _of_check(verdict: Verdict, count: int) -> list[Any]:
    """What the verdict says, without the seed; and the points as a result, which nbgrader takes as partial credit."""
    said = {"text/html": display.as_html(verdict, advice=False), "text/plain": display.as_text(verdict, advice=False)}
    worth = f"{verdict.points:.3g} of {verdict.max_points:g} points" if verdict.max_points else "no points"
    points = {"text/html": worth, "text/plain": repr(float(verdict.points))}
    return [_node(output_type="display_data", data=said, metadata={}),
            _node(output_type="execute_result", data=points, metadata={}, execution_count=count)]  # fmt: skip


def _of_cell(output: Output) -> list[Any]:
    shown = [_stream(name, text) for name, text in (("stdout", output.stdout), ("stderr", output.stderr)) if text]
    if output.status == "error":
        name, _, message = _printable(output.error).partition(": ")
        lines = _printable(output.traceback).split("\n")
        return [*shown, _node(output_type="error", ename=name, evalue=message, traceback=lines)]
    if output.status != "ran":
        return [*shown, _stream("stdout", f"{output.error}\n")]
    return shown


def _stream(name: str, text: str) -> Any:
    return _node(output_type="stream", name=name, text=_printable(text))


def _node(**fields: Any) -> Any:
    import nbformat

    return nbformat.from_dict(fields)


def _printable(text: str) -> str:
    return NOT_PRINTED.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
