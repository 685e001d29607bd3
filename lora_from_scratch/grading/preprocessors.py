"""The course's own nbgrader preprocessors, used in course/nbgrader_config.py."""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path
from typing import Any

from nbgrader import preprocessors
from nbgrader.coursedir import CourseDirectory
from nbgrader.preprocessors.base import NbGraderPreprocessor
from traitlets import Enum

from lora_from_scratch.support.plain_text import one_line

FINDINGS = "lora_from_scratch_findings"  # metadata key: findings passed on by MatchRelease


class ClearSolutions(preprocessors.ClearSolutions):
    """nbgrader's own, except that a solution outside any function is removed without a stub.

    The stub raises an error, which is right inside an unwritten function. At the top level of a cell it would stop the
    notebook, where a prediction stays `guess = None` until the learner sets another value.
    """

    def _replace_solution_region(self, cell: Any, language: str) -> bool:
        if cell.cell_type != "code":
            return super()._replace_solution_region(cell, language)
        kept, outside = [], False
        for line in cell.source.split("\n"):
            if line.lstrip() == line and self.begin_solution_delimeter in line:
                outside = True
            elif outside and self.end_solution_delimeter in line:
                outside = False
            elif not outside:
                kept.append(line)
        if outside:
            raise RuntimeError("no end solution statement found")
        removed = len(kept) < len(cell.source.split("\n"))
        cell.source = "\n".join(kept)
        return super()._replace_solution_region(cell, language) or removed


class MatchRelease(NbGraderPreprocessor):
    """The first of autograde's sanitizing steps: repairs moved, merged, duplicated and deleted cells."""

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        from lora_from_scratch.grading.graded import Finding
        from lora_from_scratch.grading.submissions.matching import match
        from lora_from_scratch.grading.submissions.submission import normal

        found: list[Finding] = []
        matched = match(normal(nb, found), _released(self, resources))
        findings = [dataclasses.asdict(finding) for finding in (*found, *matched.findings)]
        matched.notebook.metadata[FINDINGS] = findings
        return matched.notebook, resources


class MarkInSandbox(NbGraderPreprocessor):
    """Replaces nbgrader's Execute: runs the notebook in the sandbox and writes the judge's verdicts into it."""

    isolation: Any = Enum(("bubblewrap", "none"), "bubblewrap", help='"bubblewrap", or "none": without a sandbox').tag(
        config=True
    )

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        import nbformat

        from lora_from_scratch.grading import marking
        from lora_from_scratch.grading.autograded import shown
        from lora_from_scratch.grading.cohort import secret_of
        from lora_from_scratch.grading.graded import Finding
        from lora_from_scratch.grading.sandbox.stripped import find_unit
        from lora_from_scratch.grading.submissions.matching import match

        said, directory = resources["nbgrader"], CourseDirectory(config=self.config)
        released, root = _released(self, resources), Path(directory.root)
        handed_in = directory.format_path(directory.submitted_directory, said["student"], said["assignment"])
        settings = marking.Settings(root / "graded" / ".cache", self.isolation)
        found = [Finding(**finding) for finding in nb.metadata.get(FINDINGS, [])]
        unit = find_unit(said["assignment"].removeprefix("unit_"))
        with marking.data_beside(Path(handed_in) / f"{said['notebook']}.ipynb") as (data, left_out):
            graded = marking.mark(
                match(nb, released),
                released,
                unit,
                said["student"],
                secret_of(root),
                settings,
                findings=[*found, *left_out],
                data=data,
            )
        return nbformat.reads(shown(graded, released), as_version=4), resources


class HarmlessNames(NbGraderPreprocessor):
    """Escapes learners' names before a page is rendered, because nbgrader's templates do not."""

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        for name in ("student", "first_name", "last_name", "notebook_path"):
            if resources.get(name):
                resources[name] = html.escape(one_line(resources[name]))
        return nb, resources


class ShowRubrics(NbGraderPreprocessor):
    """In the formgrader, puts the rubric of an open question below the answer. Feedback pages do not show it."""

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        import nbformat

        from lora_from_scratch.grading.rubrics import rubrics

        if "submission_id" not in resources:  # not in the formgrader
            return nb, resources
        directory = CourseDirectory(config=self.config)
        folder = Path(directory.format_path(directory.source_directory, ".", resources["assignment_id"]))
        items = rubrics(folder / f"{resources['notebook_id']}.ipynb")
        cells = []
        for cell in nb.cells:
            cells.append(cell)
            name = cell.metadata.get("nbgrader", {}).get("grade_id", "")
            if name in items:
                text = "\n".join(["**Rubric** (learners do not see it)", "", *(f"- {item}" for item in items[name])])
                cells.append(nbformat.v4.new_markdown_cell(text, id=f"rubric-{name}"[:64]))
        nb.cells = cells
        return nb, resources


class HarmlessComments(NbGraderPreprocessor):
    """Sanitises comments after GetGrades: feedback pages render them as Markdown, and they may quote learners."""

    def preprocess_cell(self, cell: Any, resources: Any, cell_index: int) -> tuple[Any, Any]:
        from lora_from_scratch.grading.harmless import from_markdown

        said = cell.metadata.get("nbgrader", {})
        if said.get("comment"):
            said["comment"] = from_markdown(said["comment"])
        return cell, resources


def _released(step: NbGraderPreprocessor, resources: Any) -> Any:
    """The released notebook."""
    import nbformat

    said, directory = resources["nbgrader"], CourseDirectory(config=step.config)
    folder = Path(directory.format_path(directory.release_directory, ".", said["assignment"]))
    return nbformat.read(folder / f"{said['notebook']}.ipynb", as_version=4)
