"""Restore the released structure of a submission, with the learner's code in the right cells.

Learners copy, move, merge, split and delete cells, and some editors lose the metadata that nbgrader relies on. Whatever
a learner wrote counts as long as it is somewhere in the notebook. Nothing is run: definitions are found by parsing.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Any

from lora_from_scratch.grading.graded import Finding
from lora_from_scratch.grading.submissions import ordering, repairs
from lora_from_scratch.grading.submissions.claiming import Cell, claim
from lora_from_scratch.grading.submissions.released import Release


@dataclass(frozen=True)
class MatchResult:
    """A repaired submission.

    Attributes:
        notebook: contains every graded cell of the release exactly once, in the release's order, with its metadata and
            id, and the learner's own cells between them; no outputs.
        findings: what was repaired, and what could not be.
    """

    notebook: Any
    findings: tuple[Finding, ...]


def match(submitted: Any, released: Any) -> MatchResult:
    """Arrange the cells of a submitted notebook as in the released one. Neither argument is modified.

    Matching is idempotent. A submission whose structure is undamaged is returned with its sources unchanged and without
    findings.

    Args:
        submitted: the notebook returned by `submission.read`.
        released: the notebook of notebooks/unit_NN/, read by nbformat.
    """
    release = Release.of(released)
    state = repairs.RepairState(release, [_cell(node) for node in submitted.cells])
    repairs.take_prose_out_of_code(state)
    claim(state.cells, release)
    repairs.report_metadata(state)
    repairs.keep_one_of_each(state)
    repairs.complete_answers(state)
    ordering.arrange(state)
    ordering.find_definitions(state)
    ordering.bring_helpers_forward(state)
    repairs.report_kernel(state, submitted, released)
    return MatchResult(_notebook(state.cells, released), tuple(state.findings))


def _cell(node: Any) -> Cell:
    return Cell(
        node.cell_type,
        node.source,
        node.get("id", ""),
        dict(node.metadata),
        copy.deepcopy(node.get("attachments")),
    )


def _notebook(cells: list[Cell], released: Any) -> Any:
    import nbformat

    ids: set[str] = {cell.place.cell_id for cell in cells if cell.place is not None}
    nodes = []
    for cell in cells:
        if cell.place is not None:
            cell_id, metadata = cell.place.cell_id, copy.deepcopy(dict(cell.place.metadata))
        else:
            cell_id, metadata = _new_id(cell, ids), {}
            ids.add(cell_id)
        kind = cell.place.kind if cell.place is not None else cell.kind
        node: dict[str, Any] = {"id": cell_id, "cell_type": kind, "metadata": metadata, "source": cell.source}
        if kind == "code":
            node |= {"execution_count": None, "outputs": []}
        elif cell.attachments:
            node["attachments"] = cell.attachments
        nodes.append(node)
    metadata = copy.deepcopy(dict(released.metadata))
    return nbformat.from_dict({"cells": nodes, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def _new_id(cell: Cell, taken: set[str]) -> str:
    """The cell's own id, or one derived from its contents if it has none or the id is taken."""
    wanted = cell.cell_id
    number = 0
    while not wanted or wanted in taken:
        wanted = hashlib.sha256(f"{number}{cell.kind}{cell.source}".encode()).hexdigest()[:12]
        number += 1
    return wanted
