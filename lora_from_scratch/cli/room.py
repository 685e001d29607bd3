"""`lora-from-scratch room`: show live who is where in a workshop."""

from __future__ import annotations

import argparse
import contextlib
import functools
import ipaddress
import json
import socket
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from lora_from_scratch.room.protocol import PORT, Invitation, new_code, read_invitation
from lora_from_scratch.support.files import check_writable

if TYPE_CHECKING:
    from lora_from_scratch.room.table import Table, Unit

SEATS = 100
GRACE = 2  # seconds that connections have when the room is closed
NOWHERE = "192.0.2.1"  # of a network that is reserved for documentation (RFC 5737)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "room",
        help="show live who is where in a workshop",
        description="Open a room for a workshop and show live, on a page in your browser, which learner is at which "
        "exercise, who is stuck, and which mistakes are common. Learners join from their notebooks with the line that "
        "the page shows; all computers must be in the same network. When the room is closed, everything is forgotten "
        "unless --keep is given.",
    )
    parser.add_argument("units", nargs="*", metavar="UNIT", help="the units to show, such as 00 01 09 (all)")
    parser.add_argument("--host", metavar="ADDRESS", help="the IPv4 address of this computer in the network (found)")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help="the port (%(default)s)")
    parser.add_argument(
        "--seats", type=int, default=SEATS, metavar="N", help="maximum number of learners (%(default)s)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="keep the room in this file; continue it if the file exists"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address of the page")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the server until it is interrupted.

    Raises:
        ValueError: there is no such unit, the address is not one of this computer, or the kept file is no room.
        OSError: the port is taken, or the file cannot be written.
    """
    try:
        import uvicorn

        from lora_from_scratch.room.server import Room
    except ModuleNotFoundError as error:
        raise ValueError(f"room needs the package {error.name}: pip install 'lora-from-scratch[room]'") from None
    from lora_from_scratch.room.table import Table

    if options.seats < 1 or not 0 <= options.port < 2**16:
        raise ValueError("--seats must be at least 1, and --port between 0 and 65535")
    table = Table(find_units(options.units), options.seats, message_of)
    code = new_code()
    if options.keep is not None:
        check_writable(options.keep.parent)
        code = restore(table, options.keep) or code
    address = find_address(options.host)
    listening = listen(address, options.port)
    port = listening[0].getsockname()[1]
    room = Room(table, Invitation(code, address, port), options.keep)
    server = uvicorn.Server(uvicorn.Config(room.app, log_level="warning", timeout_graceful_shutdown=GRACE))
    room.is_closing = lambda: server.should_exit
    page = f"http://127.0.0.1:{port}/?key={room.key}"
    kept = f"The room is kept in {options.keep}." if options.keep else "Nothing is kept (see --keep)."
    print(
        "The room is open. To join, learners run in a notebook:\n\n    from lora_from_scratch.checks import join\n"
        f'    join("{room.invitation}", "your name")\n\nYour page, for you alone: {page}\n'
        f"Stop with Ctrl-C. {kept}",
        flush=True,
    )
    if not options.no_browser:
        webbrowser.open(page)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=listening)
    print("The room is closed.", file=sys.stderr)
    return 0


def find_units(numbers: list[str]) -> list[Unit]:
    """The units of these numbers, all if there are none, as columns of the table.

    Raises:
        ValueError: there is no unit of one of the numbers.
    """
    from lora_from_scratch.checks.units import units
    from lora_from_scratch.room.table import Unit

    found = {unit.number: unit for unit in units() if unit.exercises}
    wanted = [number.removeprefix("unit_").zfill(2) for number in numbers] or list(found)
    for number in wanted:
        if number not in found:
            raise ValueError(f"there is no unit {number!r}; the units are {', '.join(found)}")
    return [
        Unit(number, found[number].title, tuple(exercise.name for exercise in found[number].exercises))
        for number in dict.fromkeys(wanted)
    ]


@functools.cache
def message_of(exercise: str, misconception: str) -> str:
    """What the check tells a learner who makes this mistake; "" if that depends on the answer."""
    from lora_from_scratch.checks.bank import wrong_answers

    return next((answer.message for answer in wrong_answers(exercise) if answer.name == misconception), "")


def restore(table: Table, file: Path) -> str:
    """Take over a room that was kept; returns its code, or "" if there is no such file.

    Raises:
        ValueError: the file is not a room that was kept.
    """
    if not file.exists():
        return ""
    try:
        document = json.loads(file.read_bytes())
        table.restore(document)
        return read_invitation(f"{document['code']}@127.0.0.1").code
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not a room that was kept; give --keep another file") from None


def find_address(host: str | None) -> str:
    """The address of this computer in the local network.

    Raises:
        ValueError: `host` is no IPv4 address; or none is given and there is no network, or a public address.
    """
    if host is not None:
        try:
            address = ipaddress.IPv4Address(host)
        except ValueError:
            raise ValueError(f"--host must be an IPv4 address such as 192.168.1.20, got {host!r}") from None
        if address.is_unspecified:
            raise ValueError("--host must be one address of this computer, not all (0.0.0.0)")
        if not address.is_private:
            print(f"warning: {host} is a public address; others than your learners may reach it", file=sys.stderr)
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((NOWHERE, 9))  # sends nothing, but chooses the address from which it would be sent
            found = probe.getsockname()[0]
        except OSError:
            found = "127.0.0.1"
    if ipaddress.IPv4Address(found).is_loopback:
        raise ValueError("this computer is in no network; to try the room on this computer alone: --host 127.0.0.1")
    if not ipaddress.IPv4Address(found).is_private:
        raise ValueError(f"this computer's address, {found}, is public; to use it all the same: --host {found}")
    return found


def listen(address: str, port: int) -> list[socket.socket]:
    """Sockets that listen at this address, for the learners, and at 127.0.0.1, for the teacher's page."""
    listening: list[socket.socket] = []
    for host in dict.fromkeys((address, "127.0.0.1")):
        try:
            listening.append(socket.create_server((host, listening[0].getsockname()[1] if listening else port)))
        except OSError as error:
            raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}; see --host and --port") from None
    return listening
