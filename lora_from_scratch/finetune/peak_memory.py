"""The memory use of this process, as counted by the operating system."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def resident_bytes() -> int:
    """The process's resident memory in bytes; on systems that do not report it, the peak so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The process's peak resident memory in bytes; 0 on systems that do not report it (Windows)."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss does not work: a child process inherits it from its parent
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, others in KiB


class PeakMemory:
    """The peak memory from now on, above the memory in use when this object was created.

    On a GPU it comes from PyTorch's allocator and is exact. On a CPU it is the process's high-water mark, which never
    falls: create this object early in a fresh process, before the model is loaded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.before = resident_bytes()

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, peak_resident_bytes() - self.before)
