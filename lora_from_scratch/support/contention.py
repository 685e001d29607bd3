"""Train at a reasonable speed on a busy computer, with the same numbers.

PyTorch splits each operation among threads, one for each processor; on Linux, OpenMP's library libgomp manages them. A
thread that has finished its part waits for the others in a loop, which is the quickest way if all of them are running.
But if another program occupies a processor, one of them is not running, and those that loop keep the processors from it
and from everything else: a step of training can take ten times as long as the share of the processors would allow.

libgomp waits in that loop only briefly (and then sleeps) while it manages more threads than there are processors
(`gomp_throttled_spin_count_var` in libgomp/config/linux/wait.h). `watch` makes use of that: as long as the threads of
this process have to wait for a processor, it keeps a second team of threads that do nothing. The number of threads that
share an operation stays the same, and with it every bit of the result. `benchmarks/busy_computer.py` measures it.
"""

from __future__ import annotations

import functools
import os
import sys
import threading

INTERVAL = 0.5  # seconds between two looks
BUSY, QUIET = 0.2, 0.1  # seconds that the threads wait for a processor, all together, in a second
LOOKS = 4  # quiet looks in a row before the second team ends
SPLIT = 1 << 18  # elements of a tensor that PyTorch processes with several threads


@functools.cache
def watch() -> None:
    """From now on, keep a second team of threads whenever other programs occupy the processors.

    It is called by whatever computes for long, starts a thread the first time, and does nothing afterwards; nor does it
    where it cannot help: on other systems than Linux, without libgomp, or with a single thread.
    """
    import torch

    if torch.get_num_threads() > 1 and waiting() is not None and _uses_libgomp():
        threading.Thread(target=_watch, name="contention", daemon=True).start()


def waiting() -> float | None:
    """The seconds that the threads of this process have waited for a processor so far; None if Linux does not say."""
    try:
        names = os.listdir("/proc/self/task")
    except OSError:
        return None
    total, known = 0.0, False
    for name in names:
        try:
            with open(f"/proc/self/task/{name}/schedstat", encoding="ascii") as file:
                total, known = total + int(file.read().split()[1]) / 1e9, True
        except (OSError, IndexError):  # it has ended, or the kernel does not count
            continue
    return total if known else None


class SecondTeam:
    """A thread that has had an operation split once, so that libgomp keeps threads for it until it ends."""

    def __init__(self) -> None:
        self._stop, started = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._stay, args=(started,), name="second team", daemon=True)
        self._thread.start()
        started.wait()

    def _stay(self, started: threading.Event) -> None:
        import torch

        try:
            torch.zeros(SPLIT).add_(1)
        finally:
            started.set()
        self._stop.wait()

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


def _watch() -> None:
    """Look at how long the threads wait, and start or end the second team."""
    team: SecondTeam | None = None
    before, quiet = waiting() or 0.0, 0
    pause = threading.Event()
    while not pause.wait(INTERVAL):
        now = waiting() or 0.0
        share, before = (now - before) / INTERVAL, now
        quiet = quiet + 1 if share < QUIET else 0
        if team is None and share > BUSY:
            team = SecondTeam()
        elif team is not None and quiet >= LOOKS:
            team.end()
            team, before = None, waiting() or 0.0


def _uses_libgomp() -> bool:
    if sys.platform != "linux":
        return False
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            return any("libgomp" in line for line in file)
    except OSError:
        return False
