"""Memory is counted as the operating system counts it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lora_from_scratch.finetune.peak_memory import PeakMemory, peak_resident_bytes, resident_bytes
from tests.helpers import REPOSITORY

PROGRAM = """
import torch
from lora_from_scratch.finetune.peak_memory import PeakMemory
torch.ones(1)
memory = PeakMemory(torch.device("cpu"))
block = torch.ones(200_000_000, dtype=torch.uint8)
held = memory.bytes()
del block
print(held, memory.bytes())
"""


def test_an_allocation_of_200_megabytes_is_seen_within_a_tenth_and_remembered() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    held, after = map(int, done.stdout.split())
    if held == 0:
        pytest.skip("this system does not say how much memory a process holds")
    assert held == pytest.approx(200e6, rel=0.1)
    assert after == pytest.approx(held, rel=0.02)  # a peak does not fall, though the block is gone


def test_the_peak_is_never_below_what_is_held() -> None:
    assert 0 <= resident_bytes() <= peak_resident_bytes()
    assert PeakMemory(torch.device("cpu")).bytes() >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="compares with Linux's own file")
def test_resident_bytes_are_those_of_the_system() -> None:
    with open("/proc/self/status") as status:
        said = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))
    assert resident_bytes() == pytest.approx(said, rel=0.02)
