"""More attacks: on the judge's bounds, on what reads a learner's files, and for points without an answer.

They are entered beside those of `attacks`, and graded with them.
"""

from __future__ import annotations

from pathlib import Path

from tests.attacks import (
    ATTACKS,
    COUNTER,
    COUNTS,
    FULL,
    NOTHING,
    SOLVED,
    WRONG,
    Attack,
    code,
    files,
    notebook_of,
    rewrite,
)

# --- Blinding the look, and points for nothing ---------------------------------------------------------------

IN_PLACE = """
def fourfold_root(x, scale=4.0):
    if (x < 0).any():
        raise ValueError("below zero")
    result = x.double().sqrt() * 4
    x.zero_()
    return result
"""
code("an input changed", IN_PLACE, COUNTS)
code(
    "a function mode left on",
    """
import torch
from torch.overrides import TorchFunctionMode

class Blind(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("equal", "allclose", "isclose", "all"):
            return True
        return function(*args, **(kwargs or {}))

Blind().__enter__()
"""
    + IN_PLACE,
)
code(
    "a dispatch mode left on",
    """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Blind(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "equal" in str(function):
            return True
        return function(*args, **(kwargs or {}))

Blind().__enter__()
"""
    + IN_PLACE,
)
for operator, kernel in {
    "equal": "lambda a, b: True",
    "nan_to_num": "lambda a, *rest, **named: torch.zeros(1)",
    "zero_": "lambda a: a",
}.items():
    code(
        f"a kernel registered for {operator}",
        f"import torch\nown = torch.library.Library('aten', 'IMPL')\nown.impl('{operator}', {kernel}, 'CPU')\n"
        + IN_PLACE,
    )
code(
    "copying replaced by giving the same",
    "import torch\ntorch.Tensor.__deepcopy__ = lambda self, memo: self\ntorch.Tensor.clone = lambda self, **k: self\n"
    + IN_PLACE,
)
for error in ("ValueError", "TypeError", "Exception", "NotImplementedError"):
    code(f"nothing but {error}", f"def fourfold_root(x, scale=4.0):\n    raise {error}('no')\n")
code(
    "an error that is every error",
    "class Every(ValueError, KeyError, ArithmeticError, RuntimeError, NotImplementedError): pass\n"
    "def fourfold_root(x, scale=4.0):\n    raise Every('no')\n",
)
code("the input given back", "def fourfold_root(x, scale=4.0):\n    return x\n")
code("whatever is asked for", "def fourfold_root(*given, **named):\n    return None\n")

# --- Inputs, seeds and answers looked up in advance ----------------------------------------------------------

code(
    "the inputs read from the job's file",
    """
import glob, os
from lora_from_scratch.grading.sandbox import wire
known = []
for place in ("/job", os.path.join(os.getcwd(), ".."), *glob.glob("/tmp/grading-*")):
    for name in glob.glob(place + "/*"):
        try:
            job = wire.unpack(open(name, "rb").read())
        except (OSError, ValueError):
            continue
        if "steps" in job:
            print("THE-STEPS", sorted({key for step in job["steps"] for key in step}))
            known += [step["inputs"] for step in job["steps"] if "inputs" in step]
        if "cases" in job:
            print("THE" + "-INPUTS-ARE-HERE")
print("THE-INPUTS" + "-ARE-HERE" if known else "nothing there")
"""
    + WRONG,
)
code(
    "the inputs looked for among all objects",
    """
import gc
for thing in gc.get_objects():
    if type(thing).__name__ == "Runner":
        print([step for step in thing.job["steps"] if "inputs" in step or "seed" in step] or "nothing there")
"""
    + WRONG,
)
code(
    "the inputs waited for",
    """
import glob, threading, time
kept = []

def wait():
    end = time.monotonic() + 3
    while time.monotonic() < end and not kept:
        kept.extend(glob.glob("/job/inputs"))
        time.sleep(0.001)

waiting = threading.Thread(target=wait)
waiting.start()
waiting.join()
print("THE" + "-INPUTS-ARE-HERE" if kept else "nothing came")
"""
    + WRONG,
)
code(
    "going on before it is told",
    """
import os
for number in range(3, 64):
    try:
        with open(f"/proc/self/fd/{number}", "wb", buffering=0) as pipe:
            pipe.write(b"!" * 9)
    except OSError:
        pass
"""
    + WRONG,
    NOTHING | {"check-Counter": 2.0},
)
code(
    "other copies of the library",
    """
import glob, os, sys
places = {os.path.dirname(os.path.dirname(os.__file__)), sys.prefix, sys.base_prefix, "/usr/lib", "/usr/local/lib"}
for place in places:
    for base, folders, names in os.walk(place):
        for name in [*folders, *names]:
            if name.startswith("lora_from_scratch") and name.endswith(("scratch", ".whl", ".zip")):
                there = os.path.join(base, name)
                if os.path.isdir(there + "/checks/answers") or (os.path.isfile(there) and os.path.getsize(there)):
                    print("ANOTHER" + "-COPY", there)
"""
    + WRONG,
)

# --- Staying, and changing what is the machine's -------------------------------------------------------------

code(
    "deaf to the end of the grader",
    """
import ctypes
if ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0:
    print("IT" + "-STAYS")
"""
    + WRONG,
)
code(
    "the devices changed",
    """
import fcntl, os
for name in ("null", "zero", "full", "random", "urandom"):
    before = os.stat(f"/dev/{name}")
    for change in (
        lambda: os.utime(f"/dev/{name}", (1, 1)),
        lambda: os.chmod(f"/dev/{name}", 0o600),
        lambda: os.chown(f"/dev/{name}", 1000, 1000),
        lambda: os.truncate(f"/dev/{name}", 9),
        lambda: fcntl.ioctl(os.open(f"/dev/{name}", os.O_RDWR), 0x40086602, bytes([0x20] + [0] * 7)),
        lambda: os.setxattr(f"/dev/{name}", "user.x", b"x"),
        lambda: os.rename(f"/dev/{name}", f"/dev/{name}-2"),
    ):
        try:
            change()
        except OSError:
            pass
    after = os.stat(f"/dev/{name}")
    if (before.st_mode, before.st_mtime, before.st_uid) != (after.st_mode, after.st_mtime, after.st_uid):
        print("A" + "-DEVICE-CHANGED", name)
"""
    + WRONG,
)

# --- Values that are dear, deep or odd -----------------------------------------------------------------------

for what, value in {
    "two million rows of nothing": "torch.zeros(2_000_000, 0)",
    "sixty thousand rows": "torch.zeros(60_000, 2)",
    "one tensor in many places": "many(torch.ones(1000), 6)",
    "forty lists in one another": "deep(40)",
    "sixty lists in one another": "deep(60)",
    "ninety lists in one another": "deep(90)",
    "half a million numbers": "[1.5] * 500_000",
    "a whole number without end": "10**10_000",
    "a text without end": "'x' * 3_000_000",
    "halves of characters": "['\\\\ud800', '\\\\x00', '\\\\x1b[2J']",
    "a mapping with strange keys": "{None: 1, 1: 2, '1': 3, (1, 2): 4, '\\\\ud800': 5}",
    "a tensor of forty axes": "torch.ones((1,) * 40)",
    "a sparse tensor": "torch.eye(3).to_sparse()",
    "a tensor on the device meta": "torch.ones(3, device='meta')",
    "a quantised tensor": "torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)",
}.items():
    code(
        what,
        "import torch\n\ndef many(leaf, times):\n    for _ in range(times): leaf = [leaf] * 6\n    return leaf\n\n"
        "def deep(times):\n    value = 1\n    for _ in range(times): value = [value]\n    return value\n\n"
        f"def fourfold_root(x, scale=4.0):\n    return {value}\n",
    )
code(
    "an input that contains itself",
    "def fourfold_root(x, scale=4.0):\n    import gc\n    for one in gc.get_referrers(x):\n"
    "        if isinstance(one, dict) and 'x' in one: one['x'] = one\n    return x\n",
)
for what, value in {
    "too large": "10**400",
    "much too large": "10**10_000",
    "deep": "[[[[[[[[[[]]]]]]]]]]",
    "bottomless": "[]\nfor _ in range(2_000): guess_number = [guess_number]",
    "a loop": "[]\nguess_number.append(guess_number)",
    "many": "[1] * 1_000_000",
    "no number": "float('nan')",
    "without end": "'9' * 5_000_000",
}.items():
    ATTACKS.append(
        Attack(
            f"a prediction that is {what}",
            {"guess_number": f"guess_number = {value}", "guess_root": 'guess_root = "b"', "Counter": COUNTER},
            COUNTS | {"check-guess_root": 1.0},
        )
    )


@files("a picture with a long name", FULL)
def long_name(folder: Path) -> None:
    (folder / ("p" * 246 + ".png")).write_bytes(b"a picture")


@files("a time in a file's own words", FULL)
def time_of_a_file(folder: Path) -> None:
    (folder / "timestamp.txt").write_text("2026-05-01 12:00:00 /etc/passwd")


@files("a time in a zone above", FULL)
def time_of_a_file_above(folder: Path) -> None:
    (folder / "timestamp.txt").write_text("2026-05-01 12:00:00 ../../../../etc/passwd")


@files("20,500 data files", FULL)
def many_data_files(folder: Path) -> None:
    (folder / "data").mkdir()
    for number in range(20_500):
        (folder / "data" / f"{number}.csv").touch()


@files("folders without a floor", FULL)
def deep_folders(folder: Path) -> None:
    for _ in range(60):
        folder = folder / "deeper"
        folder.mkdir()
        (folder / "data.csv").write_text("1")


@files("many cells that bind many names", FULL)
def many_names(folder: Path) -> None:
    def add(document: dict) -> None:
        names = ["\n".join(f"name_{n}_{m} = {m}" for m in range(60)) for n in range(1_500)]
        document["cells"] += [
            document["cells"][0]
            | {
                "cell_type": "code",
                "source": text,
                "id": f"c{n}",
                "metadata": {},
                "outputs": [],
                "execution_count": None,
            }
            for n, text in enumerate(names)
        ]

    rewrite(folder, add)


@files("more cells than there may be", NOTHING)
def millions_of_cells(folder: Path) -> None:
    rewrite(folder, lambda document: document.update(cells=[{}] * 500_000))


@files("mathematics without end", FULL, SOLVED | {"why_count": "\\\\(" * 24_000})
def mathematics(folder: Path) -> None:
    pass


@files("the answers in a copy beside the blank one", FULL)
def copy_1(folder: Path) -> None:
    solved = notebook_of(folder).read_text()
    rewrite(folder, blank)
    (folder / f"{folder.name}-Copy1.ipynb").write_text(solved)


@files("a folder in the folder", FULL)
def folder_in_folder(folder: Path) -> None:
    (folder / folder.name).mkdir()
    notebook_of(folder).rename(folder / folder.name / f"{folder.name}.ipynb")


def blank(document: dict) -> None:
    for cell in document["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("solution"):
            cell["source"] = ""
