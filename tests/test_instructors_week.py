"""The instructor's week, as the guide has it: its commands are run in a new folder, in its order, with a small class.

The commands are read from the guide's bash blocks. `WEEK` has the same commands with what the learners do before each,
and what must be true after it; so neither can change without the other. The folder knows nothing of the clone: the
package is on the path, as if it were installed.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed: pip install -e '.[course]'")

from nbgrader.api import Gradebook

from tests.cli_calls import call
from tests.sandboxes import needs_bubblewrap

ROOT = Path(__file__).resolve().parents[1]
GUIDES = (ROOT / "course/instructor_guide.md", ROOT / "course/README.md", ROOT / "docs/clusters.md")
UNIT = "unit_01"
NOTEBOOK = f"{UNIT}/{UNIT}.ipynb"
OPEN = "nearly_low"  # the unit's open question, of 4 points; the others together have 14
PATIENCE = 60.0
ROSTER = """\
id,first_name,last_name,email,lms_user_id
amina,Amina,Diallo,amina@example.org,4711
ben,Ben,Ito,ben@example.org,4712
chloe,Chloé,Roy,chloe@example.org,4713
"""


class Week:
    """A folder, the programs of the environment, and a person's own settings."""

    def __init__(self, place: Path, patch: pytest.MonkeyPatch) -> None:
        self.here, self.place = place / "desk", place
        self.exchange = place / "exchange"
        for name in ("desk", "home", "config", "exchange", "bin"):
            (place / name).mkdir()
        (place / "exchange").chmod(0o777)
        for name in ("nbgrader", "jupyter"):
            script = place / "bin" / name
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {name} "$@"\n')
            script.chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (place / "config" / "nbgrader_config.py").write_text(f"c.Exchange.root = {str(self.exchange)!r}\n")
        (place / "config" / "jupyter_server_config.py").write_text(
            f"c.ServerApp.port = {self.port}\nc.ServerApp.port_retries = 0\nc.ServerApp.open_browser = False\n"
            "c.ServerApp.allow_root = True\nc.ServerApp.disable_check_xsrf = True\nc.IdentityProvider.token = ''\n"
        )
        own = ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "LORA_FROM_SCRATCH_HOME")
        environment = {name: str(place / "home" / name) for name in own}
        environment |= {
            "HOME": str(place / "home"),
            "JUPYTER_CONFIG_DIR": str(place / "config"),
            "PYTHONPATH": str(ROOT),
        }
        environment["PATH"] = os.pathsep.join(
            (str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"])
        )
        for name, value in environment.items():
            patch.setenv(name, value)

    @property
    def root(self) -> Path:
        return self.place / "desk" / "teaching"

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a line in bash, and stay in the folder that it changes to; our own command in this process (quicker)."""
        words = shlex.split(command)
        if words[0] == "lora-from-scratch":
            with contextlib.chdir(self.here):
                return subprocess.CompletedProcess(words, *call(*words[1:]))
        left = self.place / "left"
        line = f"{command}\ncode=$?\npwd > {shlex.quote(str(left))}\nexit $code"
        done = subprocess.run(["bash", "-c", line], cwd=self.here, capture_output=True, text=True)
        self.here = Path(left.read_text().strip())
        return done

    def hand_in(self, learner: str, when: str, change: Callable[[dict[str, str]], None] | None, text: str = "") -> None:
        """Put work into the exchange, as `nbgrader submit` does for the account of a learner."""
        folder = self.exchange / "lora-from-scratch" / "inbound" / f"{learner}+{UNIT}+{when} UTC+{os.urandom(6).hex()}"
        folder.mkdir()
        (folder / "timestamp.txt").write_text(f"{when}.000000 UTC")
        (folder / "submission_secret.txt").write_text(os.urandom(64).hex())
        shutil.copy(self.root / "notebooks" / UNIT / f"{UNIT}.png", folder)
        if change is None:
            (folder / f"{UNIT}.ipynb").write_text(text)
        else:
            nbformat.write(self.notebook(change), folder / f"{UNIT}.ipynb")

    def notebook(self, change: Callable[[dict[str, str]], None]) -> nbformat.NotebookNode:
        """The released notebook with the solution's code; `change` gets the sources by grade_id."""
        solved = nbformat.read(self.root / "solutions" / NOTEBOOK, as_version=4)
        answers = {name: cell.source for cell in solved.cells if (name := answer_id(cell)) and cell.cell_type == "code"}
        change(answers)
        made = nbformat.read(self.root / "notebooks" / NOTEBOOK, as_version=4)
        for cell in made.cells:
            cell.source = answers.get(answer_id(cell), cell.source)
        return made

    @contextlib.contextmanager
    def gradebook(self) -> Iterator[Any]:
        with Gradebook(f"sqlite:///{self.root / 'gradebook.db'}") as gradebook:
            yield gradebook

    def report(self, suffix: str = ".md") -> str:
        return (self.root / "reports" / f"{UNIT}{suffix}").read_text()

    def table(self, name: str) -> list[list[str]]:
        with (self.here / name).open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))


def answer_id(cell: Any) -> str:
    said = cell.metadata.get("nbgrader", {})
    return str(said["grade_id"]) if said.get("solution") else ""


def nothing_else(_: dict[str, str]) -> None: ...


def wrong(answers: dict[str, str]) -> None:
    answers["rank"] = "def rank(*_, **__):\n    return 1"


def with_an_answer(answers: dict[str, str]) -> None:
    answers[OPEN] = "It is the *change* that has low rank."


@dataclass
class Step:
    """A command of the guide.

    Attributes:
        command: the line in the guide, without its comment.
        before: what others do before it.
        after: what the guide promises; it gets the week and the command's result.
        code: the exit code.
        skip: why it is not run here.
    """

    command: str
    before: Callable[[Week], None] | None = None
    after: Callable[[Week, subprocess.CompletedProcess[str]], None] | None = None
    code: int = 0
    skip: str = ""
    act: Callable[[Week, str], None] | None = field(default=None, kw_only=True)  # instead of running it to its end


def roster(week: Week) -> None:
    (week.here / "class.csv").write_text(ROSTER)


def is_enrolled(week: Week, _: Any) -> None:
    with week.gradebook() as gradebook:
        assert sorted(student.id for student in gradebook.students) == ["amina", "ben", "chloe", "dmitri"]
        assert gradebook.find_student("chloe").lms_user_id == "4713"


def has_a_due_date(week: Week, _: Any) -> None:
    with week.gradebook() as gradebook:
        assert gradebook.find_assignment(UNIT).duedate == datetime(2026, 6, 10, 12)


def is_the_committed_release(week: Week, _: Any) -> None:
    for path in sorted((ROOT / "notebooks" / UNIT).iterdir()):
        assert (week.root / "notebooks" / UNIT / path.name).read_bytes() == path.read_bytes()
    with week.gradebook() as gradebook:
        assert gradebook.find_assignment(UNIT).max_score == 18


def is_in_the_exchange(week: Week, _: Any) -> None:
    assert (week.exchange / "lora-from-scratch" / "outbound" / NOTEBOOK).is_file()


def write_a_notebook(week: Week) -> None:
    nbformat.write(week.notebook(with_an_answer), week.here / f"{UNIT}.ipynb")


def class_hands_in(week: Week) -> None:
    (week.here / f"{UNIT}.ipynb").unlink()
    week.hand_in("amina", "2026-06-10 11:00:00", with_an_answer)
    week.hand_in("ben", "2026-06-15 12:00:00", nothing_else)  # five days late
    week.hand_in("chloe", "2026-06-10 10:00:00", wrong)
    week.hand_in("dmitri", "2026-06-10 10:00:00", None, "{")


def is_collected(week: Week, _: Any) -> None:
    found = sorted(path.parts[-3] for path in week.root.glob(f"submitted/*/{NOTEBOOK}"))
    assert found == ["amina", "ben", "chloe", "dmitri"]


def is_graded(week: Week, done: subprocess.CompletedProcess[str]) -> None:
    assert "need a human: 2 (amina, dmitri)" in done.stdout
    text = week.report()
    assert f"open question to grade: {OPEN}" in text
    assert "1 point: what is right" in text  # the rubric
    assert "What you handed in is not a Jupyter notebook" in text
    assert "| 1 | rank |" in text  # a misconception
    assert "Graded in the sandbox (bubblewrap)" in text
    for learner in ("amina", "ben", "chloe", "dmitri"):
        page = week.root / "feedback" / learner / UNIT / f"{UNIT}.html"
        assert re.findall(r'<img[^>]*src="(?!data:)', page.read_text()) == []
    assert (week.root / "cohort.json").stat().st_mode & 0o077 == 0


def chloe_hands_in_again(week: Week) -> None:
    week.hand_in("chloe", "2026-06-11 08:00:00", nothing_else)  # a late day, of which she has three


def only_chloe_is_run(week: Week, done: subprocess.CompletedProcess[str]) -> None:
    assert "4 submissions, 1 graded now" in done.stdout


def grade_by_hand(week: Week, command: str) -> None:
    """Start JupyterLab and give points with the requests that the formgrader's page sends."""
    server = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=week.here,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError):
                rows = request(week, "submissions/" + UNIT)
                break
            assert server.poll() is None, "JupyterLab has ended"
            assert time.monotonic() < until, "JupyterLab does not answer"
            time.sleep(0.3)
        assert {row["student"]: row["needs_manual_grade"] for row in rows} == {
            "amina": True, "ben": False, "chloe": False, "dmitri": True,
        }  # fmt: skip
        with week.gradebook() as gradebook:
            submission = gradebook.find_submission_notebook(UNIT, UNIT, "amina").id
            grade = gradebook.find_grade(OPEN, UNIT, UNIT, "amina").id
            comment = gradebook.find_comment(OPEN, UNIT, UNIT, "amina").id
        with urllib.request.urlopen(f"http://127.0.0.1:{week.port}/formgrader/submissions/{submission}/") as page:
            assert "1 point: what is right" in page.read().decode()  # the rubric, below the answer
        request(week, f"grade/{grade}", {"manual_score": 3, "extra_credit": None})
        request(week, f"comment/{comment}", {"manual_comment": "Which rank does *nearly* mean?"})
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def request(week: Week, path: str, said: dict[str, Any] | None = None) -> Any:
    content = None if said is None else json.dumps(said).encode()
    address = f"http://127.0.0.1:{week.port}/formgrader/api/{path}"
    head, method = {"Content-Type": "application/json"}, "PUT" if said else "GET"
    asked = urllib.request.Request(address, content, head, method=method)
    with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
        return json.loads(answer.read() or b"null")


def feedback_has_the_comment(week: Week, done: subprocess.CompletedProcess[str]) -> None:
    assert "0 graded now" in done.stdout
    assert "need a human: 1 (dmitri)" in done.stdout
    page = (week.root / "feedback" / "amina" / UNIT / f"{UNIT}.html").read_text()
    assert "Which rank does" in page
    assert "(Score: 17.0 / 18.0)" in page
    with week.gradebook() as gradebook:
        late = {one.student.id: one.late_submission_penalty for one in gradebook.assignment_submissions(UNIT)}
    # Ben's five late days: three are free, two cost 20 % each of his 14 points. Chloé's one is free.
    assert late == pytest.approx({"amina": 0, "ben": 5.6, "chloe": 0, "dmitri": 0})


def similar_is_written(week: Week, _: Any) -> None:
    assert {"amina", "ben", "chloe"} <= set(re.findall(r"\w+", week.report("-similar.html")))


def teaching_has_no_names(week: Week, _: Any) -> None:
    text = week.report("-teaching.html").casefold()
    assert [name for name in ("amina", "ben", "chloe", "dmitri") if re.search(rf"\b{name}\b", text)] == []


def feedback_is_in_the_exchange(week: Week, _: Any) -> None:
    pages = [path.read_text() for path in (week.exchange / "lora-from-scratch" / "feedback").glob("*.html")]
    assert len(pages) == 4
    assert sum("Which rank does" in page for page in pages) == 1


def exported(week: Week, done: subprocess.CompletedProcess[str]) -> None:
    head, *rows = week.table("grades.csv")
    scores = {row[head.index("student_id")]: row[head.index("score")] for row in rows}
    assert {name: score and float(score) for name, score in scores.items()} == FINAL
    assert "1 submissions still need a person" in done.stderr


def exported_for_canvas(week: Week, _: Any) -> None:
    _, possible, *rows = week.table("canvas.csv")
    assert (possible[-1], {row[3]: row[-1] and float(row[-1]) for row in rows}) == ("18", FINAL)
    assert rows[0][:2] == ["Diallo, Amina", "4711"]


def exported_for_moodle(week: Week, _: Any) -> None:
    assert {row[3]: row[-1] and float(row[-1]) for row in week.table("moodle.csv")[1:]} == FINAL


def exported_for_lti(week: Week, done: subprocess.CompletedProcess[str]) -> None:
    found = {path.stem: json.loads(path.read_text()) for path in (week.here / "scores" / UNIT).glob("*.json")}
    assert {name: said["scoreGiven"] for name, said in found.items()} == {"4711": 17, "4712": 8.4, "4713": 14}
    assert "no LTI user id (nbgrader's lms_user_id) is known of: dmitri" in done.stderr


FINAL = {"amina": 17, "ben": 8.4, "chloe": 14, "dmitri": ""}
EXPORT = "nbgrader export --exporter=lora_from_scratch.grading"
WEEK = [
    Step("make install-course", skip="it installs packages from the network"),
    Step("source .venv/bin/activate", skip="the environment of the tests is used"),
    Step("lora-from-scratch doctor --instructor"),
    Step("lora-from-scratch course teaching"),
    Step("cd teaching/course"),
    Step("nbgrader db student import class.csv", roster),
    Step("nbgrader db student add dmitri --first-name Dmitri --last-name Orlov", after=is_enrolled),
    Step(f"nbgrader db assignment add {UNIT} --duedate '2026-06-10 14:00 Europe/Oslo'", after=has_a_due_date),
    Step(f"nbgrader generate_assignment {UNIT} --force", after=is_the_committed_release),
    Step(f"nbgrader release_assignment {UNIT}", after=is_in_the_exchange),
    Step(f"lora-from-scratch check-submission {UNIT}.ipynb", write_a_notebook),
    Step(f"nbgrader collect {UNIT}", class_hands_in, is_collected),
    Step("lora-from-scratch grade 01", after=is_graded, code=1),
    Step(f"nbgrader collect {UNIT} --update", chloe_hands_in_again),
    Step("lora-from-scratch grade 01", after=only_chloe_is_run, code=1),
    Step("jupyter lab --ServerApp.root_dir=..", act=grade_by_hand),
    Step("lora-from-scratch grade 01", after=feedback_has_the_comment, code=1),
    Step("lora-from-scratch similar 01", after=similar_is_written),
    Step("lora-from-scratch teaching 01", after=teaching_has_no_names),
    Step(f"nbgrader release_feedback {UNIT}", after=feedback_is_in_the_exchange),
    Step("nbgrader export --to grades.csv", after=exported),
    Step(f"{EXPORT}.exporters.CanvasExport --to canvas.csv", after=exported_for_canvas),
    Step(f"{EXPORT}.exporters.MoodleExport --to moodle.csv", after=exported_for_moodle),
    Step(f"{EXPORT}.platforms.lti.LtiExport --to scores", after=exported_for_lti),
]


def commands(guide: Path) -> list[str]:
    """The lines of the guide's bash blocks, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", guide.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = (re.sub(r"\s+# .*", "", line).strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


def test_the_guides_commands_are_those_that_are_tried() -> None:
    assert commands(GUIDES[0]) == [step.command for step in WEEK]


@needs_bubblewrap
def test_the_week_can_be_followed_to_the_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    week = Week(tmp_path, monkeypatch)
    for number, step in enumerate(WEEK):
        if step.skip:
            continue
        if step.before:
            step.before(week)
        if step.act:
            step.act(week, step.command)
            continue
        done = week.run(step.command)
        said = f"step {number}, {step.command}: {done.stdout[-1500:]}{done.stderr[-2500:]}"
        assert done.returncode == step.code, said
        assert "Traceback" not in done.stderr, said
        assert "Skipping" not in done.stderr, said
        if step.after:
            step.after(week, done)


def mentioned(guide: Path, program: str) -> list[str]:
    """The calls of a program in a document: in blocks, in the text, in tables; without what bash adds to them."""
    text = re.sub(r"(?m)^```.*$", "", guide.read_text(encoding="utf-8"))
    inline = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text)]
    indented = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    call = re.compile(rf"(?:^|(?<=[ /'])){program} [a-z](?:[^#&;|'`]|'[^']*')*")
    return sorted({found[0].strip() for line in (*inline, *indented) if (found := call.search(line))})


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_every_command_that_a_guide_mentions_exists(guide: Path) -> None:
    from nbgrader.apps.nbgraderapp import NbGraderApp

    from lora_from_scratch.cli import build_parser

    calls = {program: mentioned(guide, program) for program in ("nbgrader", "lora-from-scratch")}
    assert calls["lora-from-scratch"]
    for line in calls["nbgrader"]:
        assert line.split()[1] in NbGraderApp.subcommands, line
    parser = build_parser()
    for line in calls["lora-from-scratch"]:
        words = shlex.split(re.sub(r"\$\(\(.*?\)\)|\$\w+", "1", line))[1:]
        if len(words) > 1:
            try:
                parser.parse_args(words)
            except ValueError as error:
                pytest.fail(f"{line}: {error}")
