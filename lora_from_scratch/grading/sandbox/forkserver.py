"""Start programs in the sandbox without importing PyTorch for each, which is most of what grading a notebook costs.

A fork server (`forking.serve`) is an ordinary Python process of the grader. It imports PyTorch and the stripped library
once, and forks a child for each notebook. The sandbox of each is made by bubblewrap, new and with the same options as
for any other program, and the child enters it before it reads anything of a learner. Why that is safe:

- The server never sees anything of a learner: job, key and inputs are read by the child, inside. So no notebook can
  find anything of another, and the memory that the children inherit contains only the stripped library.
- The child enters all namespaces of the sandbox, forks once more to be in its process namespace, closes all other
  files, and checks that no capability is left. From there on it can do what a program started by bubblewrap can do: it
  runs under the same system call filter, limits and mounts. Its parent is outside, where it has no name for it.
- Killing the first process of the sandbox ends everything in it. That process only waits; it can't be traced or read.

What the server has imported is mounted in the sandbox at the same path as outside, for imports that happen later.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from lora_from_scratch.grading.sandbox import forking

STARTING = 180.0  # seconds allowed for the imports
MOST = 2  # servers that are kept; each uses the memory of an imported PyTorch
SERVE = "from lora_from_scratch.grading.sandbox.forking import serve; serve({connection}, {modules})"


class ForkServer:
    """A running fork server.

    Args:
        environment: its whole environment, which its children inherit.
        modules: what it imports.

    Raises:
        OSError: it cannot be started, or an import fails.
    """

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str]) -> None:
        self.environment = environment
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        serve = SERVE.format(connection=theirs.fileno(), modules=list(modules))
        with theirs:
            self.process = subprocess.Popen(
                python(serve),
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env=dict(environment),
                start_new_session=True,
            )
        ready, _, _ = select.select([self.connection], [], [], STARTING)
        if not ready or self.connection.recv(16) != b"ready":
            said = self.said()
            self.close()
            raise OSError(f"the process from which the sandboxes are forked did not start: {said}")

    def fork(self, program: str, *files: int) -> None:
        """Run a program in a sandbox: see `forking.serve` for the files.

        Raises:
            OSError: the server has ended.
        """
        socket.send_fds(self.connection, [program.encode()], files)

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the server, but not the children that are still running."""
        self.connection.close()
        self.process.kill()
        self.process.wait()
        self.output.close()

    def said(self) -> str:
        """The end of its output, in one line."""
        with contextlib.suppress(OSError, ValueError):
            self.output.seek(0)
            return " ".join(self.output.read().decode("utf-8", "replace").split())[-500:]
        return ""


_servers: OrderedDict[str, ForkServer] = OrderedDict()


def server(environment: Mapping[str, str], modules: Sequence[str]) -> ForkServer:
    """The server with this environment and these modules, started if it is not running; the last ones used are kept.

    Raises:
        OSError: it cannot be started.
    """
    key = json.dumps([sorted(environment.items()), list(modules)])
    found = _servers.pop(key, None)
    if found is None or not found.alive():
        found = ForkServer(environment, modules)
    _servers[key] = found
    while len(_servers) > MOST:
        _servers.popitem(last=False)[1].close()
    return found


@atexit.register
def close_servers() -> None:
    """End all servers of this process."""
    while _servers:
        _servers.popitem()[1].close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_servers.clear)  # they are the parent's


def python(program: str) -> list[str]:
    """The command that runs a program. -P prevents files in the working folder from shadowing libraries."""
    return [sys.executable, "-X", "frozen_modules", "-B", "-P", "-s", "-c", program]


def holder(ready: int) -> list[str]:
    """The command of the process that waits in a sandbox; it writes a byte to `ready` once it does."""
    wait = f"from {forking.__name__} import hold; hold({ready})"
    return [sys.executable, "-X", "frozen_modules", "-B", "-P", "-s", "-S", "-c", wait]
