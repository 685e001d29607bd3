"""The time to import the library, and each method of it, against `import torch`, each in a fresh process.

    python -m benchmarks.import_time [--rounds 3] [--methods lora dora]

The goal is a ratio of at most 1.1: importing a method should take little longer than importing torch. What is measured
is the processor time of the process, so that other programs on the machine count less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

from lora_from_scratch.methods.registry import method_classes

REFERENCE = "import torch"


def seconds(statement: str) -> float:
    """The processor time that a new Python process takes to start and to run one statement."""
    before = os.times()
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    modules = {name: cls.__module__ for name, cls in method_classes().items()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=sorted(modules), default=list(modules))
    options = parser.parse_args()
    chosen = dict.fromkeys(["lora_from_scratch", *(modules[name] for name in options.methods)])
    statements = [f"import {module}" for module in chosen]
    for statement in (REFERENCE, *statements):  # once, so that every file is in the disk cache
        seconds(statement)
    ratios: dict[str, list[float]] = {statement: [] for statement in statements}
    for _ in range(options.rounds):
        reference = seconds(REFERENCE)
        for statement in statements:  # with the reference immediately before and after
            own, after = seconds(statement), seconds(REFERENCE)
            ratios[statement].append(own / ((reference + after) / 2))
            reference = after
    width = max(map(len, statements))
    for statement, values in ratios.items():
        middle = statistics.median(values)
        print(f"{statement:<{width}} / {REFERENCE}: {middle:.2f}  from {min(values):.2f} to {max(values):.2f}")


if __name__ == "__main__":
    main()
