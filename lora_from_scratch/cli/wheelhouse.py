"""`lora-from-scratch wheelhouse`: everything that a computer without a network needs to install the course."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_from_scratch.support.files import write_atomically

THIS = "this"
NVIDIA = ("cuda-", "nvidia-", "triton")  # what only the CUDA build of PyTorch needs


@dataclass(frozen=True)
class System:
    """A kind of computer: how uv calls it, and the tags of the wheels that it can install."""

    uv: str
    tags: tuple[str, ...]
    create: str
    python: str


SYSTEMS = {
    "windows": System("x86_64-pc-windows-msvc", ("win_amd64",), "py -m venv .venv", r".venv\Scripts\python"),
    "macos": System("aarch64-apple-darwin", ("macosx_14_0_arm64",), "python3 -m venv .venv", ".venv/bin/python"),
    "linux": System(
        "x86_64-manylinux_2_28",
        (*tuple(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)), "manylinux2014_x86_64"),
        "python3 -m venv .venv",
        ".venv/bin/python",
    ),
}
PAGE = """# Installing LoRA from scratch without a network

These are the wheels for {contents}. Copy this folder to the computer, open a terminal in the folder in which you
want to work, and replace WHEELS by the path of this folder.

{commands}
`lab` copies the notebooks into `work` and opens them.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "wheelhouse",
        help="download what computers without a network need to install the course",
        description="Download the wheels of the course and of everything that it needs into a folder (a USB stick), "
        "with a page that says how to install from it. For other systems than this one the package uv is needed.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder; created if it does not exist")
    parser.add_argument(
        "--system",
        nargs="+",
        choices=(THIS, *SYSTEMS),
        default=[THIS],
        help="the computers' systems: Windows, macOS (Apple silicon) and Linux, 64 bits (default: %(default)s)",
    )
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument(
        "--python", nargs="+", default=[here], metavar="X.Y", help="their versions of Python (default: %(default)s)"
    )
    parser.add_argument(
        "--torch-index",
        metavar="ADDRESS",
        help="PyTorch's index of CPU builds, for Linux: without it, the build from the package index needs several GB",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Download, and write `INSTALL.md` beside the wheels.

    Raises:
        ValueError: a version of Python is malformed, or uv is needed and not installed.
        OSError: a download fails, or the folder cannot be written to.
    """
    for version in options.python:
        if not all(part.isdecimal() for part in version.split(".")) or version.count(".") != 1:
            raise ValueError(f"--python takes versions such as 3.12, got {version!r}")
    others = [name for name in options.system if name != THIS]
    if others and importlib.util.find_spec("uv") is None:
        raise ValueError("for another system than this one the package uv is needed: python -m pip install uv")
    options.folder.mkdir(parents=True, exist_ok=True)
    if THIS in options.system:
        download([requirement("course")], options.folder, [])
    for name in others:
        for version in options.python:
            for_system(name, version, options.folder, options.torch_index)
    wheel_of_the_course(options.folder)
    contents = ", ".join(name if name != THIS else f"this system ({sys.platform})" for name in options.system)
    page = PAGE.format(contents=contents, commands="\n".join(_commands(name) for name in options.system))
    write_atomically(options.folder / "INSTALL.md", lambda path: path.write_text(page, encoding="utf-8"))
    wheels = list(options.folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {size / 1e6:,.0f} MB, in {options.folder}; see {options.folder / 'INSTALL.md'}")
    return 0


def for_system(name: str, version: str, folder: Path, torch_index: str | None) -> None:
    """Download the wheels for another system."""
    system, root = SYSTEMS[name], _clone()
    compile_ = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header"]
    compile_ += ["--python-platform", system.uv, "--python-version", version]
    compile_ += ["--extra", "course", "-c", "constraints.txt", "pyproject.toml"] if root else ["-"]
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    given = None if root else requirement("course")
    done = subprocess.run(compile_, cwd=root, input=given, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"what {name} with Python {version} needs cannot be found out: {done.stderr.strip()[-500:]}")
    lines = [line.partition(";")[0].strip() for line in done.stdout.splitlines() if "==" in line]
    tags = [f"--platform={tag}" for tag in system.tags]
    chosen = ["--no-deps", f"--python-version={version}", "--only-binary=:all:", *tags]
    if torch_index and name == "linux":
        torch = [line for line in lines if line.startswith("torch==")]
        download(torch, folder, [*chosen, "--index-url", torch_index])
        lines = [line for line in lines if not line.startswith((*NVIDIA, "torch=="))]
    download([line for line in lines if not line.startswith("lora-from-scratch")], folder, chosen)


def download(requirements: Sequence[str], folder: Path, chosen: Sequence[str]) -> None:
    """Download wheels with pip.

    Raises:
        OSError: pip fails.
    """
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "-d",
        str(folder.resolve()),
    ]
    root = _clone()
    pip += ["-c", "constraints.txt"] if root and not chosen else []
    if subprocess.run([*pip, *chosen, *requirements], cwd=root, check=False).returncode:
        raise OSError(f"pip could not download {' '.join(requirements)[:200]}")


def wheel_of_the_course(folder: Path) -> None:
    """The course's own wheel: built from the clone, or the one that is installed, from the package index.

    Raises:
        OSError: pip fails.
    """
    root = _clone()
    source = str(root) if root else requirement("")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    for old in folder.glob("lora_from_scratch-*"):
        old.unlink()
    if subprocess.run([*pip, "-w", str(folder.resolve()), source], check=False).returncode:
        raise OSError("pip could not build the course's own wheel")


def requirement(extra: str) -> str:
    """What to ask pip for: this clone, or the version that is installed."""
    from lora_from_scratch import __version__

    of = f"[{extra}]" if extra else ""
    return f".{of}" if _clone() else f"lora-from-scratch{of}=={__version__}"


def _clone() -> Path | None:
    """The clone that this package runs from; None if it was installed from a wheel."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "constraints.txt").is_file() else None


def _commands(name: str) -> str:
    here = "windows" if sys.platform == "win32" else "macos" if sys.platform == "darwin" else "linux"
    system = SYSTEMS[here if name == THIS else name]
    install = f'{system.python} -m pip install --no-index --find-links WHEELS "lora-from-scratch[course]"'
    title = "This system" if name == THIS else {"macos": "macOS"}.get(name, name.capitalize())
    return f"## {title}\n\n    {system.create}\n    {install}\n    {system.python} -m lora_from_scratch lab\n"
