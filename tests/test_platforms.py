"""Bundles for Gradescope and PrairieLearn, unpacked and run as the platforms document it; and their results.json."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import nbformat
import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from lora_from_scratch.checks.verdict import CaseResult, Failure, Verdict
from lora_from_scratch.grading.graded import Finding, Graded
from lora_from_scratch.grading.platforms import container
from lora_from_scratch.grading.platforms.results import for_gradescope, for_prairielearn
from tests.cli_calls import complaint, output_of

ROOT = Path(__file__).resolve().parents[1]
NAME = "unit_00"
SECRET = "a secret of tests"

NUMBER, TEXT = {"type": "number", "minimum": 0}, {"type": "string"}
VISIBILITY = {"enum": ["visible", "after_due_date", "after_published", "hidden"]}
FORMAT = {"enum": ["text", "html", "simple_format", "md", "ansi"]}
# "Output Format" in Gradescope's "Autograder specifications", as far as we use it: nothing else may be in it.
GRADESCOPE = {
    "type": "object",
    "additionalProperties": False,
    "anyOf": [{"required": ["tests"]}, {"required": ["score"]}],
    "properties": {
        "score": NUMBER,
        "execution_time": NUMBER,
        "output": TEXT,
        "output_format": FORMAT,
        "test_output_format": FORMAT,
        "test_name_format": FORMAT,
        "visibility": VISIBILITY,
        "stdout_visibility": VISIBILITY,
        "tests": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["score", "max_score", "name"],
                "properties": {
                    "score": NUMBER,
                    "max_score": NUMBER,
                    "status": {"enum": ["passed", "failed"]},
                    "name": TEXT,
                    "number": TEXT,
                    "output": TEXT,
                    "output_format": FORMAT,
                    "visibility": VISIBILITY,
                },
            },
        },
    },
}
# "Grading results" in PrairieLearn's documentation of external grading, as far as we use it.
PRAIRIELEARN = {
    "type": "object",
    "additionalProperties": False,
    "required": ["gradable"],
    "if": {"properties": {"gradable": {"const": True}}},
    "then": {"required": ["score"]},
    "else": {"required": ["format_errors"], "properties": {"score": False}},
    "properties": {
        "gradable": {"type": "boolean"},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "message": TEXT,
        "output": TEXT,
        "format_errors": {"anyOf": [TEXT, {"type": "array", "items": TEXT}]},
        "tests": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "points", "max_points"],
                "properties": {
                    "name": TEXT,
                    "description": TEXT,
                    "points": NUMBER,
                    "max_points": NUMBER,
                    "message": TEXT,
                    "output": TEXT,
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("course")
    (root / "solutions").mkdir()
    shutil.copy(ROOT / "course" / "nbgrader_config.py", root)
    shutil.copytree(ROOT / "notebooks" / NAME, root / "notebooks" / NAME)
    (root / "cohort.json").write_text(json.dumps({"secret": SECRET}))
    return root


def hand_in(folder: Path, **answers: str) -> None:
    """The solved notebook, with these cells changed."""
    solved = nbformat.read(ROOT / "solutions" / NAME / f"{NAME}.ipynb", as_version=4)
    for cell in solved.cells:
        name = cell.metadata.get("nbgrader", {}).get("grade_id")
        cell.source = answers.get(name, cell.source)
    folder.mkdir(parents=True)
    nbformat.write(solved, folder / f"{NAME}.ipynb")


def unpack(bundle: Path, to: Path) -> None:
    """Unpack with the files' modes, as `unzip` does."""
    with zipfile.ZipFile(bundle) as archive:
        for info in archive.infolist():
            os.chmod(archive.extract(info, to), info.external_attr >> 16)


def run(script: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a bundle's script where the platform runs it: in the folder above `source` or `tests`."""
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    place = next(Path(variables[name]) for name in ("AUTOGRADER_ROOT", "GRADE_ROOT") if name in variables)
    return subprocess.run([str(script)], env=environment, cwd=place, capture_output=True, text=True)


def first_exercise() -> str:
    from lora_from_scratch.grading.tasks import unit_of

    return unit_of("00").exercises[0].name


@pytest.mark.slow
def test_gradescopes_bundle_runs_as_its_harness_runs_it(course: Path, tmp_path: Path) -> None:
    """The layout of "Autograder specifications": run_autograder is copied out of /autograder/source and run there."""
    bundle, root = tmp_path / "bundle.zip", tmp_path / "autograder"
    options = ("--course", course, "--visibility", "after_due_date")
    said = output_of("bundle", "00", "--for", "gradescope", "--output", bundle, *options)
    assert "points are given automatically" in said
    unpack(bundle, root / "source")
    wrong = first_exercise()
    hand_in(root / "submission", **{wrong: f"print('hello')\n{wrong} = lambda *_, **__: None"})
    (root / "results").mkdir()
    (root / "submission_metadata.json").write_text(json.dumps({"id": 123, "users": [{"email": "ada@example.org"}]}))
    shutil.copy(root / "source" / "run_autograder", root)
    done = run(root / "run_autograder", AUTOGRADER_ROOT=str(root))
    assert done.returncode == 0, done.stderr
    results = json.loads((root / "results" / "results.json").read_text())
    jsonschema.validate(results, GRADESCOPE)
    scores = {test["name"]: (test["score"], test["max_score"]) for test in results["tests"]}
    assert scores.pop(wrong)[0] == 0
    assert all(score == most for score, most in scores.values())
    assert results["visibility"] == "after_due_date"
    assert SECRET not in json.dumps(results)
    assert (root / "source").stat().st_mode & 0o077 == 0
    assert (root / "source" / "kit" / "cohort.json").stat().st_mode & 0o077 == 0


def test_gradescopes_bundle_writes_no_results_for_what_cannot_be_read(course: Path, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    shutil.copy(course / "notebooks" / NAME / f"{NAME}.ipynb", kit)
    shutil.copy(course / "cohort.json", kit)
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / f"{NAME}.ipynb").write_text("{")
    where = [str(kit), str(tmp_path / "submission"), str(tmp_path / "results.json")]
    assert container.main(["gradescope", *where]) == container.FAILED
    assert not (tmp_path / "results.json").exists()
    assert container.main(["prairielearn", *where]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["gradable"] is False
    jsonschema.validate(results, PRAIRIELEARN)


def test_gradescopes_script_fails_where_there_is_nothing_to_grade(course: Path, tmp_path: Path) -> None:
    """The unpacked bundle's own script and library: Gradescope then shows a failure of the autograder, no points."""
    bundle, root = tmp_path / "bundle.zip", tmp_path / "autograder"
    output_of("bundle", "00", "--for", "gradescope", "--output", bundle, "--course", course)
    unpack(bundle, root / "source")
    (root / "submission").mkdir()
    shutil.copy(root / "source" / "run_autograder", root)
    done = run(root / "run_autograder", AUTOGRADER_ROOT=str(root))
    assert done.returncode == container.FAILED, done.stderr
    assert f"{NAME}.ipynb" in done.stdout
    assert "Traceback" not in done.stderr
    assert not (root / "results" / "results.json").exists()


@pytest.mark.slow
def test_prairielearns_bundle_runs_as_its_grader_runs_it(course: Path, tmp_path: Path) -> None:
    """/grade/tests is the question's folder tests, /grade/student what was handed in; the entrypoint is run."""
    bundle, root = tmp_path / "bundle.zip", tmp_path / "grade"
    output_of("bundle", "00", "--for", "prairielearn", "--output", bundle, "--course", course, "--image", "me/grader")
    unpack(bundle, tmp_path / "course")
    question = tmp_path / "course" / "questions" / f"lora_from_scratch_{NAME}"
    options = json.loads((question / "info.json").read_text())["externalGradingOptions"]
    assert options["image"] == "me/grader"
    shutil.copytree(question / "tests", root / "tests")
    hand_in(root / "student")
    entrypoint = Path(options["entrypoint"].replace("/grade/", f"{root}/"))
    done = run(entrypoint, GRADE_ROOT=str(root), PYTHONPATH=str(tmp_path / "course" / "image"))
    assert done.returncode == 0, done.stderr
    results = json.loads((root / "results" / "results.json").read_text())
    jsonschema.validate(results, PRAIRIELEARN)
    assert (results["gradable"], results["score"]) == (True, 1.0)


def nobody_can_run_python() -> bool:
    command = [sys.executable, "-c", "import torch"]
    try:
        return os.geteuid() == 0 and subprocess.run(command, user=65534, group=65534, cwd="/").returncode == 0
    except PermissionError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not nobody_can_run_python(), reason="needs the superuser, and a Python that nobody may run")
def test_without_namespaces_a_learners_code_runs_as_nobody(course: Path, tmp_path: Path) -> None:
    """It can neither read the cohort's secret nor write the results."""
    kit = tmp_path / "kit"
    kit.mkdir()
    shutil.copy(course / "notebooks" / NAME / f"{NAME}.ipynb", kit)
    (kit / "cohort.json").write_text(json.dumps({"secret": SECRET}))
    tmp_path.chmod(0o755)
    (kit / "cohort.json").chmod(0o600)
    (tmp_path / "results").mkdir(mode=0o700)
    wrong = first_exercise()
    attack = f"""
import os
print(os.getuid(), os.geteuid(), os.getgroups())
for path, mode in (("{kit}/cohort.json", "r"), ("{tmp_path}/results/results.json", "w")):
    try:
        open(path, mode)
        print("opened", path)
    except OSError as error:
        print(type(error).__name__)
"""
    hand_in(tmp_path / "submission", **{wrong: attack})
    graded = container.grade_one(tmp_path / "submission", kit, "user")
    assert graded.isolation == "user"
    cells = nbformat.reads(graded.notebook, as_version=4).cells
    shown = next(cell for cell in cells if cell.metadata.get("nbgrader", {}).get("grade_id") == wrong)
    printed = "".join(output.get("text", "") for output in shown.outputs)
    assert printed == "65534 65534 []\nPermissionError\nPermissionError\n"
    assert graded.points > 0


VERDICTS = {
    "check-a": Verdict("a", "passed", 3, 3, (CaseResult("one", "numbers", True),)),
    "check-b": Verdict(
        "b",
        "failed",
        1,
        2,
        (CaseResult("one", "numbers", True), CaseResult("two", "numbers", False), CaseResult("three", "errors", True)),
        seed=123456,
        failure=Failure("two", {"x": "SECRET INPUT"}, "SECRET GOT", "SECRET EXPECTED", "SECRET PRINTED"),
        message="`x < 0` is missing.\x1b[31m",
    ),
}


def graded(*findings: Finding) -> Graded:
    return Graded("ada", "99", VERDICTS, {}, findings, "", "bubblewrap")


def test_results_have_partial_credit_and_messages_but_no_inputs() -> None:
    note = Finding("moved cell", "repaired", "b", "A cell was moved.")
    gradescope, prairielearn = for_gradescope(graded(note), "hidden"), for_prairielearn(graded(note))
    jsonschema.validate(gradescope, GRADESCOPE)
    jsonschema.validate(prairielearn, PRAIRIELEARN)
    assert gradescope["tests"][1] == {
        "name": "b",
        "score": 1,
        "max_score": 2,
        "status": "failed",
        "output": "x < 0 is missing.\N{REPLACEMENT CHARACTER}[31m\nnumbers: not right\nerrors: right",
    }
    assert (gradescope["visibility"], gradescope["output"]) == ("hidden", "A cell was moved.")
    assert prairielearn["score"] == pytest.approx(4 / 5)
    assert [(test["points"], test["max_points"]) for test in prairielearn["tests"]] == [(3, 3), (1, 2)]
    assert not [word for word in ("SECRET", "123456") if word in json.dumps([gradescope, prairielearn])]


def test_setup_asks_for_the_versions_that_are_installed_here(course: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.zip"
    output_of("bundle", "00", "--for", "gradescope", "--output", bundle, "--course", course)
    unpack(bundle, tmp_path / "source")
    wanted = dict(line.split("==") for line in (tmp_path / "source" / "requirements.txt").read_text().splitlines())
    assert wanted["numpy"] == importlib.metadata.version("numpy")
    assert {"torch", "nbformat", "ipython"} <= wanted.keys()
    assert not {"pytest", "nbgrader", "jupyterlab"} & wanted.keys()
    checked = subprocess.run(["bash", "-n", str(tmp_path / "source" / "setup.sh")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    before = bundle.read_bytes()
    output_of("bundle", "00", "--for", "gradescope", "--output", bundle, "--course", course)
    assert bundle.read_bytes() == before


def test_bad_input_ends_in_one_line(course: Path) -> None:
    assert "there is no unit 77" in complaint("bundle", "77", "--for", "gradescope", "--course", course)
    assert "release the unit first" in complaint("bundle", "01", "--for", "gradescope", "--course", course)
    assert "--for" in complaint("bundle", "01", "--course", course)
