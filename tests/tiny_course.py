"""A course with one tiny unit in a separate folder: library, checks, bank, source and nbgrader's configuration."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lora_from_scratch.checks import bank, units
from lora_from_scratch.checks.units import Unit
from lora_from_scratch.grading.building import build
from lora_from_scratch.grading.building.refused import Refused

ROOT = Path(__file__).resolve().parents[1]

LIBRARY = '''\
"""A library of two exercises."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lora_from_scratch.linear_algebra.rank import require_rank

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 100


def fourfold_root(x: Tensor, scale: float = 4.0) -> Tensor:
    """The square root of x, times four.

    Args:
        x: any shape, none below zero.

    Raises:
        ValueError: an entry is below zero.
    """
    if (x < 0).any():
        raise ValueError("x must not be below zero")
    # This comment belongs to the solution.
    return torch.sqrt(x.double()) * scale / math.cos(0.0)  # and this one too


class Counter:
    """Counts up to a largest number."""

    def __init__(self, largest: int) -> None:
        self.largest = require_rank(largest, LARGEST)
        self.count = 0

    def same(self, other: Counter) -> bool:
        """As far as the other?"""
        return self.count == other.count

    def root(self) -> Tensor:
        """The fourfold root of the count."""
        return fourfold_root(torch.tensor(self.count))

    def step(self) -> int:
        # The comment above a body belongs to it.
        self.count = (self.count + 1) % (self.largest + 1)
        return self.count
'''

CHECKS = """\
from lora_from_scratch.checks.exercise import Case, Exercise, Prediction
from tiny_library import Counter, fourfold_root

TITLE = "Tiny"


def roots(draw):
    yield Case("fours", {"x": draw.integers(4, 4, 2)}, "numbers")
    yield Case("random numbers", {"x": draw.normal(3).abs()}, "numbers")
    yield Case("below zero", {"x": -1 - draw.normal(3).abs()}, "errors")


def count(answer, largest, steps):
    counter = answer(largest)
    return [counter.step() for _ in range(steps)]


def counts(draw):
    yield Case("to 3", {"largest": 3, "steps": 6})
    yield Case("to some number", {"largest": draw.integer(4, 8), "steps": 12})


HINTS = ("One.", "Two.", "Three.")
EXERCISES = [
    Exercise(fourfold_root, idea="roots", difficulty=1, minutes=5, points=4, hints=HINTS, cases=roots),
    Exercise(
        Counter, idea="counting", difficulty=2, minutes=1, points=2, hints=HINTS, cases=counts, probe=count,
        blank=("step",),
    ),
]
PREDICTIONS = [
    Prediction("guess_root", "What is it of 9?", "b", "3 times 4 is 12.", "roots", {"a": "9", "b": "12"}),
    Prediction("guess_number", "How many?", 17.5, "It is 17 and a half.", "counting", within=1.5, points=2),
]
"""

BANK = """\
from lora_from_scratch.checks.bank import right, wrong


def enter(number):
    def root(x, scale=4.0):
        if (x < 0).any():
            raise ValueError("below zero")
        return 4 * x.double() ** 0.5 + number

    class Counts:
        def __init__(self, largest):
            self.largest, self.count = largest, number

        def step(self):
            self.count = number if self.count == self.largest + number else self.count + 1
            return self.count

    for name, answer in (("fourfold_root", root), ("Counter", Counts)):
        answer.__name__ = f"adds_{number}"
        (wrong(name, f"You are off by {number}.") if number else right(name))(answer)


for number in range(6):
    enter(number)


@right("fourfold_root")
def grows(x, scale=4.0):
    if (x < 0).any():
        raise ValueError("below zero")
    return (16 * x.double()).sqrt()


@right("Counter")
class Remainder:
    def __init__(self, largest):
        self.taken, self.largest = 0, largest

    def step(self):
        self.taken += 1
        return self.taken % (self.largest + 1)
"""

SOURCE = """\
# %% [markdown]
# # Unit 99: Tiny
#
# You will be able to count.
#
# ![A line that rises from 0 to 9.](unit_99.png)

# %%
import torch

from lora_from_scratch.checks import check, hint, library, progress, working
from lora_from_scratch.support.figures import show
from lora_from_scratch.support.plotting import panels

# %% [markdown]
# ## Roots
#
# A story about roots.

# %% prediction="guess_root"

# %% exercise="fourfold_root"

# %%
fn = working("fourfold_root")
print(fn(torch.tensor([9.0])))

# %% check="guess_root"

# %% [markdown]
# ## Counting

# %% prediction="guess_number"

# %% exercise="Counter"

# %% figure="unit_99.png"
figure, (axes,) = panels(1)
axes.plot(range(10))
show(figure, "A line that rises from 0 to 9.")

# %% check="guess_number"

# %% volatile=true
import time

print(time.time())

# %% [markdown]
# ## What goes wrong in practice
#
# Nothing.

# %% [markdown]
# ## Summary
#
# - One.

# %% [markdown]
# ## Go further
#
# Read.

# %% [markdown] open_question="why_count" points=3
# ### Why count?
#
# In two sentences.
#
# **Rubric.**
#
# - 1 point: a reason.
# - 2 points: a good one.
"""


@dataclasses.dataclass
class Course:
    root: Path
    unit: Unit

    def draft(self, source: str = SOURCE, **changes: object) -> build.Draft:
        (self.root / "course/units/unit_99.py").write_text(source)
        return build.draft(dataclasses.replace(self.unit, **changes), self.root)  # type: ignore[arg-type]

    def refusal(self, source: str = SOURCE, **changes: object) -> list[str]:
        """All problems that are reported for a source."""
        with pytest.raises(Refused) as refused:
            self.draft(source, **changes)
        return refused.value.problems


def make_course(root: Path, source: str = SOURCE) -> Path:
    """Write the course into a folder."""
    files = {
        "library/tiny_library.py": LIBRARY,
        "units/unit_99/exercises.py": CHECKS,
        "units/unit_99/answers.py": BANK,
        "course/units/unit_99.py": source,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copy(ROOT / "course" / "nbgrader_config.py", root / "course")
    return root


def enter_course(root: Path, patch: pytest.MonkeyPatch) -> Unit:
    """Make the course's library, unit and bank known to this process and those it starts, until `patch` is undone."""
    bank.exercises()  # the course's real bank is loaded, once
    patch.syspath_prepend(str(root / "library"))
    patch.setenv("PYTHONPATH", os.pathsep.join((str(root / "library"), str(ROOT))))
    patch.setenv(units.FOLDER, str(root / "units"))
    patch.delitem(sys.modules, "tiny_library", raising=False)
    patch.setattr(bank, "_bank", {name: list(answers) for name, answers in bank._bank.items()})
    patch.setattr(bank, "_load", lambda unit: None)  # all is loaded, with the next line
    load(root / "units" / "unit_99" / "answers.py")
    checks = load(root / "units" / "unit_99" / "exercises.py")
    return Unit("99", checks.TITLE, tuple(checks.EXERCISES), tuple(checks.PREDICTIONS))


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tiny_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
