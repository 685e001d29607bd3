"""The course's configuration of nbgrader: run nbgrader in the folder of this file."""

from pathlib import Path

from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ClearHiddenTests,
    ClearMarkScheme,
    ClearOutput,
    ComputeChecksums,
    DeduplicateIds,
    GetGrades,
    LimitOutput,
    LockCells,
    OverwriteCells,
    OverwriteKernelspec,
    SaveAutoGrades,
    SaveCells,
)

from lora_from_scratch.grading.exporters import CsvExport
from lora_from_scratch.grading.feedback import FeedbackPage
from lora_from_scratch.grading.formgrader import escape_names
from lora_from_scratch.grading.preprocessors import ClearSolutions as CourseClearSolutions
from lora_from_scratch.grading.preprocessors import HarmlessComments, HarmlessNames, MarkInSandbox, MatchRelease

c = get_config()  # noqa: F821

# The course's root is the nearest folder that holds solutions/: this file's own, or the one above.
here = Path(__file__).resolve().parent
c.CourseDirectory.root = str(next((place for place in (here, *here.parents) if (place / "solutions").is_dir()), here))
c.CourseDirectory.course_id = "lora-from-scratch"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "notebooks"

c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\nraise NotImplementedError"}
c.ClearSolutions.text_stub = "*Your answer here.*"
# nbgrader's own steps without the two that this course does not use (headers and footers, generated tests), and with
# predictions left as `None` instead of an error.
c.GenerateAssignment.preprocessors = [
    LockCells,
    CourseClearSolutions,
    ClearOutput,
    CheckCellMetadata,
    ComputeChecksums,
    SaveCells,
    ClearHiddenTests,
    ClearMarkScheme,
    ComputeChecksums,
    CheckCellMetadata,
]

# nbgrader's own steps with two of this course's. MatchRelease puts a damaged notebook right before nbgrader looks at
# it; MarkInSandbox stands where nbgrader would run the notebook, tests included, in a process of the learner's.
c.Autograde.sanitize_preprocessors = [
    MatchRelease,
    ClearOutput,
    DeduplicateIds,
    OverwriteKernelspec,
    OverwriteCells,
    CheckCellMetadata,
]
c.Autograde.autograde_preprocessors = [
    MarkInSandbox,
    LimitOutput,
    SaveAutoGrades,
    AssignLatePenalties,
    CheckCellMetadata,
]

# Names and comments in the formgrader, in feedback pages and in exports are only text.
c.HTMLExporter.preprocessors = [HarmlessNames]
c.GenerateFeedback.preprocessors = [GetGrades, HarmlessComments, CSSHTMLHeaderPreprocessor]
c.GenerateFeedback.exporter_class = FeedbackPage
c.ExportApp.plugin_class = CsvExport
escape_names()

# `nbgrader validate` runs a notebook as a whole, which takes up to five minutes.
c.Execute.timeout = 600
c.ExecutePreprocessor.timeout = 600
