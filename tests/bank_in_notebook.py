"""A cell for notebooks in tests: it lets a file of the bank run in the sandbox, where the bank does not exist.

The answers that a file of the bank registers are kept in `ANSWERS`. An answer that builds on the library's version of
an exercise of the unit (a class that changes one method, a function that calls another) builds on the version written
in the notebook instead, as it would for a learner: `OWN`.
"""

from __future__ import annotations

import ast
import importlib
import sys
import types

ANSWERS, OWN, HOMES = {}, {}, {}


def enter(exercise, *arguments, **options):
    def keep(target):
        ANSWERS[exercise, target.__name__.replace("_", " ").strip()] = target
        return target

    return keep


bank = types.ModuleType("lora_from_scratch.checks.bank")
bank.right = bank.wrong = enter
sys.modules[bank.__name__] = bank


def run(source):
    """Run a file of the bank as if every statement were in its own cell."""
    names = {"__name__": "__main__"}
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
