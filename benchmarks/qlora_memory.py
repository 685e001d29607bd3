"""The peak memory of fine-tuning GPT-2 small with QLoRA over that with LoRA, each in a fresh process.

    python -m benchmarks.qlora_memory [--batch 1] [--tokens 64] [--steps 2] [--rounds 3] [--checkpointing]

Counted is the most memory that the process held above what it held before the model was built: loading, forward,
backward and AdamW. The code that PyTorch imports on the way is not counted: a tiny model goes first. LoRA's model is
built in its place, so that nothing is ever there twice; QLoRA's comes from a checkpoint with the same random weights,
one layer at a time (`load_quantized`). Goal: at most 0.75. A larger batch brings the two nearer to each other, as
their activations are the same; checkpointing takes them apart. The peak of QLoRA differs from process to process: the
weights that it makes and throws away leave holes, and how C's allocator fills them is luck.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import torch

from benchmarks.lora_vs_peft import MiB, base_model, training_step
from lora_from_scratch.finetune.peak_memory import PeakMemory
from lora_from_scratch.gpt2.checkpoint import save_gpt2
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.qlora import QLoRA, load_quantized

GOAL = 0.75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=["small", "tiny"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each; the median counts")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in both")
    parser.add_argument("--one", choices=["lora", "qlora"], help=argparse.SUPPRESS)  # what the fresh processes run
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        warm_up(args.one, args)
        print(json.dumps(one(args.one, args.checkpoint, args)))
        return
    with tempfile.TemporaryDirectory() as checkpoint:
        save_gpt2(base_model(args.model), None, checkpoint)
        rounds = [[in_fresh_process(name, checkpoint) for name in ("lora", "qlora")] for _ in range(args.rounds)]
    print(f"{args.model}, batch {args.batch} x {args.tokens}, {args.steps} steps, checkpointing: {args.checkpointing}")
    for name, results in zip(("LoRA", "QLoRA"), zip(*rounds, strict=True), strict=True):
        built, peaks = (sorted(result[what] / MiB for result in results) for what in ("built", "peak"))
        print(f"{name:6} built {statistics.median(built):6.0f} MiB   peak {statistics.median(peaks):6.0f} MiB", end="")
        print(f" (from {peaks[0]:.0f} to {peaks[-1]:.0f})   first and last loss {results[0]['losses']}")
    ratios = sorted(qlora["peak"] / lora["peak"] for lora, qlora in rounds)
    ratio = statistics.median(ratios)
    print(f"peak ratio {ratio:.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f})", end="")
    print(f"  goal <= {GOAL} {'met' if ratio <= GOAL else 'MISSED'}")


def in_fresh_process(name: str, checkpoint: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.qlora_memory",
        *sys.argv[1:],
        "--one",
        name,
        "--checkpoint",
        checkpoint,
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def one(name: str, checkpoint: str, args: argparse.Namespace) -> dict[str, Any]:
    """Build, adapt and train one model; the peaks so far after building and at the end."""
    memory = PeakMemory(torch.device("cpu"))
    model: GPT2
    method: LoRA
    if name == "lora":
        model, method = base_model(args.model), LoRA(rank=8)
    else:
        model, method = load_quantized(checkpoint), QLoRA(rank=8, keep_base=False)
    method.adapt(model)
    model.gradient_checkpointing = args.checkpointing
    built = memory.bytes()
    torch.manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (args.batch, args.tokens))
    losses: list[float] = []

    def forward() -> torch.Tensor:
        loss = next_token_loss(model(tokens), tokens)
        losses.append(loss.item())
        return loss

    step = training_step(forward, list(method.trainable(model).values()))
    model.train()
    for _ in range(args.steps):
        step()
    return {"built": built, "peak": memory.bytes(), "losses": [round(losses[0], 3), round(losses[-1], 3)]}


def warm_up(name: str, args: argparse.Namespace) -> None:
    """The same with a tiny model: what PyTorch imports on the way is code, and no memory of the model's."""
    tiny = argparse.Namespace(**{**vars(args), "model": "tiny"})
    with tempfile.TemporaryDirectory() as checkpoint:
        save_gpt2(base_model("tiny"), None, checkpoint)
        one(name, checkpoint, tiny)


if __name__ == "__main__":
    main()
