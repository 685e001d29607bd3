"""The course's nbgrader configuration. Run nbgrader in the folder that contains this file."""

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
from lora_from_scratch.grading.formgrader import escape_names, read_gradebook_anew
from lora_from_scratch.grading.late import LatePolicy
from lora_from_scratch.grading.preprocessors import ClearSolutions as CourseClearSolutions
from lora_from_scratch.grading.preprocessors import (
    HarmlessComments,
    HarmlessNames,
    MarkInSandbox,
    MatchRelease,
    ShowRubrics,
)

c = get_config()  # noqa: F821

# The course's root is the nearest folder that contains solutions/: this file's folder or one above it.
here = Path(__file__).resolve().parent
c.CourseDirectory.root = str(next((place for place in (here, *here.parents) if (place / "solutions").is_dir()), here))
c.CourseDirectory.course_id = "lora-from-scratch"
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "notebooks"

c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\nraise NotImplementedError"}
c.ClearSolutions.text_stub = "*Your answer here.*"
# nbgrader's default steps without the two that this course does not use (headers and footers, generated tests), and
# with predictions left as `None` instead of raising an error.
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

# nbgrader's default steps plus two of this course. MatchRelease repairs a damaged notebook before nbgrader reads it.
# MarkInSandbox replaces Execute, which would run the notebook and its tests in one process with the learner's code.
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

# Late work; it applies to units that have a due date. Announce the numbers before the first one.
c.AssignLatePenalties.plugin_class = LatePolicy
c.LatePolicy.grace_hours = 1  # after each due date
c.LatePolicy.days = 3  # late days of a learner for the whole term
c.LatePolicy.percent_a_day = 20  # of the earned points, for each further day

# Show names and comments as plain text in the formgrader, in feedback pages and in exports.
c.HTMLExporter.preprocessors = [HarmlessNames, ShowRubrics]
c.GenerateFeedback.preprocessors = [GetGrades, HarmlessComments, CSSHTMLHeaderPreprocessor]
c.GenerateFeedback.exporter_class = FeedbackPage
c.ExportApp.plugin_class = CsvExport
escape_names()

# Show in the formgrader what `grade` has written while JupyterLab was running.
read_gradebook_anew()

# `nbgrader validate` runs the whole notebook, which takes up to five minutes.
c.Execute.timeout = 600
c.ExecutePreprocessor.timeout = 600
