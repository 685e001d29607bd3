"""Processes that train keep the memory that they free."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_from_scratch.compare.side_by_side import _start, tuned_run
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.support.allocator import SETTING, VARIABLE, quick_allocator

# Ten times 60 tensors of 3 MB, as the steps of a training: page faults of all rounds but the first two.
PROGRAM = """
import resource, torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(10):
    if step == 2:
        before = faults()
    tensors = [torch.ones(750_000) for _ in range(60)]
    del tensors
print(faults() - before)
"""


def page_faults(environment: dict[str, str]) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_that_is_freed_and_asked_for_again_costs_a_tenth_of_the_page_faults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    usual = page_faults(dict(os.environ))
    with quick_allocator():
        quick = page_faults(dict(os.environ))
    assert quick < usual / 10


def test_the_setting_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with quick_allocator():
        assert os.environ[VARIABLE] == SETTING
    assert VARIABLE not in os.environ


def test_a_setting_of_the_person_s_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "glibc.malloc.check=1")
    with quick_allocator():
        assert os.environ[VARIABLE] == "glibc.malloc.check=1"
    assert os.environ[VARIABLE] == "glibc.malloc.check=1"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="Linux tells a process's environment")
def test_the_process_of_a_run_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    connection, process = _start(tuned_run(LoRA(), tmp_path / "run", rate=1e-3), threads=1)
    about = Path(f"/proc/{process.pid}")
    try:
        while b"spawn_main" not in (about / "cmdline").read_bytes():  # until then it is a copy of this process
            time.sleep(0.01)
        environment = (about / "environ").read_bytes().replace(b"\0", b":")  # glibc cuts its copy of the value in place
        assert f"{VARIABLE}={SETTING}".encode() in environment
    finally:
        process.terminate()
        process.join()
        connection.close()
