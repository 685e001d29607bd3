"""`lora-from-scratch doctor`: what is wrong with this installation, and how to mend it."""

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

OLDEST = (3, 11)
NEEDED_DISK = 500e6  # bytes: an installation's runs, with room
REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "tqdm", "matplotlib", "sacrebleu")
COURSE = ("jupyterlab", "ipykernel", "ipywidgets", "jupytext", "nbclient", "nbgrader", "nh3")
INSTALL = "python -m pip install -e . -c constraints.txt"
INSTALL_COURSE = "python -m pip install -e '.[course]' -c constraints.txt"
WIDGETS = Path("labextensions/@jupyter-widgets/jupyterlab-manager/package.json")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    return commands.add_parser(
        "doctor",
        help="check this installation",
        description="Check this installation and say how to mend it.",
    )


def run(options: argparse.Namespace) -> int:
    """Print one line a check; exit code 1 if something has to be mended."""
    healthy = True
    for name, check in CHECKS.items():
        try:
            print(f"ok       {name:<14} {check()}")
        except Exception as error:  # a doctor reports what it meets
            healthy = False
            print(f"PROBLEM  {name:<14} {' '.join(str(error).split())}")
    print("\nAll is well." if healthy else "\nMend what is marked PROBLEM and run this again.")
    return 0 if healthy else 1


def _python() -> str:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < OLDEST:
        raise RuntimeError(f"{found} is too old; make an environment with 3.11 or newer: python3.11 -m venv .venv")
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
        raise RuntimeError(f"a bf16 matrix product came out wrong; install torch again: {again}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU (none is needed)"
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {gpu}"


def _bundled_model() -> str:
    from lora_from_scratch.gpt2.checkpoint import load_gpt2

    try:
        model, tokenizer = load_gpt2("bundled")
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{error}; fetch it again: git checkout -- lora_from_scratch/assets") from None
    size = sum(p.numel() for p in model.parameters())
    return f"{size:,} parameters, {tokenizer.vocab_size:,} tokens"


def _course() -> str:
    _require(COURSE, INSTALL_COURSE)
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jupyterlab", "nbgrader"))


def _kernel() -> str:
    """The kernel "python3" of JupyterLab has to run this Python, where the library is."""
    mend = "python -m ipykernel install --sys-prefix"
    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError:
        raise RuntimeError(f"jupyter_client is missing; run: {INSTALL_COURSE}") from None
    try:
        specification = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        raise RuntimeError(f'JupyterLab has no kernel "python3"; run: {mend}') from None
    started = Path(specification.argv[0])
    if not started.is_absolute():  # Jupyter puts its own Python there, which is this one
        return f"python3 starts {sys.executable}"
    if not started.exists():
        raise RuntimeError(f'the kernel "python3" starts {started}, which is not there; run: {mend}')
    # The environment, not the file: `python`, `python3` and `python3.11` of one environment are the same.
    if started.parent.resolve() != Path(sys.executable).parent.resolve():
        raise RuntimeError(f'the kernel "python3" starts {started}, not {sys.executable}; run: {mend}')
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
        raise RuntimeError(f"JupyterLab does not find the extension that shows sliders; run: {again}")
    return f"ipywidgets {importlib.metadata.version('ipywidgets')}, JupyterLab has the extension"


def _alembic() -> str:
    """nbgrader calls it by its name when it upgrades its database."""
    found = shutil.which("alembic")
    if found:
        return found
    folder = Path(sys.executable).parent
    if (folder / "alembic").exists():
        raise RuntimeError(f"not on the PATH, which nbgrader needs; run: source {folder / 'activate'}")
    raise RuntimeError(f"missing, which nbgrader needs; run: {INSTALL_COURSE}")


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free
    if free < NEEDED_DISK:
        raise RuntimeError(
            f"only {free / 1e6:.0f} MB free here; at least {NEEDED_DISK / 1e6:.0f} MB are needed: "
            "delete old runs (rm -r runs) or change to another disk"
        )
    return f"{free / 1e9:.1f} GB free"


def _writing() -> str:
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            pass
    except OSError as error:
        raise RuntimeError(f"this folder cannot be written ({error.strerror}): change to one that is yours") from None
    return os.fspath(Path.cwd())


def _progress() -> str:
    from lora_from_scratch.checks.progress_file import HOME, folder
    from lora_from_scratch.support.files import check_writable

    try:
        check_writable(folder())
    except OSError as error:
        place = f"export {HOME}=~/another-folder"
        raise RuntimeError(f"what you pass in the course is not kept: {error}; choose one: {place}") from None
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
    "alembic": _alembic,
    "disk": _disk,
    "this folder": _writing,
    "progress": _progress,
}
