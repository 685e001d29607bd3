"""The outputs of a graded notebook: verdicts and points under the checks, printed text under the cells that ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_from_scratch.checks import display
from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.grading.sandbox import Observations, Output
from lora_from_scratch.support.plain_text import plain

NOT_SHOWN = "(This kind of output is not shown.)"
SKIPPED = "Not run in grading: the cell is unchanged, and no answer needs it.\n"


def write(notebook: Any, verdicts: Mapping[str, Verdict], observed: Observations | None) -> None:
    """Write the outputs into the notebook.

    Args:
        verdicts: by the grade_id of the check's cell.
        observed: None if nothing was run.
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


def harmless(output: Any) -> Any:
    """An output that is safe to open: only text, sanitised HTML and pictures are kept."""
    kind = output.output_type
    if kind == "stream":
        return _stream("stderr" if output.name == "stderr" else "stdout", output.text)
    if kind == "error":
        lines = [plain(line) for line in output.traceback]
        return _node(output_type=kind, ename=plain(output.ename), evalue=plain(output.evalue), traceback=lines)
    data = _harmless_data(output.get("data", {})) or {"text/plain": NOT_SHOWN}
    count = {"execution_count": output.execution_count} if kind == "execute_result" else {}
    return _node(output_type="execute_result" if count else "display_data", data=data, metadata={}, **count)


def as_text(notebook: Any) -> str:
    """The notebook as nbformat writes it; equal notebooks give equal bytes."""
    import nbformat

    return nbformat.v4.writes(notebook) + "\n"


def _harmless_data(given: Mapping[str, Any]) -> dict[str, str]:
    from lora_from_scratch.grading.harmless import from_html, picture

    data = {}
    for kind, content in given.items():
        content = "".join(content) if isinstance(content, list) else content
        if not isinstance(content, str):
            continue
        if kind == "text/html":
            data[kind] = from_html(content)
        elif kind == "text/plain":
            data[kind] = plain(content)
        elif kind in ("image/png", "image/jpeg") and (found := picture(content)) and found[0] == kind:
            data[kind] = found[1]
    return data


def _of_check(verdict: Verdict, count: int) -> list[Any]:
    """The verdict without the seed, and the points as a result, which nbgrader reads as partial credit."""
    said = {"text/html": display.as_html(verdict, advice=False), "text/plain": display.as_text(verdict, advice=False)}
    points = {"text/html": "", "text/plain": repr(float(verdict.points))}  # the verdict says them to a person
    return [_node(output_type="display_data", data=said, metadata={}),
            _node(output_type="execute_result", data=points, metadata={}, execution_count=count)]  # fmt: skip


def _of_cell(output: Output) -> list[Any]:
    shown = [_stream(name, text) for name, text in (("stdout", output.stdout), ("stderr", output.stderr)) if text]
    if output.status == "error":
        name, _, message = plain(output.error).partition(": ")
        lines = plain(output.traceback).split("\n")
        return [*shown, _node(output_type="error", ename=name, evalue=message, traceback=lines)]
    if output.status != "ran":
        return [*shown, _stream("stdout", f"{output.error}\n")]
    return shown


def _stream(name: str, text: str) -> Any:
    return _node(output_type="stream", name=name, text=plain(text))


def _node(**fields: Any) -> Any:
    import nbformat

    return nbformat.from_dict(fields)
