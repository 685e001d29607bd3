"""The walls and the limits of the sandbox, tried with small scripts that are locked in as the runner is."""

from __future__ import annotations

import os
import platform
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lora_from_scratch.grading.sandbox import Limits, seccomp
from tests.sandboxes import named, needs_bubblewrap, running, script

pytestmark = needs_bubblewrap
MIB = 2**20
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sandbox")


def answers(text: str, cache: Path, /, **limits: Any) -> list[Any]:
    """What a script sent that came to its end."""
    end, frames = script(text, cache, Limits(**limits))
    assert end.why == "finished", end
    return frames[1:-1]


def test_there_is_no_network(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        refused = answers(
            f"""
            import socket
            for family, place in ((2, ("127.0.0.1", {port})), (2, ("1.1.1.1", 53)), (40, (2, 1024)), (16, (0, 0))):
                try:
                    with socket.socket(family, socket.SOCK_STREAM if family != 16 else socket.SOCK_RAW) as s:
                        s.settimeout(3)
                        s.connect(place)
                    send("connected")
                except OSError as error:
                    send("refused")
            send([line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line])
            """,
            folder,
        )
    assert refused == ["refused"] * 4 + [["lo"]]


def test_nothing_is_visible_but_the_interpreter_and_its_libraries(folder: Path) -> None:
    secret = folder / "secret.txt"
    secret.write_text("the answers")
    places = [secret, ROOT / "solutions", ROOT / "notebooks", ROOT / "course", ROOT / "tests", ROOT / ".git"]
    places += [Path(name) for name in ("/etc/passwd", "/etc/shadow", "/home", "/var", "/usr/bin/env", "/sys", "/run")]
    places += [ROOT / "lora_from_scratch/grading/building/solution.py", ROOT / "lora_from_scratch/checks/answers"]
    places += [ROOT / "lora_from_scratch/checks/judge.py", ROOT / "lora_from_scratch/checks/unit_01/exercises.py"]
    os.environ["THE_GRADERS_SECRET"] = "1"
    try:
        there, environment, processes, root, home = answers(
            f"""
            send([place for place in {[str(place) for place in places]!r} if os.path.lexists(place)])
            send(sorted(os.environ))
            send(sorted(name for name in os.listdir("/proc") if name.isdigit()))
            send(sorted(os.listdir("/")))
            send([os.getcwd(), os.listdir("."), os.listdir("/tmp"), os.getuid()])
            """,
            folder,
        )
    finally:
        del os.environ["THE_GRADERS_SECRET"]
    assert there == []
    assert set(environment) <= {"HOME", "LC_CTYPE", "PWD", "PYTHONPATH"}
    assert processes == ["1", "2"]  # the one that waits (see the next test), and the script
    assert {"var", "sys", "run", "home", "mnt", "media", "opt", "srv", "boot"}.isdisjoint(root)
    mounted = {place.parts[2] for place in (Path(sys.prefix), folder) if place.is_relative_to("/tmp")}
    assert (home[0], home[1], set(home[2]) - mounted, home[3]) == (
        "/tmp/notebook",
        [],
        {"home", "notebook"},
        1000,
    )


def test_the_process_that_holds_the_sandbox_cannot_be_read_written_traced_or_ended(folder: Path) -> None:
    reached, command = answers(
        """
        import signal, time
        reached = []
        places = ("mem", "environ", "maps", "auxv", "io", "fd/1", "fd/2", "root/etc", "cwd/etc", "map_files", "fdinfo")
        ways = {name: lambda name=name: open(f"/proc/1/{name}", "rb").read(1) for name in places[:5]}
        ways |= {name: lambda name=name: os.stat(f"/proc/1/{name}") for name in places[5:9]}
        ways |= {name: lambda name=name: os.listdir(f"/proc/1/{name}") for name in places[9:]}
        ways["writing"] = lambda: open("/proc/1/mem", "r+b")
        for name, way in ways.items():
            try:
                way()
                reached.append(name)
            except OSError:
                pass
        for number in sorted(signal.valid_signals()):
            try:
                os.kill(1, number)
            except OSError:
                pass
        time.sleep(0.5)
        send(reached)
        send(os.listdir("/proc/1") != [])
        """,
        folder,
    )
    assert (reached, command) == ([], True)


def test_a_forked_process_has_no_rights_and_files_that_one_started_by_bubblewrap_would_not_have(folder: Path) -> None:
    status, files, parent, group, spaces = answers(
        """
        fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
        names = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "NSpid", "Uid", "Gid")
        send([[name, fields[name].strip()] for name in names])
        send(sorted(int(name) for name in os.listdir("/proc/self/fd")))
        send(os.getppid())
        send([os.getpgid(0), os.getsid(0)])
        send([[name, os.stat(f"/proc/self/ns/{name}").st_ino] for name in sorted(os.listdir("/proc/self/ns"))])
        """,
        folder,
    )
    none = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16)
    ids = dict.fromkeys(("Uid", "Gid"), "1000\t1000\t1000\t1000")
    assert dict(status) == none | ids | {"NoNewPrivs": "1", "NSpid": "2"}
    assert files == [0, 1, 2, 3, 4]  # the last one lists them
    assert (parent, group) == (0, [2, 2])
    shared = [name for name, number in spaces if number == os.stat(f"/proc/self/ns/{name}").st_ino]
    assert shared == ["time", "time_for_children"]


def test_nothing_outside_can_be_written(folder: Path) -> None:
    places = ["/", "/etc", "/dev", "/usr/lib", "/proc", "/proc/sys/kernel", str(ROOT / "lora_from_scratch")]
    places += [str(Path(pytest.__file__).parents[1])]  # the environment's libraries
    (written,) = answers(
        f"""
        import stat
        def kept(place, mode):
            if stat.S_IMODE(os.stat(place).st_mode) == mode:
                raise OSError
        written = []
        for place in {places!r}:
            try:
                with open(os.path.join(place, "made-by-a-learner"), "w"):
                    written.append(place)
            except OSError:
                pass
        for name, change in {{
            "remove": lambda: os.remove(os.__file__),
            "mkdir": lambda: os.mkdir("/new"),
            "symlink": lambda: os.symlink("/etc", "/dev/link"),
            "disk": lambda: os.mknod("/tmp/disk", 0o60666, 0x800),
            "core pattern": lambda: open("/proc/sys/kernel/core_pattern", "r+"),
            "swappiness": lambda: open("/proc/sys/vm/swappiness", "r+"),
            "sysrq": lambda: open("/proc/sysrq-trigger", "r+"),
            "mode of a device": lambda: os.chmod("/dev/null", 0o662) or kept("/dev/null", 0o666),
            "attribute of a device": lambda: os.setxattr("/dev/null", "user.x", b"x"),
            "memory types": lambda: open("/proc/mtrr", "r+b"),
        }}.items():
            try:
                change()
                written.append(name)
            except OSError:
                pass
        for base, folders, names in os.walk("/proc"):
            folders[:] = [name for name in folders if not name.isdigit() and name not in ("self", "thread-self")]
            for place in (os.path.join(base, name) for name in names):
                mode = os.stat(place).st_mode
                if os.access(place, os.W_OK) and not stat.S_ISCHR(mode):
                    written.append(place)
        open("/dev/null", "w").write("x")
        send(written)
        """,
        folder,
    )
    assert written == []
    assert not (ROOT / "lora_from_scratch" / "made-by-a-learner").exists()


def test_no_process_can_be_started(folder: Path) -> None:
    column, _ = seccomp.ARCHITECTURES[platform.machine()]
    older = [number for name in ("fork", "vfork") if (number := seccomp.FORBIDDEN[name][column]) >= 0]
    (started,) = answers(
        f"        OLDER = {older}\n"
        """
        import ctypes, subprocess, sys
        libc = ctypes.CDLL(None, use_errno=True)
        started = []
        for name, start in {
            "fork": lambda: os.fork() or os._exit(0),
            "forkpty": lambda: os.forkpty()[0] or os._exit(0),
            "spawn": lambda: os.posix_spawn(sys.executable, [sys.executable, "-c", "pass"], {}),
            "subprocess": lambda: subprocess.run([sys.executable, "-c", "pass"]),
            "exec": lambda: os.execv(sys.executable, [sys.executable, "-c", "pass"]),
            "older calls": lambda: any(libc.syscall(number) != -1 for number in OLDER) or 1 / 0,
            "clone3": lambda: libc.syscall(435, 0, 0) != -1 or 1 / 0,
            "unshare": lambda: libc.unshare(0x10000000) == 0 or 1 / 0,
            "mount": lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0 or 1 / 0,
            "memfd": lambda: os.memfd_create("hidden"),
            "ptrace": lambda: libc.ptrace(16, 1, 0, 0) == 0 or 1 / 0,
            "shared memory": lambda: libc.shmget(0, 4096, 0o1600) != -1 or 1 / 0,
        }.items():
            try:
                start()
                started.append(name)
            except (OSError, ZeroDivisionError):
                pass
        send(started)
        """,
        folder,
    )
    assert started == []


def test_memory_is_limited_however_it_is_asked_for(folder: Path) -> None:
    got = answers(
        """
        import mmap
        def take(count):
            return bytearray(count)
        for what in ((lambda: bytearray(300 << 20)), (lambda: [bytes(1 << 20) for _ in range(400)]),
                     (lambda: mmap.mmap(-1, 300 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)),
                     (lambda: [mmap.mmap(-1, 100 << 20) for _ in range(10)])):
            try:
                what()
                send("given")
            except (MemoryError, OSError):
                send("refused")
        send(len(bytearray(100 << 20)))
        """,
        folder,
        memory=200 * MIB,
    )
    assert got == ["refused"] * 4 + [100 * MIB]


def test_files_folders_and_shared_memory_are_limited(folder: Path) -> None:
    got = answers(
        """
        def fill(name, size):
            try:
                with open(name, "wb", buffering=0) as file:
                    for _ in range(size):
                        file.write(bytes(1 << 20))
                return "written"
            except OSError as error:
                return os.strerror(error.errno)
        send(fill("large", 9))
        send(fill("/dev/shm/large", 9))
        os.remove("large")
        send([fill(f"file-{number}", 7) for number in range(4)])
        """,
        folder,
        file=8 * MIB,
        folder=20 * MIB,
        shared=4 * MIB,
    )
    full = "No space left on device"
    assert got == ["File too large", full, ["written", "written", full, full]]


# What the process does, the limits, and how it has to end.
ENDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "many files": ("for n in range(10**6): open(f'/tmp/{n}', 'w').close()", {"files": 300}, "files"),
    "threads": (
        "import threading, time\n"
        "for _ in range(100): threading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n"
        "time.sleep(30)",
        {"threads": 50},
        "threads",
    ),
    "a loop": ("while True: pass", {"processor_seconds": 1}, "processor time"),
    "sleep": ("import time; time.sleep(60)", {"seconds": 0.5}, "wall time"),
    "sleep behind signals": (
        "import signal, time\n"
        "for s in signal.valid_signals() - {9, 19, 32, 33}: signal.signal(s, signal.SIG_IGN)\n"
        "for whom in (-1, 1):\n  try: os.kill(whom, 9)\n  except OSError: pass\n"
        "while True: time.sleep(9)",
        {"seconds": 0.5},
        "wall time",
    ),
    "stopped by itself": ("os.kill(os.getpid(), 19); import time; time.sleep(60)", {"seconds": 0.5}, "wall time"),
    "endless output": ("while True: os.write(1, bytes(10**6))", {"seconds": 0.5}, "wall time"),
    "exit": ("os._exit(0)", {}, "exited"),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", {}, "crashed"),
    "killed by itself": ("os.kill(os.getpid(), 9)", {}, "crashed"),
    "killed with its group": ("os.kill(0, 9)", {}, "crashed"),
    "aborted": ("os.abort()", {}, "crashed"),
    "out of memory below Python": (
        "import ctypes\nkept = []\n"
        "try:\n  while True: kept.append(bytes(1 << 19))\nexcept MemoryError: pass\n"
        "import time; time.sleep(0.5); os.abort()",
        {"memory": 100 * MIB},
        "memory",
    ),
    "garbage in the pipe": ("os.write(frames, b'garbage' * 9)", {}, "frames"),
    "a frame without a MAC": (
        "body = struct.pack('>I', 4) + b'true'\nos.write(frames, struct.pack('>I', 8) + bytes(16) + body)",
        {},
        "frames",
    ),
    "a frame that is too large": ("send('x' * 6_000_000)", {"observation": 1 * MIB}, "frames"),
    "too many frames": ("while True: send('x' * 100_000)", {"sent": 2 * MIB}, "frames"),
    "half a frame": ("os.write(frames, struct.pack('>I', 1000)); os._exit(0)", {}, "exited"),
    "closed pipes": ("os.closerange(0, 200); import time; time.sleep(60)", {"seconds": 0.5}, "wall time"),
}


@pytest.mark.parametrize("what", ENDS)
def test_what_goes_too_far_is_ended_and_told(what: str, folder: Path) -> None:
    text, limits, why = ENDS[what]
    mark = f"{os.getpid() % 10**6}-{abs(hash(what)) % 10**8}"
    end, _ = script(named(mark, text), folder, Limits(**limits))
    assert end.why == why, end
    assert running(mark) == []


def test_a_script_that_runs_is_found_by_its_name(folder: Path) -> None:
    found: list[str] = []
    ended = threading.Event()

    def look() -> None:
        while not found and not ended.wait(0.02):
            found.extend(running("a-name"))

    thread = threading.Thread(target=look)
    thread.start()
    script(named("a-name", "import time; time.sleep(60)"), folder, Limits(seconds=1))
    ended.set()
    thread.join()
    assert len(found) == 1


def test_a_process_without_walls_is_ended_as_well(folder: Path) -> None:
    mark = f"{os.getpid() % 10**6}-without"
    end, frames = script(
        named(
            mark,
            """
            import time
            try:
                os.fork()
            except OSError:
                send("no fork")
            time.sleep(60)
            """,
        ),
        folder,
        Limits(seconds=0.5),
        walls=False,
    )
    assert end.why == "wall time"
    assert frames == ["ready", "no fork"]
    assert running(mark) == []


def test_the_grader_has_no_more_open_files_and_threads_than_before(folder: Path) -> None:
    script("pass", folder)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    script("os._exit(3)", folder)
    script("os.write(frames, b'garbage' * 9)", folder)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
