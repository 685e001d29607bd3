"""Limit a process before it runs a learner's code: memory, files, processor time, system calls."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Mapping

from lora_from_scratch.grading.sandbox import seccomp

OPEN_FILES = 256
SIGNALS_WAITING = 256
MIB = 2**20
PR_SET_PDEATHSIG = 1  # linux/prctl.h: end with the parent; the filter prevents revoking it


def lock(memory: int, processor_seconds: int, file: int, filtered: bool = True) -> None:
    """Limit this process permanently.

    Args:
        memory: bytes beyond the current use.
        processor_seconds: processor time since the process started. (The supervisor outside acts a little earlier.)
        file: maximum size in bytes of a file that it writes.
        filtered: whether to install the filter of system calls.

    Raises:
        OSError: a limit cannot be set.
    """
    now = sizes()
    limits = {
        "DATA": int(now["data"]) + memory,  # private writable memory
        "AS": int(now["all"]) + memory + 512 * MIB,  # including shared memory
        "CPU": processor_seconds + 2,
        "FSIZE": file,
        "NOFILE": OPEN_FILES,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
        "SIGPENDING": SIGNALS_WAITING,
    }
    for name, limit in limits.items():
        if hasattr(resource, f"RLIMIT_{name}"):
            _set(getattr(resource, f"RLIMIT_{name}"), limit)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if filtered:
            seccomp.install()


def sizes(process: str = "self") -> Mapping[str, float]:
    """Resource use of a process: bytes of address space and of private writable memory, number of threads, seconds of
    processor time (Linux; 0 elsewhere)."""
    try:
        with open(f"/proc/{process}/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            ticks = file.read().rpartition(")")[2].split()[11:13]
    except OSError:
        return {"all": 0, "data": 0, "threads": 0, "processor": 0.0}
    return {
        "all": _kibibytes(fields.get("VmSize", "0")),
        "data": _kibibytes(fields.get("VmData", "0")),
        "threads": int(fields.get("Threads", "0")),
        "processor": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
    }


def _kibibytes(text: str) -> int:
    return int(text.split()[0]) * 1024


def _set(which: int, limit: int) -> None:
    """Set the soft and hard limit, never above the current hard limit."""
    _, hard = resource.getrlimit(which)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(which, (limit, limit))
