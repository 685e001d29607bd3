"""Run a notebook from top to bottom in a fresh kernel, without a network, reproducibly."""

from __future__ import annotations

import functools
import math
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_from_scratch.support import allocator
from lora_from_scratch.support.figures import BUILDING

SECONDS_A_CELL = 300
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar or a slider: useless without a kernel
MODEL, STEPS = "LORA_FROM_SCRATCH_MODEL", "LORA_FROM_SCRATCH_STEPS"
SETTINGS = (MODEL, STEPS)  # the model of a unit's experiments, and their number of steps
# Starts a process without a network (on Linux, where users may create namespaces).
WITHOUT_NETWORK = ("unshare", "--map-root-user", "--net", "--")
# The substitute where that is not possible; it covers Python code only.
OFFLINE = """\
import socket as _socket

def _refuse(*arguments, **keywords):
    raise OSError("there is no network while a notebook is built")

_socket.getaddrinfo = _socket.create_connection = _refuse
del _refuse, _socket
"""
# Run in the kernel at the end. It reads the kernel's own memory count; getrusage's is inherited from the parent.
MEASURE = """\
import time as _time
from lora_from_scratch.finetune.peak_memory import peak_resident_bytes as _peak
print(_peak(), _time.process_time())
"""


@dataclass(frozen=True)
class Cost:
    """The cost of running a notebook: the kernel's peak memory and its processor time."""

    mebibytes: float
    seconds: float


def execute(
    notebook: Any, *, building: bool = True, allow_errors: bool = False, settings: Mapping[str, str] | None = None
) -> Cost:
    """Run a notebook in place, which fills in the outputs of its cells.

    Args:
        building: with the fixed seeds and quiet progress bars of a build; otherwise as a learner runs it.
        allow_errors: continue after a cell that raises an error. Otherwise stop there; its outputs contain the error.
        settings: environment variables that a unit reads (see `SETTINGS`); those of this process are not passed on.

    Raises:
        ValueError: the kernel died, or a cell took longer than `SECONDS_A_CELL`.
    """
    import nbformat
    from jupyter_client.manager import AsyncKernelManager
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    import_quietly()
    work = Path(tempfile.mkdtemp(prefix="build-"))  # a short path, because it contains sockets
    notebook.cells.append(nbformat.v4.new_code_cell(MEASURE))
    try:
        manager = AsyncKernelManager(
            kernel_spec_manager=_specs(), transport="ipc", connection_file=str(work / "kernel.json")
        )
        client = _polling_client()(
            notebook,
            km=manager,
            timeout=SECONDS_A_CELL,
            allow_errors=allow_errors,
            record_timing=False,
            shutdown_kernel="immediate",
            coalesce_streams=True,
            resources={"metadata": {"path": str(_folder(work / "run"))}},
        )
        client.execute(env=_environment(work, building) | dict(settings or {}), cleanup_kc=True)
    except CellExecutionError:
        pass  # the outputs of the cell contain the error
    except (DeadKernelError, CellTimeoutError) as error:
        raise ValueError("the notebook could not be run: " + " ".join(str(error).split())[:300].lower()) from None
    finally:
        measured = notebook.cells.pop()
        shutil.rmtree(work, ignore_errors=True)
    _normalise(notebook)
    text = "".join(output.get("text", "") for output in measured.get("outputs", []))
    peak, seconds = (float(word) for word in text.split()) if text.strip() else (0.0, 0.0)
    return Cost(peak / 2**20, seconds)


@functools.cache
def _polling_client() -> Any:
    """nbclient's client, polling every second for a cell's reply.

    Occasionally nothing wakes the waiting client, and it sleeps until the cell's timeout (3 of 15 unsolved notebooks in
    one run of the tests). The cause is below nbclient and unknown.
    """
    from nbclient import NotebookClient

    class PollingClient(NotebookClient):
        async def async_start_new_kernel_client(self) -> Any:
            kernel = await super().async_start_new_kernel_client()
            wait = kernel.shell_channel.get_msg

            async def get_msg(timeout: float | None = None) -> Any:
                end = math.inf if timeout is None else time.monotonic() + timeout
                while True:
                    try:
                        return await wait(timeout=max(0, min(1, end - time.monotonic())))
                    except queue.Empty:
                        if time.monotonic() >= end:
                            raise

            kernel.shell_channel.get_msg = get_msg
            return kernel

    return PollingClient


@functools.cache
def network_can_be_cut() -> bool:
    """Whether a process without any network can be started here."""
    if not shutil.which(WITHOUT_NETWORK[0]):
        return False
    return subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True).returncode == 0


@functools.cache
def import_quietly() -> None:
    """Import matplotlib here first: its first import on a machine prints to stderr that it builds a font cache."""
    import matplotlib.font_manager  # noqa: F401


def _specs() -> Any:
    """A manager that knows only the kernel of this interpreter, whatever is installed under the name python3."""
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    start = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    argv = [*WITHOUT_NETWORK, *start] if network_can_be_cut() else start

    class ThisInterpreter(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> Any:
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

    return ThisInterpreter()


def _environment(work: Path, building: bool) -> dict[str, str]:
    """The kernel's environment: none of the user's own settings, one thread, fixed seeds."""
    import matplotlib

    startup = _folder(work / "ipython" / "profile_default" / "startup")
    if not network_can_be_cut():
        (startup / "00-offline.py").write_text(OFFLINE, encoding="utf-8")
    environment = dict(os.environ)
    for name in (BUILDING, "PYTHONWARNINGS", *SETTINGS):
        environment.pop(name, None)
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(work / "ipython"),
        "LORA_FROM_SCRATCH_HOME": str(work / "home"),
        "MATPLOTLIBRC": os.path.join(matplotlib.get_data_path(), "matplotlibrc"),
        "MKL_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        allocator.VARIABLE: allocator.SETTING,
    }
    return environment | ({BUILDING: "1"} if building else {})


def _normalise(notebook: Any) -> None:
    """Remove meaningless differences between runs."""
    for key in set(notebook.metadata) - {"kernelspec", "language_info"}:
        del notebook.metadata[key]
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.get("outputs", []):
            output.pop("transient", None)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
