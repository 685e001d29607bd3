"""`lora-from-scratch lab`: open JupyterLab on your own copy of the course's notebooks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

from lora_from_scratch.support.allocator import quick_allocator
from lora_from_scratch.support.course_files import Copied, copy_unchanged, course_files, install_command
from lora_from_scratch.support.files import write_atomically
from lora_from_scratch.support.translated_files import files_in
from lora_from_scratch.support.translation import LANGUAGES, VARIABLE, language, translate

CONFIGURATION = Path(__file__).resolve().parents[1] / "assets" / "lab"  # JupyterLab without nbgrader's buttons
CONTENTS = "Units.md"  # in the learner's folder: the units with their titles
NOTEBOOKS = course_files() / "notebooks"
NOT_INSTALLED = f"JupyterLab is not installed; run: {install_command('[course]')}"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "lab",
        help="open JupyterLab on the course's notebooks",
        description="Copy the course's notebooks into your own folder and open JupyterLab on one of them. Missing "
        "notebooks are added, and those that you have not changed are brought up to date; your work is never "
        f"overwritten. {CONTENTS} in that folder lists the units.",
    )
    parser.add_argument("--unit", default="00", metavar="NN", help="the unit to open (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("work"), help="the folder for your notebooks (default: %(default)s)"
    )
    parser.add_argument(
        "--language",
        choices=sorted(LANGUAGES),
        default=language(),
        help="the language of the notebooks and of their checks: en (English) or zh (Chinese; unit 26 "
        f"is in English); default: that of {VARIABLE}, or en",
    )
    parser.add_argument("--no-browser", action="store_true", help="only start the server and print its address")
    parser.add_argument("--port", type=int, help="the server's port (default: chosen by Jupyter)")
    return parser


def run(options: argparse.Namespace) -> int:
    """Replace this process by JupyterLab (on Windows: run it and wait).

    Raises:
        ValueError: there is no such unit.
        OSError: there are no notebooks here, or the folder cannot be written to.
        ImportError: JupyterLab is not installed.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise ImportError(NOT_INSTALLED)
    copied = copy_notebooks(options.folder, options.language)
    notebook = find_notebook(options.folder, options.unit)
    write_contents(options.folder, options.language)
    print("\n".join(report(copied, options.folder, options.language)), flush=True)
    command = lab_command(options.folder, notebook, options.no_browser, options.port)
    found = os.environ.get("JUPYTER_CONFIG_PATH")
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join([os.fspath(CONFIGURATION), *([found] if found else [])])
    with quick_allocator():  # for the notebooks' kernels, which train
        if os.name == "nt":  # where `execv` returns to the shell at once
            return subprocess.run(command).returncode
        os.execv(command[0], command)


def copy_notebooks(folder: Path, into: str) -> Copied:
    """Copy the notebooks in a language into the learner's folder; see `copy_unchanged`.

    Raises:
        OSError: there are no notebooks here, or the folder cannot be written to.
        ImportError: Babel, which reads the translations, is not installed.
    """
    with files_in(into, NOTEBOOKS) as source:
        return copy_unchanged(source, folder)


def report(copied: Copied, folder: Path, into: str) -> list[str]:
    """What was copied, as lines for the learner in a language."""
    new, updated, kept = ([Path(name).stem for name in names if name.endswith(".ipynb")] for names in copied)
    lines = [f"{len(new)} new notebooks in {folder}."] if new else [f"Your notebooks are in {folder}."]
    if updated:
        lines.append(f"Brought up to date, as you had not changed them: {', '.join(updated)}.")
    if kept:
        lines.append(
            f"There is a newer version of {', '.join(kept)}; your own was kept. To get the new one, rename yours and "
            "run this again."
        )
    return [translate(line, into) for line in lines]


def write_contents(folder: Path, into: str) -> None:
    """Write the units of `folder` with their titles, each a link to its notebook."""
    lines = [f"- [{title_of(file)}]({file.relative_to(folder).as_posix()})" for file in notebooks_in(folder)]
    text = "\n".join([translate("# The units", into), "", *lines, ""])
    write_atomically(folder / CONTENTS, lambda place: place.write_text(text, encoding="utf-8"))


def title_of(notebook: Path) -> str:
    """The title in a notebook's first cell ("Unit 01: Rank"); the name of the file if there is none."""
    try:
        source = json.loads(notebook.read_bytes())["cells"][0]["source"]
        heading = "".join(source).splitlines()[0]
    except (OSError, ValueError, LookupError, TypeError):
        return notebook.stem
    return heading.removeprefix("# ") if heading.startswith("# ") else notebook.stem


def notebooks_in(folder: Path) -> list[Path]:
    """The units' notebooks in a folder, in order."""
    return sorted(file for file in folder.rglob("unit_*.ipynb") if ".ipynb_checkpoints" not in file.parts)


def find_notebook(folder: Path, unit: str) -> Path:
    """The notebook of a unit.

    Raises:
        ValueError: there is no such unit.
    """
    number = unit.lower().removeprefix("unit").strip("_ ").zfill(2)
    found = notebooks_in(folder)
    for file in found:
        if file.stem.startswith(f"unit_{number}"):
            return file
    names = ", ".join(file.stem.removeprefix("unit_") for file in found)
    raise ValueError(f"there is no unit {unit} in {folder}; there are {names}")


def lab_command(folder: Path, notebook: Path, no_browser: bool = False, port: int | None = None) -> list[str]:
    """The command that starts JupyterLab with this Python, so that it uses this Python's kernel."""
    root = folder.resolve()
    opened = quote(notebook.resolve().relative_to(root).as_posix())
    command = [sys.executable, "-m", "jupyter", "lab", f"--ServerApp.root_dir={root}"]
    command += [f"--LabApp.default_url=/lab/tree/{opened}"]  # also in the address that is printed
    command += ["--no-browser"] if no_browser else []
    command += [f"--port={port}"] if port else []
    superuser = hasattr(os, "geteuid") and os.geteuid() == 0  # as in a container, where Jupyter needs the flag
    return command + (["--allow-root"] if superuser else [])
