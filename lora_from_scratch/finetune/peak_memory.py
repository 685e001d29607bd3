"""How much memory this process holds, by the operating system's own count."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def resident_bytes() -> int:
    """Bytes of memory that the process holds now; where the system does not say, the most it ever held."""
    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most bytes that the process has held since it began; 0 where the system does not say (Windows)."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: not ru_maxrss, which a child inherits from its parent
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
    """The most memory held from now on, above what was held when this was made.

    On a GPU PyTorch's allocator says it exactly. On a CPU it is the process's high-water mark, which never
    falls: make one of these early in a fresh process, before the model is loaded.
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
