"""A PostgreSQL server of the test's own: on a socket in a folder of its own, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PLACES = ("/usr/lib/postgresql/*/bin/initdb", "/usr/local/bin/initdb", "/opt/homebrew/bin/initdb")


def programs() -> Path | None:
    """The folder of initdb and pg_ctl; Debian does not put them on the PATH."""
    found = [path for place in PLACES for path in Path("/").glob(place.lstrip("/"))]
    on_path = shutil.which("initdb")
    return max(found).parent if found else Path(on_path).parent if on_path else None


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A server with an empty database; its URL. Skips where there is none."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install -e '.[postgresql]'")
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not here (on Debian: apt install postgresql)")
    # Short: the path of a socket has at most about 100 characters; and a folder that the server's user can enter.
    home = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    user = _somebody()
    try:
        if user:
            os.chown(home, user.pw_uid, user.pw_gid)
        data = str(home / "data")
        _as(user, folder / "initdb", "-D", data, "-U", "grader", "--auth=trust", "--no-sync", "-E", "UTF8", cwd=home)
        options = f"-k {home} -c listen_addresses='' -c fsync=off -c shared_buffers=16MB -c max_connections=30"
        _as(user, folder / "pg_ctl", "-D", data, "-l", str(home / "log"), "-o", options, "-w", "start", cwd=home)
        try:
            yield f"postgresql://grader@/postgres?host={home}"
        finally:
            _as(user, folder / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop", cwd=home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _somebody() -> pwd.struct_passwd | None:
    """Who runs the server: PostgreSQL refuses to be run by root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    pytest.skip("there is neither a user postgres nor a user nobody to run PostgreSQL as")


def _as(user: pwd.struct_passwd | None, program: Path, *arguments: str, cwd: Path) -> None:
    who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": str(cwd)}
    with (cwd / f"{program.name}.log").open("w+") as log:  # not a pipe, which the server would hold open
        command = [str(program), *arguments]
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **who
        )  # type: ignore[call-overload]
        log.seek(0)
        assert done.returncode == 0, f"{program.name}: {log.read()[-1500:]}"
