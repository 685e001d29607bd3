"""The time of the fine-tuning units on GPT-2 small: solved notebooks, run from top to bottom with random weights.

    python -m benchmarks.units_on_gpt2 [UNIT ...] [--steps N] [--vocabulary DIR] [--model DIR]

The time does not depend on the values of the weights, with one exception: a random model never ends a text by itself,
so generated texts have the maximum length, and the real GPT-2 is faster there. With `--vocabulary DIR` (a directory
with GPT-2's own vocab.json and merges.txt) the model has all of GPT-2's 50,257 tokens, without it the bundled model's
4,096. `--model` selects another model, such as `bundled` for comparison. Without `--steps` each training run has the
number of steps given in the unit. A kernel has one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
import torch

from lora_from_scratch.gpt2.checkpoint import load_tokenizer, save_gpt2
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.grading.building import execution

ROOT = Path(__file__).resolve().parents[1]
FINE_TUNING = ("04", "05", "06", "07", "08", "09", "10", "11", "13", "14")
SECONDS_A_CELL = 4 * 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("units", nargs="*", default=FINE_TUNING, metavar="UNIT", help="such as 09 (all that fine-tune)")
    parser.add_argument("--steps", type=int, help="steps per training run (as in the unit)")
    parser.add_argument("--vocabulary", default="bundled", help="a directory with GPT-2's vocab.json and merges.txt")
    parser.add_argument("--model", help="a checkpoint directory, or bundled (default: random weights)")
    args = parser.parse_args()
    if unknown := sorted(set(args.units) - set(FINE_TUNING)):
        parser.error(f"these units do not fine-tune: {', '.join(unknown)}; allowed: {', '.join(FINE_TUNING)}")
    execution.SECONDS_A_CELL = SECONDS_A_CELL
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            random_gpt2(Path(folder), vocabulary=args.vocabulary)
        print("| unit | wall min | CPU min | peak MiB |\n|---|---|---|---|", flush=True)
        for unit in args.units:
            started = time.monotonic()
            cost = run_unit(f"unit_{unit}", args.model or folder, args.steps)
            wall = time.monotonic() - started
            print(f"| {unit} | {wall / 60:.1f} | {cost.seconds / 60:.1f} | {cost.mebibytes:,.0f} |", flush=True)


def random_gpt2(folder: Path, width: int = 768, vocabulary: str | Path = "bundled") -> None:
    """Write a checkpoint with GPT-2 small's depth, heads and context, random weights, and the given vocabulary."""
    tokenizer = load_tokenizer(vocabulary)
    end = tokenizer.eos_id
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_embd=width, vocab_size=tokenizer.vocab_size, bos_token_id=end, eos_token_id=end))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # a trained model has no all-zero biases
                parameter.normal_(std=0.02)
    save_gpt2(model, tokenizer, folder)


def run_unit(name: str, model: str | Path, steps: int | None = None) -> execution.Cost:
    """Run a unit's solved notebook on a model, with `steps` steps per training run.

    Raises:
        RuntimeError: a cell raised an error or was not run.
    """
    solved = nbformat.read(ROOT / "solutions" / name / f"{name}.ipynb", as_version=4)
    model_setting, steps_setting = execution.SETTINGS
    cost = execution.execute(
        solved, settings={model_setting: str(model)} | ({steps_setting: str(steps)} if steps else {})
    )
    for cell in solved.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                raise RuntimeError(f"{name}: {output.ename}: {output.evalue}, in the cell\n{cell.source}")
    if not all(cell.execution_count for cell in solved.cells if cell.cell_type == "code"):
        raise RuntimeError(f"{name}: not all cells have run")
    return cost


if __name__ == "__main__":
    main()
