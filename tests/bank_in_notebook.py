"""A cell for notebooks in tests: it lets a file of the bank run in the sandbox, where the bank does not exist.

The answers that a file of the bank registers are kept in `ANSWERS`. An answer that builds on the library's version of
an exercise of the unit (a class that changes one method, a function that calls another) builds on the version written
in the notebook instead, as it would for a learner: `OWN`.
"""

from __future__ import annotations

import ast
import importlib
import inspect  # noqa: F401 (for `changed`)
import linecache  # noqa: F401
import sys
import types

ANSWERS, OWN, HOMES = {}, {}, {}


def enter(exercise, *arguments, **options):
    def keep(target):
        ANSWERS[exercise, target.__name__.replace("_", " ").strip()] = target
        return target

    return keep


def keep(empty):
    """Instead of `changed` where bodies are taken out: there, no wrong answer is tried.

    `changed` itself is put behind this file: see `sandboxes.BANK`.
    """
    return empty


bank = types.ModuleType("lora_from_scratch.checks.bank")
bank.right = bank.wrong = enter
bank.changed = lambda reference, *pieces: keep if reference in OWN.values() else changed(reference, *pieces)  # noqa: F821
sys.modules[bank.__name__] = bank


def run(source, module):
    """Run a file of the bank as if every statement were in its own cell; other files may import from it by its name."""
    sys.modules[module] = types.ModuleType(module)
    names = vars(sys.modules[module])
    names["__name__"] = "__main__"
    for statement in ast.parse(source).body:
        code = compile(ast.Module([statement], []), "<bank>", "exec", annotations.compiler_flag, dont_inherit=True)
        exec(code, names)
        if isinstance(statement, ast.ImportFrom):
            names.update((name, own) for name, own in OWN.items() if name in names)


def solve(module, name, source):
    """Define an exercise in the notebook from the library's source, like a learner who has solved it."""
    names = HOMES.setdefault(module, dict(vars(importlib.import_module(module))))
    names.update((other, own) for other, own in OWN.items() if other in names)
    exec(compile(source, "<solved>", "exec", annotations.compiler_flag, dont_inherit=True), names)
    OWN[name] = names[name]
