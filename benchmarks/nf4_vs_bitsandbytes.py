"""NF4 of a 4096 x 4096 weight: our time over bitsandbytes' on the CPU, alternating in one run.

    python -m benchmarks.nf4_vs_bitsandbytes [--rounds 5] [--size 4096] [--threads 2]

Each round times ours and theirs one after the other; the ratio is that of the medians. Goals: quantise at most 0.6;
dequantise at most 1.2 in float32 and 1.5 in bfloat16, where bitsandbytes has AVX-512 kernels that read and write each
number once, and ours is composed of PyTorch operations. With one thread the processor time of the thread is taken, so
that other programs on the machine count less.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from lora_from_scratch.quantization.quantized_tensor import quantize_4bit

GOALS = {
    ("quantise", torch.float32): 0.6,
    ("dequantise", torch.float32): 1.2,
    ("quantise", torch.bfloat16): 0.6,
    ("dequantise", torch.bfloat16): 1.5,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional as bnb

    print(f"{args.size} x {args.size}, {args.threads} threads, {args.rounds} rounds, medians")
    print(f"{'':24}{'ours':>10}{'bnb':>10}{'ratio':>8}  goal")
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0)).to(dtype)
        for name, (ours, theirs) in jobs(weight, bnb).items():
            mine, other = in_turns(ours, theirs, args.rounds)
            goal = GOALS[name, dtype]
            verdict = f"<= {goal}" + (" met" if mine / other <= goal else " MISSED")
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            print(f"{label:24}{1e3 * mine:7.0f} ms{1e3 * other:7.0f} ms{mine / other:8.2f}  {verdict}")


def jobs(weight: torch.Tensor, bnb: Any) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """The functions to compare, after a check that both sides give the same result."""
    ours = quantize_4bit(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    if not torch.equal(ours.packed, packed) or not torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state)):
        raise ValueError("the results of the two sides differ, so their times cannot be compared")
    return {
        "quantise": (
            lambda: quantize_4bit(weight),
            lambda: bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"),
        ),
        "dequantise": (ours.dequantize, lambda: bnb.dequantize_4bit(packed, state)),
    }


def in_turns(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """The median seconds of each, measured alternately, after one warm-up call."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: tuple[list[float], list[float]] = ([], [])
    for warm_up in (True, *[False] * rounds):
        for taken, call in zip(seconds, (ours, theirs), strict=True):
            start = clock()
            call()
            if not warm_up:
                taken.append(clock() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
