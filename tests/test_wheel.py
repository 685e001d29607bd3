"""The wheel carries the course: everything works in an environment and a folder that know nothing of the clone."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
INPUTS = ("lora_from_scratch", "notebooks", "solutions", "course", "docs")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")


class Installed:
    """An environment with the wheel in it; the other packages come from this one."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.away = place / "away"
        self.away.mkdir()
        self.dist = place / "dist"
        self._build()
        venv.create(place / "venv")
        self.bin = place / "venv" / "bin"
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(place / "venv")}))
        (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
        [wheel] = self.dist.glob("*.whl")
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", "--no-compile", str(wheel)], check=True, capture_output=True)

    def _build(self) -> None:
        clone = self.place / "clone"
        for name in INPUTS:
            shutil.copytree(
                ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            )
        for name in FILES:
            shutil.copy(ROOT / name, clone)
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(self.dist), str(clone)]
        subprocess.run(build, check=True, capture_output=True)
        shutil.rmtree(clone)

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment's `bin` in a folder outside any clone."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"LORA_FROM_SCRATCH_HOME": str(self.away / "home"), "OMP_NUM_THREADS": "1"}
        environment["PATH"] = os.pathsep.join([str(self.bin), str(Path(sys.executable).parent), os.environ["PATH"]])
        words = [str(self.bin / str(command[0])), *map(str, command[1:])]
        return subprocess.run(words, cwd=self.away, env=environment, capture_output=True, text=True)

    def output_of(self, *command: object) -> str:
        done = self.run("lora-from-scratch", *command)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    pytest.importorskip("build")
    pytest.importorskip("jupyterlab")
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_is_used_and_not_the_clone(installed: Installed) -> None:
    done = installed.run("python", "-c", "import lora_from_scratch; print(lora_from_scratch.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(installed.place / "venv")


def test_the_wheel_and_the_source_distribution_are_small_enough_and_hold_the_units(installed: Installed) -> None:
    [wheel], [sdist] = installed.dist.glob("*.whl"), installed.dist.glob("*.tar.gz")
    assert max(wheel.stat().st_size, sdist.stat().st_size) < 25_000_000
    with tarfile.open(sdist) as content:
        names = [name.partition("/")[2] for name in content.getnames()]
    assert {"notebooks/unit_09/unit_09.ipynb", "course/units/unit_09.py", "setup.py", "constraints.txt"} <= set(names)
    assert not [name for name in names if name.endswith(".pyc") or "checkpoints" in name]


@pytest.mark.parametrize("address", ["", "https://github.com/ada/course"])
def test_the_package_index_shows_no_relative_link(address: str, tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "lora_from_scratch").mkdir()
    server, _, repository = address.rpartition("/ada/")
    known = {"GITHUB_SERVER_URL": server, "GITHUB_REPOSITORY": repository and f"ada/{repository}"}
    command = [sys.executable, "setup.py", "--quiet", "egg_info"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | known, check=True, capture_output=True)
    said = Path(tmp_path, "lora_from_scratch.egg-info", "PKG-INFO").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^()\s]+)\)", said)
    assert [target for target in targets if not target.startswith("https://")] == []
    assert "# LoRA from scratch" in said
    assert "The [atlas]" in said if address else "The atlas" in said
    assert (f"{address}/raw/HEAD/docs/demo.png" in targets) == bool(address)
    assert (f"Project-URL: Source, {address}" in said) == bool(address)


def test_a_learner_gets_notebooks_in_a_folder_of_their_own(installed: Installed) -> None:
    script = "from lora_from_scratch.cli import lab, main; lab.os.execv = lambda *command: print(command); "
    done = installed.run("python", "-c", script + "main(['lab', '--no-browser', '--unit', '9'])")
    assert done.returncode == 0, done.stderr
    assert "new notebooks in work." in done.stdout
    assert "unit_09.ipynb" in done.stdout
    mine = installed.away / "work" / "unit_09" / "unit_09.ipynb"
    assert mine.read_bytes() == (ROOT / "notebooks" / "unit_09" / "unit_09.ipynb").read_bytes()
    checked = installed.run("lora-from-scratch", "check-submission", mine)
    assert (checked.returncode, "not written yet" in checked.stdout) == (1, True), checked.stderr


def test_progress_and_the_model_are_there(installed: Installed) -> None:
    assert "00 Start here" in installed.output_of("progress")
    assert "hero[" in installed.output_of("generate", "--help")
    said = installed.run("lora-from-scratch", "doctor").stdout
    assert "ok       bundled model" in said


@pytest.mark.slow  # grading is tested elsewhere
def test_an_instructor_gets_a_course_that_can_be_graded(installed: Installed) -> None:
    teach = installed.away / "teach"
    assert "new and 0 updated files" in installed.output_of("course", teach)
    (teach / "course" / "syllabus.md").write_text("mine")
    assert "0 new and 0 updated" in installed.output_of("course", teach)
    assert (teach / "course" / "syllabus.md").read_text() == "mine"
    submitted = teach / "submitted" / "ada" / "unit_00"
    submitted.mkdir(parents=True)
    shutil.copy(ROOT / "solutions" / "unit_00" / "unit_00.ipynb", submitted)
    graded = installed.run("lora-from-scratch", "grade", "00", "--course", teach, "--isolation", "none", "--workers", 1)
    assert graded.returncode in (0, 1), graded.stderr  # 1: an open question is waiting for a person
    assert "1 submissions, 1 graded now" in graded.stdout
    assert (teach / "reports" / "unit_00.html").is_file()
