"""The time of `import lora_from_scratch` against `import torch`, each in a fresh process.

    python -m benchmarks.import_time

The goal is a ratio of at most 1.3: whoever uses a part of the library should wait for that part and for torch.
`lora_from_scratch.methods.lora` stands for such a part.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

STATEMENTS = ("import lora_from_scratch", "import lora_from_scratch.methods.lora")
REFERENCE = "import torch"


def seconds(statement: str) -> float:
    """How long a new Python takes to start and to run one statement."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    for statement in (REFERENCE, *STATEMENTS):  # once, so that every file has been read from the disk
        seconds(statement)
    ratios: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for _ in range(rounds):
        for statement in STATEMENTS:  # with the reference on both sides, in the same quarter of a minute
            before, own, after = seconds(REFERENCE), seconds(statement), seconds(REFERENCE)
            ratios[statement].append(own / ((before + after) / 2))
    for statement, values in ratios.items():
        middle = statistics.median(values)
        print(f"{statement:<32} / {REFERENCE}: {middle:.2f}  from {min(values):.2f} to {max(values):.2f}")


if __name__ == "__main__":
    main()
