"""The memory of a training step, predicted and measured, for every method; writes memory_accounting.md.

    python -m benchmarks.memory_accounting [--only bundled] [--precision bf16]

On the bundled model's shape as in the demo (8 texts of 128 tokens, with padding), and on GPT-2 small with random
weights (4 x 128). Measured are the bytes of all live tensors in the second of two steps (`LiveMemory`), which depends
neither on the machine's speed nor on its load. Where the method leaves the choice, no copy of the base is kept for
`undo`. Each line takes two steps and the making of the model: some minutes for all of GPT-2 small.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_from_scratch.methods.registry import METHODS, method_class

from lora_from_scratch.finetune.accounting import MemoryBudget, measured_memory, predicted_memory
from lora_from_scratch.gpt2.checkpoint import BUNDLED, checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.method import Method

OUTPUT = Path(__file__).with_suffix(".md")
MiB = 2**20
PARTS = ("weights", "gradients", "optimizer", "activations", "transient")
HEADINGS = ("method", *PARTS, "peak", "measured", "ratio", "worst part", "when")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["bundled", "small"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    args = parser.parse_args()
    off: dict[str, Any] = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    bundled = GPT2Config.from_json(checkpoint_directory(BUNDLED) / "config.json")
    plan: dict[str, tuple[str, GPT2Config, int, dict[str, Any]]] = {
        "bundled": ("The bundled model, 8 x 128, with padding", bundled, 8, {"padded": True}),
        "small": ("GPT-2 small, 4 x 128, no dropout", GPT2Config(**off), 4, {}),
    }
    lines = [
        "# Memory of a training step: predicted and measured",
        "",
        f"`python -m benchmarks.memory_accounting --precision {args.precision}`; on a CPU, MiB. The parts and the peak",
        'are predicted; each part at its largest, so the peak is less than their sum. "Ratio" is predicted over',
        'measured peak, "worst part" the ratio of the part that is predicted least well, "when" the moment of the',
        "peak.",
    ]
    for name, (title, config, batch, how) in plan.items():
        if args.only in (None, name):
            lines += ["", f"## {title}", "", row(HEADINGS), row(["---", *["---:"] * 9, "---"])]
            for method in methods():
                lines.append(compare(config, method, batch, {"precision": args.precision, **how}))
                print(lines[-1], flush=True)
    OUTPUT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def methods() -> list[Method]:
    """Every method with its defaults, but without a copy of the base."""
    classes = [method_class(name) for name in METHODS]
    return [cls(**({"keep_base": False} if "keep_base" in names(cls) else {})) for cls in classes]


def names(cls: Any) -> set[str]:
    return {field.name for field in fields(cls)}


def compare(config: GPT2Config, method: Method, batch: int, how: dict[str, Any]) -> str:
    """One line of the table."""
    predicted = predicted_memory(config, method, batch, 128, **how)
    measured = measured_memory(config, method, batch, 128, **how)
    gc.collect()
    ratios = [getattr(predicted, part) / getattr(measured, part) for part in PARTS]
    return row(
        [
            method.name,
            *(mib(predicted, part) for part in (*PARTS, "total")),
            mib(measured, "total"),
            f"{predicted.total / measured.total:.3f}",
            f"{max(ratios, key=lambda ratio: abs(ratio - 1)):.3f}",
            predicted.peak_moment,
        ]
    )


def mib(budget: MemoryBudget, part: str) -> str:
    return f"{getattr(budget, part) / MiB:,.1f}"


def row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
