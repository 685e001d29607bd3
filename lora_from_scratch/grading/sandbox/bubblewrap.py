"""Run a command in bubblewrap, where only the interpreter and its libraries are visible, read-only."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lora_from_scratch.grading.sandbox import seccomp

PROGRAM = "bwrap"
HOME = "/tmp/home"
WORK = "/tmp/notebook"
# The system's libraries; which of them there are depends on the distribution.
SYSTEM = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/lib", "/lib32", "/lib64", "/libx32")
ALSO = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/usr/share/fonts", "/usr/share/zoneinfo")
# What is left of /dev and /proc. A grader that is the superuser owns, inside too, whatever the superuser owns outside:
# without this, a learner's code could set the kernel's parameters and change the modes of devices.
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
OF_PROC = ("cpuinfo", "filesystems", "loadavg", "meminfo", "mounts", "net", "self", "stat", "thread-self", "version")
COPY = re.compile(r"lora[-_.]from[-_.]scratch(?![a-z])", re.IGNORECASE)
DESCRIPTIONS = (".dist-info", ".egg-info", ".pth", ".egg-link")  # of what is installed: no code
NEEDED = ("torch", "numpy", "IPython", "safetensors", "traitlets")


@functools.cache
def unavailable() -> str | None:
    """Why the sandbox cannot be used here and what to do about it; None if it can."""
    if not sys.platform.startswith("linux"):
        return f"bubblewrap needs Linux, and this is {sys.platform}. Grade on Linux (a virtual machine or WSL 2)"
    if shutil.which(PROGRAM) is None:
        return "bubblewrap is not installed. Install it: apt install bubblewrap, or dnf install bubblewrap"
    try:
        code = seccomp.program(starting=True)
    except ValueError as error:
        return str(error)
    reader, writer = os.pipe()
    try:
        os.write(writer, code)
        os.close(writer)
        start = [*command(folder=1, shared=1, filtered=reader), "--", sys.executable, "-I", "-S", "-c", "pass"]
        tried = subprocess.run(start, capture_output=True, text=True, pass_fds=(reader,), stdin=subprocess.DEVNULL)
    except OSError as error:
        return f"bubblewrap cannot be started: {error}"
    finally:
        os.close(reader)
    if tried.returncode == 0:
        return None
    said = " ".join(tried.stderr.split()) or f"it ended with {tried.returncode}"
    return f"bubblewrap does not work here ({said[:300]}). {_advice(said)}"


def _advice(said: str) -> str:
    if "nknown option" in said:
        return "Install bubblewrap 0.8 or newer"
    if "namespace" in said or "uid map" in said:
        return (
            "Allow users to create namespaces: sysctl kernel.unprivileged_userns_clone=1, and on Ubuntu 24.04 "
            "kernel.apparmor_restrict_unprivileged_userns=0; in Docker start the container with "
            "--security-opt seccomp=unconfined"
        )
    return "In Docker start the container with --security-opt seccomp=unconfined --security-opt systempaths=unconfined"


def command(
    folder: int,
    shared: int,
    bound: Iterable[tuple[Path, str]] = (),
    environment: Mapping[str, str] | None = None,
    filtered: int | None = None,
    info: int | None = None,
) -> list[str]:
    """The bubblewrap command, without `--` and the command to run inside.

    Args:
        folder: the size of /tmp, which contains the home and working folders.
        shared: the size of /dev/shm.
        bound: files and folders of the machine to mount read-only, each with its path inside.
        environment: the complete environment.
        filtered: a file descriptor with the filter of system calls; see `seccomp.program`.
        info: a file descriptor on which bubblewrap reports the id of the first process inside.
    """
    arguments = [PROGRAM, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    arguments += ["--as-pid-1"]  # no process of bubblewrap inside, whose memory could be written
    arguments += ["--clearenv", "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox"]
    arguments += ["--size", str(max(folder, 4096)), "--tmpfs", "/tmp"]  # before what is bound below it
    for folder_or_file in visible():
        arguments += ["--ro-bind", str(folder_or_file), str(folder_or_file)]
    for link in filter(os.path.islink, (*SYSTEM, f"{sys.prefix}/lib64", f"{sys.base_prefix}/lib64")):
        if not any(Path(link).is_relative_to(place) for place in visible()):
            arguments += ["--symlink", os.readlink(link), link]
    for copy in other_copies():
        hidden = ["--tmpfs", str(copy), "--remount-ro"] if copy.is_dir() else ["--ro-bind", "/dev/null"]
        arguments += [*hidden, str(copy)]
    for source, place in bound:
        arguments += ["--ro-bind", str(source), place]
    arguments += [*_proc(), *_devices(shared)]
    arguments += ["--dir", HOME, "--dir", WORK, "--chdir", WORK, "--remount-ro", "/dev", "--remount-ro", "/"]
    for name, value in (environment or {}).items():
        arguments += ["--setenv", name, value]
    arguments += ["--seccomp", str(filtered)] if filtered is not None else []
    arguments += ["--info-fd", str(info)] if info is not None else []
    return arguments


def _proc() -> list[str]:
    arguments = ["--proc", "/proc"]
    for name in sorted(os.listdir("/proc")):
        place = f"/proc/{name}"
        if name.isdigit() or name in OF_PROC or os.path.islink(place):
            continue
        if os.path.isdir(place):
            arguments += ["--tmpfs", place, "--remount-ro", place]
        else:
            arguments += ["--ro-bind", "/dev/null", place]
    return arguments


def _devices(shared: int) -> list[str]:
    arguments = ["--size", "65536", "--tmpfs", "/dev"]
    for place in DEVICES:
        arguments += ["--dev-bind", place, place]  # their modes are kept by `seccomp`
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        arguments += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
    return [
        *arguments,
        "--symlink",
        "/proc/self/fd",
        "/dev/fd",
        "--size",
        str(max(shared, 4096)),
        "--tmpfs",
        "/dev/shm",
    ]


@functools.cache
def visible() -> tuple[Path, ...]:
    """The visible parts of the machine, outermost folders only: libraries, interpreter, installed packages."""
    places = [Path(place) for place in SYSTEM if os.path.isdir(place) and not os.path.islink(place)]
    places += [Path(place) for place in ALSO if os.path.exists(place)]
    for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix):
        places += _of_prefix(Path(prefix))
    # Every link in the chain to the interpreter must be visible.
    link = Path(sys.executable)
    for _ in range(20):
        places.append(link)
        if not link.is_symlink():
            break
        link = Path(os.path.normpath(link.parent / os.readlink(link)))
    for name in NEEDED:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            places.append(Path(spec.origin).parent.parent)
    outermost: list[Path] = []
    for place in sorted(set(places), key=lambda place: len(place.parts)):
        if not any(place.is_relative_to(other) for other in outermost):
            outermost.append(place)
    return tuple(outermost)


def _of_prefix(prefix: Path) -> list[Path]:
    """The parts of an environment that the interpreter needs; the same folder may also contain the course."""
    system = prefix in (Path("/usr"), Path("/usr/local"), Path("/"))
    names = ("lib", "lib64") if system else ("bin", "lib", "lib64", "pyvenv.cfg")
    return [prefix / name for name in names if (prefix / name).exists() and not (prefix / name).is_symlink()]


@functools.cache
def other_copies() -> tuple[Path, ...]:
    """Other visible copies of the library, which would reveal the solutions."""
    found = []
    waiting = [place for place in visible() if place.is_dir()]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if COPY.match(entry.name) and not entry.name.endswith(DESCRIPTIONS):
                        found.append(Path(entry.path))
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
        except OSError:  # nobody inside can list it either
            continue
    return tuple(sorted(found))


def mounted(places: Sequence[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """The places inside visible folders, which need something mounted over them."""
    return [(source, place) for source, place in places if any(Path(place).is_relative_to(v) for v in visible())]
