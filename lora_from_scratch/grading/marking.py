"""Mark a submission: from a matched notebook to verdicts, points and outputs.

The notebook runs in the sandbox, which returns the observations of each exercise as data. The verdicts are made here,
where no learner's code runs. `mark_file` marks a whole submission.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_from_scratch.checks.exercise import Exercise, Prediction
from lora_from_scratch.checks.judge import judge, judge_prediction
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.checks.verdict import Verdict
from lora_from_scratch.grading import outputs, sandbox
from lora_from_scratch.grading.cohort import seed_of
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.grading.plan import cells_to_run, is_check
from lora_from_scratch.grading.sandbox import Guess, Isolation, Job, Limits, Observations, Probe, ProbeResult, Run
from lora_from_scratch.grading.submissions.choosing import choose
from lora_from_scratch.grading.submissions.folder import take_data
from lora_from_scratch.grading.submissions.matching import MatchResult, match
from lora_from_scratch.grading.submissions.released import Release, ReleasedCell

SUBMITTED = 2  # index of submitted/ among the parents of submitted/LEARNER/unit_NN/unit_NN.ipynb


@dataclass(frozen=True)
class Settings:
    """How submissions are marked.

    Attributes:
        cache: the folder for the sandbox's copies of the library; workers may share it.
        isolation: "bubblewrap" or "none".
        limits: the resources that a submission may use.
    """

    cache: Path
    isolation: Isolation = "bubblewrap"
    limits: Limits = dataclasses.field(default_factory=Limits)


def mark_file(
    path: Path, released: Any, unit: Unit, learner: str, secret: str, settings: Settings, *, key: str = ""
) -> Graded:
    """Read, match and mark submitted/LEARNER/unit_NN/unit_NN.ipynb. A bad submission gives a result, never an error.

    Other files beside the notebook are its data; they are available in the sandbox's working folder.

    Args:
        released: the notebook of notebooks/unit_NN/, read by nbformat.
        secret: the cohort's secret.

    Raises:
        ValueError, OSError: the machine or the course is at fault, not the submission: there is no sandbox, or the
            release checks something that the unit does not have.
    """
    submission, path = choose(path, path.absolute().parents[SUBMITTED], released)
    if submission.notebook is None:
        return nothing(released, unit, learner, submission.findings, settings.isolation, key)
    with data_beside(path) as (data, left_out):
        return mark(
            match(submission.notebook, released),
            released,
            unit,
            learner,
            secret,
            settings,
            findings=(*submission.findings, *left_out),
            data=data,
            key=key,
        )


def mark(
    matched: MatchResult,
    released: Any,
    unit: Unit,
    learner: str,
    secret: str,
    settings: Settings,
    *,
    findings: Iterable[Finding] = (),
    data: Path | None = None,
    key: str = "",
) -> Graded:
    """Run and judge a matched notebook.

    Args:
        findings: the findings from reading it, which precede those from matching.
        data: the folder with the learner's own data files.

    Raises:
        ValueError, OSError: as `mark_file`.
    """
    release, notebook = Release.of(released), matched.notebook
    items = _items(release, unit)
    seeds = {place.grade_id: seed_of(secret, unit.number, place.name) for place in release.checks}
    job = _job(notebook, released, unit, items, seeds, settings, data)
    observed = sandbox.observe_notebook(job)
    found = [*findings, *matched.findings]
    verdicts = {}
    for place in release.checks:
        item = items.get(place.grade_id)
        if item is not None:
            verdicts[place.grade_id] = _verdict(place, item, seeds[place.grade_id], observed, release, found)
    found += _early_exits(observed, release, verdicts)
    outputs.write(notebook, verdicts, observed)
    _empty_answers_as_released(notebook, release)
    graded = Graded(
        learner,
        unit.number,
        verdicts,
        open_questions(notebook, released),
        tuple(found),
        outputs.as_text(notebook),
        observed.isolation,
        key,
    )
    return _writable(graded)


def nothing(
    released: Any, unit: Unit, learner: str, findings: Iterable[Finding], isolation: str, key: str = ""
) -> Graded:
    """The result for a submission that is unreadable or missing: the released notebook, no points, the findings."""
    findings = tuple(findings)
    release = Release.of(released)
    message = findings[0].message if findings else "Nothing was handed in."
    verdicts = {
        grade_id: Verdict(item.name, "missing", 0.0, item.points, message=message)
        for grade_id, item in _items(release, unit).items()
    }
    notebook = match(released, released).notebook
    outputs.write(notebook, verdicts, None)
    nobody = {place.grade_id: False for place in release.answers}
    graded = Graded(learner, unit.number, verdicts, nobody, findings, outputs.as_text(notebook), isolation, key)
    return _writable(graded)


def open_questions(notebook: Any, released: Any) -> dict[str, bool]:
    """By grade_id, whether the open question has an answer for a person to grade."""
    cells = {cell.metadata.get("nbgrader", {}).get("grade_id"): cell for cell in notebook.cells}
    return {
        place.grade_id: cells[place.grade_id].source.strip() not in ("", place.source.strip())
        or bool(cells[place.grade_id].get("attachments"))
        for place in Release.of(released).answers
    }


def _items(release: Release, unit: Unit) -> dict[str, Exercise | Prediction]:
    """The exercise or prediction of each check cell, by grade_id.

    Raises:
        ValueError: the release checks something that the unit does not have.
    """
    known = {item.name: item for item in unit.checked}
    graded = [place for place in release.checks if place.metadata["nbgrader"].get("grade")]
    unknown = [place.name for place in graded if place.name not in known]
    if unknown:
        there = f"the released notebook of unit {unit.number} checks {', '.join(unknown)}, which the unit does not have"
        raise ValueError(f"{there}; build and release the notebook again")
    return {place.grade_id: known[place.name] for place in graded}


@contextlib.contextmanager
def data_beside(path: Path) -> Iterator[tuple[Path | None, list[Finding]]]:
    """A temporary folder with the other files beside the notebook (None if there are none), and what was left out."""
    with tempfile.TemporaryDirectory(prefix="handed-in-", ignore_cleanup_errors=True) as made:
        taken, left_out = take_data(path.parent, Path(made))
        yield (Path(made) if taken else None), left_out


def _job(
    notebook: Any,
    released: Any,
    unit: Unit,
    items: Mapping[str, Exercise | Prediction],
    seeds: Mapping[str, int],
    settings: Settings,
    data: Path | None,
) -> Job:
    chosen = {cell.id for cell in cells_to_run(notebook, released)}
    steps: list[Run | Probe | Guess] = []
    for cell in notebook.cells:
        if cell.id in chosen:
            steps.append(Run(cell.id, cell.source))
        elif is_check(cell) and cell.metadata.nbgrader["grade_id"] in items:
            grade_id = cell.metadata.nbgrader["grade_id"]
            item = items[grade_id]
            guess = isinstance(item, Prediction)
            steps.append(Guess(item.name, cell.id) if guess else Probe(item.name, seeds[grade_id], cell.id))
    return Job(unit.number, tuple(steps), settings.cache, data, limits=settings.limits, isolation=settings.isolation)


# --- Verdicts ---------------------------------------------------------------------------------------------


def _verdict(
    place: ReleasedCell,
    item: Exercise | Prediction,
    seed: int,
    observed: Observations,
    release: Release,
    found: list[Finding],
) -> Verdict:
    """The verdict on one exercise or prediction; findings for a person are added to `found`."""
    try:
        if isinstance(item, Prediction):
            if place.cell_id not in observed.guesses:
                message = f"`{item.name}` could not be read, because the notebook had stopped before it."
                return Verdict(item.name, "stopped", 0.0, item.points, message=message)
            verdict = judge_prediction(item, observed.guesses[place.cell_id])
        else:
            tried = observed.probes[place.cell_id]
            if tried.changed:
                found.append(_replaced(place, tried))
            if tried.status != "seen":
                return _untried(item, tried, release, observed)
            verdict = judge(item, seed, list(tried.seen))
    except Exception as error:  # the judge failed on a learner's data; the other exercises go on
        message = "The check itself failed on your code's result. This is not your fault; a person will look at it."
        found.append(
            Finding("broken check", "human", place.grade_id, f"{message} ({type(error).__name__}: {error})"[:500])
        )
        return Verdict(item.name, "broken", 0.0, item.points, message=message)
    return dataclasses.replace(verdict, points=round(float(verdict.points), 2))  # as `check` returns it


def _untried(item: Exercise, tried: ProbeResult, release: Release, observed: Observations) -> Verdict:
    """The verdict on an answer that could not be tried."""
    message = tried.message
    if tried.status == "missing":
        solution = next((place for place in release.solutions if place.name == item.name), None)
        output = observed.outputs.get(solution.cell_id) if solution else None
        if output is not None and output.status != "ran" and output.error:
            message = f"There is no `{item.name}`, because its cell did not finish. {output.error[:400]}"
    status = {"missing": "missing", "library": "library"}.get(tried.status, "stopped")
    return Verdict(item.name, status, 0.0, item.points, message=message)


def _replaced(place: ReleasedCell, tried: ProbeResult) -> Finding:
    names = ", ".join(f"`{name}`" for name in tried.changed[:5])
    message = f"Your notebook replaces {names}. The original was restored before your answer was tried."
    message += " A person will look at it."
    return Finding("replaced functions", "human", place.grade_id, message)


def _early_exits(observed: Observations, release: Release, verdicts: Mapping[str, Verdict]) -> list[Finding]:
    """Findings about whatever ended Python while the notebook ran."""
    grade_ids = {place.cell_id: place.grade_id for place in release.places}
    all_right = all(verdict.passed for verdict in verdicts.values())
    return [
        Finding(
            early_exit.why,
            "human" if early_exit.why == "frames" else "note" if all_right else "lost",
            grade_ids.get(early_exit.cell_id, ""),
            early_exit.message,
        )
        for early_exit in observed.early_exits
    ]


def _empty_answers_as_released(notebook: Any, release: Release) -> None:
    """Restore the released text of empty answers, so that nbgrader treats them as unanswered."""
    stubs = {place.cell_id: place.source for place in release.answers}
    for cell in notebook.cells:
        if cell.id in stubs and not cell.source.strip() and not cell.get("attachments"):
            cell.source = stubs[cell.id]


def _writable(graded: Graded) -> Graded:
    """The result with characters replaced that cannot be encoded as UTF-8; outputs and errors may contain such."""
    text = graded.to_json()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Graded.from_json(text.encode("utf-8", "replace").decode("utf-8"))
    return graded
