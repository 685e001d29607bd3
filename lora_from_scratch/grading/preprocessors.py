"""What the course adds to nbgrader's own steps; course/nbgrader_config.py names it."""

from __future__ import annotations

from typing import Any

from nbgrader import preprocessors


class ClearSolutions(preprocessors.ClearSolutions):
    """nbgrader's own, but a solution outside any function is taken out without a stub.

    The stub raises an error, which is right inside a function that nobody has written yet. At the top of a cell it
    would stop the notebook: a prediction is `guess = None` there until the learner writes another value.
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
