"""`lora-from-scratch doctor`: diagnose this installation and say how to fix it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lora_from_scratch.support.course_files import install_command

MINIMUM_PYTHON = (3, 11)
MINIMUM_DISK = 500e6  # bytes of free space for runs, with a margin
REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "tqdm", "matplotlib", "sacrebleu")
COURSE = ("jupyterlab", "ipykernel", "ipywidgets")
GRADING = ("jupytext", "nbclient", "nbgrader", "nh3")
INSTALL, INSTALL_COURSE = install_command(), install_command("[course]")
WIDGETS = Path("labextensions/@jupyter-widgets/jupyterlab-manager/package.json")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "doctor",
        help="diagnose this installation",
        description="Check this installation and say how to fix what is wrong.",
    )
    parser.add_argument("--instructor", action="store_true", help="also check what building and grading units needs")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print one line per check; return exit code 1 if any check failed."""
    healthy = True
    for name, check in (CHECKS | (FOR_INSTRUCTORS if options.instructor else {})).items():
        try:
            print(f"ok       {name:<14} {check()}")
        except Exception as error:  # whatever goes wrong is what has to be reported
            healthy = False
            print(f"PROBLEM  {name:<14} {' '.join(str(error).split())}")
    print("\nNo problems found." if healthy else "\nFix what is marked PROBLEM and run this again.")
    return 0 if healthy else 1


def _python() -> str:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < MINIMUM_PYTHON:
        raise RuntimeError(f"{found} is too old; create an environment with 3.11 or newer: python3.11 -m venv .venv")
    return found


def _packages() -> str:
    _require(REQUIRED, INSTALL)
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in REQUIRED[:4])


def _torch() -> str:
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"{error}; run: {INSTALL}") from None
    left, right = torch.eye(64).bfloat16(), torch.ones(64, 64).bfloat16()
    if not torch.equal(left @ right, right):
        again = "python -m pip install --force-reinstall --no-deps torch -c constraints.txt"
        raise RuntimeError(f"a bf16 matrix product gives a wrong result; reinstall torch: {again}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU (none is needed)"
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {gpu}"


def _bundled_model() -> str:
    from lora_from_scratch.gpt2.checkpoint import load_gpt2

    try:
        model, tokenizer = load_gpt2("bundled")
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{error}; install the library again: {INSTALL} --force-reinstall --no-deps") from None
    size = sum(p.numel() for p in model.parameters())
    return f"{size:,} parameters, {tokenizer.vocab_size:,} tokens"


def _course() -> str:
    _require(COURSE, INSTALL_COURSE)
    return f"jupyterlab {importlib.metadata.version('jupyterlab')}"


def _kernel() -> str:
    """JupyterLab's kernel "python3" must run this Python, the one with the library."""
    fix = "python -m ipykernel install --sys-prefix"
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError:
        raise RuntimeError(f"jupyter_client is missing; run: {INSTALL_COURSE}") from None
    try:
        specification = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        raise RuntimeError(f'JupyterLab has no kernel "python3"; run: {fix}') from None
    started = Path(specification.argv[0])
    if not started.is_absolute():  # Jupyter replaces it with its own Python, which is this one
        return f"python3 starts {sys.executable}"
    if not started.exists():
        raise RuntimeError(f'the kernel "python3" starts {started}, which does not exist; run: {fix}')
    # Compare the environment, not the file: `python` and `python3.11` of one environment are the same interpreter.
    if started.parent.resolve() != Path(sys.executable).parent.resolve():
        raise RuntimeError(f'the kernel "python3" starts {started}, not {sys.executable}; run: {fix}')
    return f"python3 starts {started}"


def _widgets() -> str:
    """The sliders need a package in the kernel and an extension in JupyterLab."""
    _require(("ipywidgets", "jupyterlab_widgets"), INSTALL_COURSE)
    places = [Path(sys.prefix) / "share/jupyter"]
    try:
        from jupyter_core.paths import jupyter_path

        places = [Path(place) for place in jupyter_path()]
    except ImportError:
        pass
    if not any((place / WIDGETS).exists() for place in places):
        again = "python -m pip install --force-reinstall --no-deps jupyterlab_widgets -c constraints.txt"
        raise RuntimeError(f"JupyterLab cannot find the extension that shows sliders; run: {again}")
    return f"ipywidgets {importlib.metadata.version('ipywidgets')}, JupyterLab has the extension"


def _grading() -> str:
    _require(GRADING, INSTALL_COURSE)
    return f"nbgrader {importlib.metadata.version('nbgrader')}"


def _alembic() -> str:
    """nbgrader runs the command `alembic` when it upgrades its database."""
    found = shutil.which("alembic")
    if found:
        return found
    folder = Path(sys.executable).parent
    if (folder / "alembic").exists():
        raise RuntimeError(f"nbgrader needs it on the PATH; run: source {folder / 'activate'}")
    raise RuntimeError(f"nbgrader needs it, but it is missing; run: {INSTALL_COURSE}")


def _sandbox() -> str:
    """Grading runs learners' code in bubblewrap, which needs user namespaces."""
    try:
        from lora_from_scratch.grading import sandbox
    except ImportError as error:
        raise RuntimeError(f"{error}; run: {INSTALL_COURSE}") from None
    why = sandbox.unavailable()
    if why:
        raise RuntimeError(f"{why}. Without it, grading stops")
    return "bubblewrap can be used"


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free
    if free < MINIMUM_DISK:
        raise RuntimeError(
            f"only {free / 1e6:.0f} MB free here, at least {MINIMUM_DISK / 1e6:.0f} MB needed: "
            "delete old runs (rm -r runs) or use another disk"
        )
    return f"{free / 1e9:.1f} GB free"


def _writing() -> str:
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            pass
    except OSError as error:
        raise RuntimeError(f"cannot write to this folder ({error.strerror}): change to one of your own") from None
    return os.fspath(Path.cwd())


def _progress() -> str:
    from lora_from_scratch.support.files import check_writable
    from lora_from_scratch.support.learner_folder import HOME, folder

    try:
        check_writable(folder())
    except OSError as error:
        fix = f"export {HOME}=~/another-folder"
        raise RuntimeError(f"progress in the course is not saved: {error}; choose another folder: {fix}") from None
    return os.fspath(folder())


def _require(packages: tuple[str, ...], install: str) -> None:
    missing = []
    for name in packages:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise RuntimeError(f"missing: {', '.join(missing)}; run: {install}")


CHECKS: dict[str, Callable[[], str]] = {
    "Python": _python,
    "packages": _packages,
    "PyTorch": _torch,
    "bundled model": _bundled_model,
    "course": _course,
    "kernel": _kernel,
    "widgets": _widgets,
    "disk": _disk,
    "this folder": _writing,
    "progress": _progress,
}
FOR_INSTRUCTORS: dict[str, Callable[[], str]] = {"grading": _grading, "alembic": _alembic, "sandbox": _sandbox}
