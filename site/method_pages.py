"""A page for each method: equation, use, hyperparameters, place in the atlas, and code without solutions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType

from api_pages import first_paragraph
from atlas_pages import place_in_atlas

from benchmarks.methods_table import facts, hyperparameters, use
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.grading.building.solution import BEGIN, END, solved_source
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.registry import method_classes

HEAD = """\
# The methods

Every method is one file of the library and follows the same interface,
[`Method`](../api/lora_from_scratch.methods.method.rst).

| Method | Idea | Mergeable | Works on |
|---|---|---|---|
"""


def method_pages() -> Iterator[tuple[str, str]]:
    """The overview, then one page for each method of the registry."""
    classes = method_classes()
    rows = [
        f"| [`{name}`]({name}.md) | {first_paragraph(cls.__module__)} | {'yes' if cls.can_merge else 'no'} "
        f"| {'this GPT-2' if cls.needs_gpt2 else 'any model'} |\n"
        for name, cls in classes.items()
    ]
    contents = "\n```{toctree}\n:hidden:\n\n" + "".join(f"{name}\n" for name in classes) + "```\n"
    yield "methods/index.md", HEAD + "".join(rows) + contents
    for name, cls in classes.items():
        yield f"methods/{name}.md", method_page(cls)


def method_page(cls: type[Method]) -> str:
    module = sys.modules[cls.__module__]
    built = exercises_of(module)
    parts = [
        f"# `{cls.name}`",
        str(inspect.getdoc(module)),
        use(cls).strip(),
        "## At a glance",
        "".join(f"- {fact[0].upper()}{fact[1:]}\n" for fact in facts(cls)),
        f"```bash\nlora-from-scratch finetune --method {cls.name}\n```",
    ]
    if table := hyperparameters(cls):
        parts.append(f"## Hyperparameters\n{table}")
    if figure := place_in_atlas(cls):
        parts.append(f"## In the atlas\n\n{figure}")
    if built:
        units_of = {unit.number: unit for unit, _ in built}.values()
        links = [f"[{u.number} {u.title}](../notebooks/unit_{u.number}/unit_{u.number}.ipynb)" for u in units_of]
        parts.append(f"## Build it yourself\n\nParts of this file are exercises of {' and '.join(links)}.")
    file = module.__name__.replace(".", "/") + ".py"
    left_out = " The bodies of exercises are left out." if built else ""
    parts.append(
        f"## Code\n\n[`{file}`](../api/{module.__name__}.rst) is documented under the API.{left_out}\n\n"
        f"````{{dropdown}} {file}\n```python\n{unsolved(module)}\n```\n````"
    )
    return "\n\n".join(parts) + "\n"


def exercises_of(module: ModuleType) -> list[tuple[Unit, Exercise]]:
    """The exercises whose solutions are in this module."""
    return [(u, e) for u in units() for e in u.exercises if inspect.unwrap(e.object).__module__ == module.__name__]


def unsolved(module: ModuleType) -> str:
    """The source of a module in which `raise NotImplementedError` replaces the body of each exercise.

    Raises:
        ValueError: the source of an exercise is not in that of the module, so its body cannot be taken out.
    """
    text = inspect.getsource(module).rstrip("\n")
    for unit, exercise in exercises_of(module):
        whole = inspect.getsource(inspect.unwrap(exercise.object)).rstrip("\n")
        if text.count(whole) != 1:
            raise ValueError(f"the source of {exercise.name} is not in {module.__name__}")
        text = text.replace(whole, without_body(exercise, unit))
    return text


def without_body(exercise: Exercise, unit: Unit) -> str:
    kept: list[str] = []
    inside = False
    for line in solved_source(exercise.object, exercise.blank).splitlines():
        mark = line.strip()
        if mark == BEGIN:
            kept.append(line.replace(BEGIN, f"raise NotImplementedError  # an exercise of unit {unit.number}"))
        if mark in (BEGIN, END):
            inside = mark == BEGIN
        elif not inside:
            kept.append(line)
    return "\n".join(kept)
