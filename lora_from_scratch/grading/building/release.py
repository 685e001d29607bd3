"""Make the learner's notebook from the solved one, as nbgrader's `generate_assignment` does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any


def release(notebook: Any, config: Path) -> str:
    """The learner's notebook as text, byte for byte as `nbgrader generate_assignment` writes it.

    Args:
        notebook: the solved notebook, executed or not.
        config: the course's nbgrader_config.py, which lists the steps.
    """
    from nbconvert.exporters import NotebookExporter
    from nbgrader.preprocessors import SaveCells
    from traitlets.config import PyFileConfigLoader

    settings = PyFileConfigLoader(config.name, path=str(config.parent)).load_config()
    settings.Exporter.default_preprocessors = []
    exporter = NotebookExporter(config=settings, log=logging.getLogger("nbgrader"))
    for step in settings.GenerateAssignment.preprocessors:
        if step is not SaveCells:  # it only writes to the gradebook
            exporter.register_preprocessor(step, enabled=True)
    text, _ = exporter.from_notebook_node(notebook)
    return text
