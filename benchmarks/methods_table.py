"""Write docs/methods.md from the attributes and docstrings of the methods.

python -m benchmarks.methods_table
"""

from __future__ import annotations

import argparse
import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.registry import method_classes

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
HEAD = """\
# The methods

This file is written by `python -m benchmarks.methods_table`.
"""


def page() -> str:
    return HEAD + "".join(section(cls) for cls in method_classes().values())


def section(cls: type[Method]) -> str:
    """A heading, what it is and what it is for, and a table of hyperparameters."""
    file = cls.__module__.replace(".", "/") + ".py"
    told = "; ".join([f"[`{Path(file).name}`](../{file})", *facts(cls)])
    return f"\n## `{cls.name}`\n\n{summary(cls)}\n{use(cls)}\n{told}.\n{hyperparameters(cls)}"


def summary(cls: type[Method]) -> str:
    """The first paragraph of the class's docstring, on one line."""
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")


def use(cls: type[Method]) -> str:
    """What it is for: a paragraph after a blank line, or nothing."""
    return f"\n**Use it when** {cls.use_when}.\n" if cls.use_when else ""


def facts(cls: type[Method]) -> list[str]:
    rates = cls.learning_rates
    return [
        f"PEFT's name: `{cls.peft_type}`" if known_to_peft(cls) else "not in PEFT",
        "can be merged into the weights" if cls.can_merge else "cannot be merged",
        "works only on this package's GPT-2" if cls.needs_gpt2 else "works on any model",
        f"learning rate {rates.bundled:g} on the bundled model, {rates.large:g} on larger ones ({rates.source})",
    ]


def hyperparameters(cls: type[Method]) -> str:
    """A table after a blank line, or nothing."""
    rows = [f for f in fields(cls) if "help" in f.metadata]
    if not rows:
        return ""
    lines = [f"| `{f.name}` | `{written(f.default)}` | {f.metadata['help']} |\n" for f in rows]
    return "".join(["\n| Hyperparameter | Default | |\n|---|---|---|\n", *lines])


def known_to_peft(cls: type[Method]) -> bool:
    return bool(cls.peft_type) and not cls.peft_type.startswith("LORA_FROM_SCRATCH_")


def written(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value) or "none"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
