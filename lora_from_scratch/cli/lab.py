"""`lora-from-scratch lab`: open JupyterLab on your own copy of the course's notebooks."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from lora_from_scratch.support.allocator import quick_allocator

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
NOT_INSTALLED = "JupyterLab is not installed; run: python -m pip install -e '.[course]' -c constraints.txt"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "lab",
        help="open JupyterLab on the course's notebooks",
        description="Copy the course's notebooks into your own folder and open JupyterLab on one of them. Only missing "
        "notebooks are copied; your work is never overwritten.",
    )
    parser.add_argument("--unit", default="00", metavar="NN", help="the unit to open (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("work"), help="the folder for your notebooks (default: %(default)s)"
    )
    parser.add_argument("--no-browser", action="store_true", help="only start the server and print its address")
    parser.add_argument("--port", type=int, help="the server's port (default: chosen by Jupyter)")
    return parser


def run(options: argparse.Namespace) -> int:
    """Replace this process by JupyterLab.

    Raises:
        ValueError: there is no such unit.
        OSError: there are no notebooks here, or the folder cannot be written to.
        ImportError: JupyterLab is not installed.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise ImportError(NOT_INSTALLED)
    new = copy_notebooks(NOTEBOOKS, options.folder)
    notebook = find_notebook(options.folder, options.unit)
    print(
        f"{new} new notebooks in {options.folder}." if new else f"Your notebooks are in {options.folder}.", flush=True
    )
    command = lab_command(options.folder, notebook, options.no_browser, options.port)
    with quick_allocator():  # for the notebooks' kernels, which train
        os.execv(command[0], command)


def copy_notebooks(source: Path, folder: Path) -> int:
    """Copy the files that `folder` does not have yet; return how many of them are notebooks.

    Raises:
        OSError: there is nothing to copy, or the folder cannot be written to.
    """
    files = [file for file in sorted(source.rglob("*")) if file.is_file() and ".ipynb_checkpoints" not in file.parts]
    if not files:
        raise FileNotFoundError(f"there are no notebooks in {source}; run this in a clone of the repository")
    new = 0
    for file in files:
        copy = folder / file.relative_to(source)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            new += file.suffix == ".ipynb"
    return new


def find_notebook(folder: Path, unit: str) -> Path:
    """The notebook of a unit.

    Raises:
        ValueError: there is no such unit.
    """
    number = unit.lower().removeprefix("unit").strip("_ ").zfill(2)
    found = sorted(file for file in folder.rglob("unit_*.ipynb") if ".ipynb_checkpoints" not in file.parts)
    for file in found:
        if file.stem.startswith(f"unit_{number}"):
            return file
    names = ", ".join(file.stem.removeprefix("unit_") for file in found)
    raise ValueError(f"there is no unit {unit} in {folder}; there are {names}")


def lab_command(folder: Path, notebook: Path, no_browser: bool = False, port: int | None = None) -> list[str]:
    """The command that starts JupyterLab with this Python, so that it uses this Python's kernel."""
    command = [sys.executable, "-m", "jupyter", "lab", os.fspath(notebook), f"--ServerApp.root_dir={folder.resolve()}"]
    command += ["--no-browser"] if no_browser else []
    command += [f"--port={port}"] if port else []
    root = hasattr(os, "geteuid") and os.geteuid() == 0  # as in a container; without the flag Jupyter refuses to start
    return command + (["--allow-root"] if root else [])
