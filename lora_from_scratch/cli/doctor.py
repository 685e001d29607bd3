"""`lora-from-scratch doctor`: what is wrong with this installation, and how to mend it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

NEEDED_DISK = 500e6  # bytes: an installation's runs, with room
REQUIRED = ("torch", "numpy", "safetensors", "tokenizers", "huggingface_hub", "tqdm", "matplotlib", "sacrebleu")


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
            print(f"ok    {name:<14} {check()}")
        except Exception as error:  # a doctor reports what it meets
            healthy = False
            print(f"MEND  {name:<14} {' '.join(str(error).split())}")
    print("\nAll is well." if healthy else "\nMend what is marked and run this again.")
    return 0 if healthy else 1


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"  # pip refuses older than 3.11


def _packages() -> str:
    missing = []
    for name in REQUIRED:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise RuntimeError(f"missing: {', '.join(missing)}; run: python -m pip install -e . -c constraints.txt")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in REQUIRED[:4])


def _torch() -> str:
    import torch

    left, right = torch.eye(64).bfloat16(), torch.ones(64, 64).bfloat16()
    if not torch.equal(left @ right, right):
        raise RuntimeError("a bf16 matrix product came out wrong: install torch again")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU (none is needed)"
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {gpu}"


def _bundled_model() -> str:
    from lora_from_scratch.gpt2.checkpoint import load_gpt2

    model, tokenizer = load_gpt2("bundled")
    size = sum(p.numel() for p in model.parameters())
    return f"{size:,} parameters, {tokenizer.vocab_size:,} tokens"


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free
    if free < NEEDED_DISK:
        raise RuntimeError(f"only {free / 1e6:.0f} MB free here; at least {NEEDED_DISK / 1e6:.0f} MB are needed")
    return f"{free / 1e9:.1f} GB free"


def _writing() -> str:
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            pass
    except OSError as error:
        raise RuntimeError(f"this folder cannot be written ({error.strerror}): change to one that is yours") from None
    return os.fspath(Path.cwd())


CHECKS: dict[str, Callable[[], str]] = {
    "Python": _python,
    "packages": _packages,
    "PyTorch": _torch,
    "bundled model": _bundled_model,
    "disk": _disk,
    "this folder": _writing,
}
