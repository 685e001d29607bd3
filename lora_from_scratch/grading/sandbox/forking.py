"""The part of the fork server that forks: it has imported what notebooks need, and each child joins a sandbox.

bubblewrap makes the sandbox as for any other program, and starts `hold` in it, which only waits. A child of the fork
server enters the namespaces of that process (setns(2)), gives up all capabilities there, installs the system call
filter, and then runs its program. See `forkserver` for why this is as safe as starting the program in bubblewrap.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from lora_from_scratch.grading.sandbox import lockdown, seccomp

FRAMES = 3  # the file descriptor of the frames in a forked process
LARGEST = 1 << 18  # bytes of a program
HOLDER_MEMORY = 64 * lockdown.MIB
# linux/sched.h: the namespaces of users, mounts, processes, networks, System V IPC, host names, control groups.
NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
# linux/prctl.h, linux/capability.h
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 4, 24, 47, 4
CAPABILITY_VERSION_3, CAPSET, CAPABILITIES = 0x20080522, {"x86_64": 126, "aarch64": 91}, 64
OF_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def hold(ready: int) -> NoReturn:
    """Wait in a sandbox as its first process, so that others can join it; never returns.

    It cannot be traced or read by the processes that join it, and has nothing that they do not have.
    """
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a first process is not reached by signals that it has no handler for
    lockdown.lock(HOLDER_MEMORY, processor_seconds=60, file=0)
    os.write(ready, b"!")
    os.closerange(0, FRAMES)
    os.close(ready)
    while True:
        signal.pause()


def serve(connection: int, modules: Sequence[str]) -> None:
    """Import the modules; then fork a process for each request, until the connection is closed.

    A request is a program's text with five file descriptors: a pidfd of the sandbox's first process; the program's
    standard input, its output and its frames; and a pipe for reports: `b"pid 12\\n"`, then `b"exit -9\\n"`.
    """
    for limit in (resource.RLIMIT_CPU, resource.RLIMIT_DATA):  # what limits a grading process is not meant for this one
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))
    for module in modules:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    gc.collect()
    gc.freeze()  # the children share these objects' memory for longer
    with socket.socket(fileno=connection) as server:
        server.send(b"ready")
        while True:
            program, files, _, _ = socket.recv_fds(server, LARGEST, 5)
            if not program:
                return
            if os.fork() == 0:
                server.close()
                _join(program.decode(), *files)
            for file in files:
                os.close(file)


def _join(program: str, sandbox: int, given: int, output: int, frames: int, reports: int) -> NoReturn:
    """Enter the namespaces; fork the process that runs the program there, and report its id and how it ends.

    Entering a process namespace concerns only the children of the process that enters it.
    """
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(sandbox, NAMESPACES) != 0:
            raise OSError(ctypes.get_errno(), "the sandbox's namespaces cannot be entered (setns)")
        runner = os.fork()
        if runner == 0:
            _run(program, given, output, frames)
        os.write(reports, f"pid {runner}\n".encode())
        for file in (given, output, frames):
            os.close(file)
        _, status = os.waitpid(runner, 0)
        os.write(reports, f"exit {os.waitstatus_to_exitcode(status)}\n".encode())
    except BaseException as error:
        os.write(output, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(0)


def _run(program: str, given: int, output: int, frames: int) -> NoReturn:
    """Become the process that runs the program."""
    status = 1
    try:
        os.setsid()  # a process group of its own: `kill(0, ...)` reaches nothing else
        for number, file in enumerate((given, output, output, frames)):
            os.dup2(file, number, inheritable=False)  # the numbers above those in use are closed next
        os.closerange(FRAMES + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        _drop_capabilities()
        seccomp.install(starting=True)
        os.chdir(os.environ["PWD"])
        sys.argv = ["-c"]
        exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _drop_capabilities() -> None:
    """Give up every capability for good. Entering a user namespace gives all of them, within that namespace.

    Raises:
        OSError: one is left.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(CAPABILITIES):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    libc.syscall(ctypes.c_long(CAPSET[os.uname().machine]), header, (ctypes.c_uint32 * 6)())
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    left = [name for name in OF_CAPABILITIES if int(fields[name], 16)]
    if left:
        raise OSError(f"the process in the sandbox still has capabilities: {', '.join(left)}")
