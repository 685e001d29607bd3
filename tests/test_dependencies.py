"""A solved notebook is executed again when something that its outputs depend on has changed, and only then."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from lora_from_scratch.checks.units import find, unit_files, units
from lora_from_scratch.cli import main
from lora_from_scratch.grading.building import build, dependencies
from lora_from_scratch.grading.building.dependencies import Hashes, closure, code_of
from lora_from_scratch.grading.building.execution import Cost
from tests.tiny_course import ROOT, enter_course

CODE = '"""Module."""\nimport torch\n\n\ndef f(x):\n    """Add."""\n    # why\n    return {"a": x + 1}\n'
FOLDER = "lora_from_scratch"
ASIDE = ("in_room.py", "translation.py")  # imported, but without effect on what a notebook prints


# --- Code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Add."""', '"""Add one.\n\n    Always."""'),
        ('    """Add."""\n', ""),
        ('"""Module."""', '"""Of modules."""'),
        ("# why", "# because"),
        ('{"a": x + 1}', "{\n        'a': (x + 1),\n    }"),
    ],
)
def test_comments_docstrings_and_layout_are_not_code(old: str, new: str) -> None:
    assert old in CODE
    assert code_of(CODE.replace(old, new)) == code_of(CODE)


def test_when_to_use_a_method_is_not_code() -> None:
    one = 'class M:\n    name: ClassVar[str] = "m"\n    use_when: ClassVar[str] = "it rains"\n'
    assert code_of(one) == code_of(one.replace("it rains", "the sun shines")) != code_of(one.replace('"m"', '"n"'))
    assert code_of(one) == code_of("\n".join(one.splitlines()[:2]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x + 1", "x + 2"),
        ("x + 1", "x + 1.0"),
        ("x + 1", "x + True"),
        ('"a"', '"b"'),
        ("def f(x)", "def f(x=None)"),
        ("# why", 'x = x or "why"'),
        ("import torch", "from torch import nn"),
    ],
)
def test_anything_else_is(old: str, new: str) -> None:
    assert old in CODE
    assert code_of(CODE.replace(old, new)) != code_of(CODE)


def test_what_is_no_plain_python_counts_as_text() -> None:
    assert code_of("%time f()  # one") != code_of("%time f()  # two")


# --- Files ---------------------------------------------------------------------------------------------


def names(files: set[Path]) -> set[str]:
    return {path.relative_to(dependencies.PACKAGE).as_posix() for path in files}


def test_imports_are_followed_through_the_library_but_not_those_of_annotations() -> None:
    found = names(closure(["def f():\n    from lora_from_scratch.linear_algebra import rank"]))
    assert found == {"__init__.py", "linear_algebra/__init__.py", "linear_algebra/rank.py"}
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lora_from_scratch.gpt2.model"
    assert closure([typed]) == set()
    assert "gpt2/model.py" in names(closure(["import lora_from_scratch.methods.lora"]))


def test_of_the_methods_those_count_that_are_named_and_all_where_all_are_asked_for() -> None:
    start = "from lora_from_scratch.finetune.defaults import learning_rate_for\n"
    methods = {name for name in names(closure([start + 'learning_rate_for("bitfit", config)'])) if "methods/" in name}
    assert "methods/bitfit.py" in methods
    assert not methods & {"methods/prompt_tuning.py", "methods/qlora.py"}
    everything = names(closure(["from lora_from_scratch.compare.shootout import contestants"]))
    assert {"methods/bitfit.py", "methods/prompt_tuning.py", "methods/qlora.py"} <= everything


@pytest.mark.parametrize("number", ["09", "14"])
def test_every_file_that_a_unit_loads_is_followed(number: str) -> None:
    """Against Python itself; the registry and the list of units load more than a unit asks for."""
    source = (ROOT / build.SOURCES / f"unit_{number}.py").read_text(encoding="utf-8")
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    checks = unit_files("exercises.py", f"unit_{number}")[0]
    code = ["import sys", *map(ast.unparse, imports), f"import lora_from_scratch.checks.unit_{number}.exercises"]
    code.append(f"print([m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == {FOLDER!r}])")
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=True)
    loaded = {Path(file) for file in ast.literal_eval(done.stdout)}
    assert len(loaded) > 30
    by_name = {path for path in loaded if path.parent.name in ("methods", "room") or path.name in ASIDE}
    followed = closure([source, checks.read_text(encoding="utf-8"), dependencies.RUNS_IT]) | {checks}
    assert loaded - by_name - followed <= {checks.with_name("__init__.py")}


# --- Hashes --------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the library, to be changed, in the place of the library."""
    copied = tmp_path / FOLDER
    shutil.copytree(ROOT / FOLDER, copied, ignore=shutil.ignore_patterns("__pycache__", "model.safetensors"))
    (copied / "assets/gpt2/model.safetensors").write_bytes(b"weights")
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    monkeypatch.setattr(dependencies, "PACKAGE", copied)
    monkeypatch.setattr(dependencies, "_of_file", dependencies._of_file.__wrapped__)
    return copied


def hashes_of(source: str, root: Path) -> Hashes:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    return dependencies.hashes(find("rank")[0], notebook, root)


def edit(file: Path, change: Callable[[str], str]) -> None:
    text = file.read_text(encoding="utf-8")
    assert change(text) != text
    file.write_text(change(text), encoding="utf-8")


EDITS: dict[str, tuple[str, Callable[[str], str], set[str]]] = {
    "a comment": ("gpt2/model.py", lambda text: text + "# the end\n", set()),
    "a file that it imports": ("gpt2/model.py", lambda text: text + "END = 1\n", {"library"}),
    "another unit's exercises": ("checks/unit_02/exercises.py", lambda text: text + "END = 1\n", set()),
    "a file that it does not import": ("serving/batched_lora.py", lambda text: text + "END = 1\n", set()),
    "the model": ("assets/gpt2/vocab.json", lambda text: text + " ", {"assets"}),
    "the model's card": ("assets/gpt2/README.md", lambda text: text + " ", set()),
    "torch's version": ("../constraints.txt", lambda text: text.replace("\ntorch==", "\ntorch==1"), {"packages"}),
    "a tool's version": ("../constraints.txt", lambda text: text.replace("\nruff==", "\nruff==1"), set()),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_hash_changes_with_what_the_outputs_depend_on(package: Path, what: str) -> None:
    file, change, expected = EDITS[what]
    source = "from lora_from_scratch.gpt2 import load_gpt2"
    before = hashes_of(source, package.parent)
    edit(package / file, change)
    after = hashes_of(source, package.parent)
    assert {name for name in before if before[name] != after[name]} == expected


def test_the_processor_is_recorded_and_is_no_reason_to_execute(package: Path) -> None:
    now = hashes_of("import torch", package.parent)
    assert now["processor"]
    assert dependencies.changed(now | {"processor": "another"}, now) == []
    assert dependencies.changed(now | {"cells": "another"}, now) == ["its code cells have changed"]
    assert dependencies.changed(None, now) == ["it has never been executed"]


def test_where_a_cell_shows_source_text_a_comment_counts(package: Path) -> None:
    source = "import inspect\nfrom lora_from_scratch.gpt2 import load_gpt2\nprint(inspect.getsource(load_gpt2))"
    before = hashes_of(source, package.parent)
    edit(package / "gpt2/model.py", lambda text: text + "# the end\n")
    assert hashes_of(source, package.parent)["library"] != before["library"]


# --- Building ------------------------------------------------------------------------------------------


@pytest.fixture
def course(built_course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny course, built, in which executing anything is an error."""
    root = shutil.copytree(built_course, tmp_path / "course")
    monkeypatch.setattr(build, "execute", not_now)
    return root


class Executed(Exception):  # noqa: N818
    pass


def not_now(notebook: Any, **options: Any) -> None:
    raise Executed


def solved(root: Path) -> nbformat.NotebookNode:
    return nbformat.read(root / "solutions/unit_99/unit_99.ipynb", as_version=4)


def rebuild(root: Path, monkeypatch: pytest.MonkeyPatch) -> build.Built:
    return build.build(enter_course(root, monkeypatch), root)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("course/units/unit_99.py", "A story about roots.", "Another story."),
        ("course/units/unit_99.py", "fn = working", "# a comment\nfn = working"),
        ("library/tiny_library.py", "The square root of x, times four.", "Four times the square root of x."),
        ("library/tiny_library.py", "# This comment belongs", "# This remark belongs"),
    ],
)
def test_a_change_of_text_is_built_without_executing(
    course: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str
) -> None:
    before = solved(course)
    edit(course / file, lambda text: text.replace(old, new))
    built = rebuild(course, monkeypatch)
    assert (built.why, built.cost) == ([], None)
    after = solved(course)
    assert new.splitlines()[-1] in "\n".join(cell.source for cell in after.cells)
    outputs = [[cell.outputs for cell in one.cells if cell.cell_type == "code"] for one in (before, after)]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("course/units/unit_99.py", "[9.0]", "[16.0]"),
        ("library/tiny_library.py", "(self.count + 1)", "(1 + self.count)"),
        ("units/unit_99/exercises.py", '"to 3", {"largest": 3', '"to 2", {"largest": 2'),
    ],
)
def test_a_change_of_code_is_executed(
    course: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str
) -> None:
    edit(course / file, lambda text: text.replace(old, new))
    with pytest.raises(Executed):
        rebuild(course, monkeypatch)


def test_a_solved_notebook_that_somebody_has_edited_is_executed(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(course / "solutions/unit_99/unit_99.ipynb", lambda text: text.replace("[9.0]", "[25.0]"))
    with pytest.raises(Executed):
        rebuild(course, monkeypatch)


def test_it_is_executed_when_somebody_asks_for_it(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Executed):
        build.build(enter_course(course, monkeypatch), course, again=True)


def test_every_unit_has_its_hashes_recorded() -> None:
    assert sorted(dependencies.recorded(ROOT)) == [f"unit_{unit.number}" for unit in units()]


# --- The command ---------------------------------------------------------------------------------------


def test_the_command_says_what_it_runs_and_why_and_what_it_shows_now(
    course: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = enter_course(course, monkeypatch)
    monkeypatch.setattr(build, "units", lambda: (unit,))
    command = ["build", "99", "--root", str(course)]
    assert main(command) == 0
    not_run = "unit 99: written, but not run: nothing that its outputs depend on has changed\n"
    assert capsys.readouterr().out == not_run

    def as_before(notebook: Any, building: bool = True, settings: Any = None) -> Cost:
        """Runs nothing: every cell shows what it showed, but one."""
        if building:
            build.keep_outputs(notebook, solved(course))
            cell = next(cell for cell in notebook.cells if cell.source.startswith("fn = "))
            cell.outputs[-1].text = "tensor([13.])\n"
        return Cost(300, 12)

    monkeypatch.setattr(build, "execute", as_before)
    monkeypatch.setattr(build, "run_unsolved", lambda made: None)
    assert main([*command, "--again"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "unit 99: run, because it was requested; 12 s of CPU time, 300 MiB"
    assert said[1].startswith("  the output has changed: course/units/unit_99.py, cell ")
    assert said[1].endswith("before: 'tensor([12.], dtype=torch.float64)'; now: 'tensor([13.])'")
    edit(course / "solutions/executed.json", lambda text: text.replace('"packages": "', '"packages": "0'))
    assert main(command) == 0
    assert "run, because the version of a package has changed" in capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out == not_run


def test_units_are_looked_at_in_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "00", "01", "--check", "--jobs", "2", "--root", str(ROOT)]) == 0
    said = sorted(capsys.readouterr().out.splitlines())
    assert said == [f"unit {number}: no problems in the source" for number in ("00", "01")]
