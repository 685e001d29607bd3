"""Generate many LoRA adapters with random weights, for trying the server.

    python -m benchmarks.make_adapters adapters --count 1000 --model bundled --ranks 4 32
    lora-from-scratch serve --adapters adapters

Each adapter is a directory `adapter-0000`, ... in PEFT's format. It adapts every linear layer, with a rank drawn from
the range. Only `--distinct` weight files are written; the other adapters are hard links to them, which a server cannot
distinguish from copies.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
from pathlib import Path

import torch

from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lora_from_scratch.methods.lora import LoRA, lora_layers


def config_of(model: str) -> GPT2Config:
    """The configuration of "small" (GPT-2 small), or of a model that `load_gpt2` can load."""
    return GPT2Config() if model == "small" else GPT2Config.from_json(checkpoint_directory(model) / "config.json")


def name_of(number: int) -> str:
    return f"adapter-{number:04}"


def make_adapters(folder: Path, count: int, config: GPT2Config, ranks: tuple[int, int], distinct: int) -> None:
    """Write the adapters. Existing ones are kept."""
    draw = random.Random(0)
    for number in range(count):
        rank = draw.randint(*ranks)
        place = folder / name_of(number)
        if (place / WEIGHTS_FILE).exists():
            continue
        if number < distinct:
            write_one(place, config, rank, number)
            continue
        original = folder / name_of(number % distinct)
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(original / CONFIG_FILE, place)
        os.link(original / WEIGHTS_FILE, place / WEIGHTS_FILE)


def write_one(place: Path, config: GPT2Config, rank: int, seed: int) -> None:
    with torch.device("meta"):  # the base's weights are not needed
        model = GPT2(config)
    method = LoRA(rank=rank, alpha=2 * rank)
    method.adapt(model)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        for name, std in (("lora_A", 0.02), ("lora_B", 0.01)):
            drawn = std * torch.randn(getattr(layer, name).shape, generator=generator)
            setattr(layer, name, torch.nn.Parameter(drawn))
    method.save(model, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--model", default="bundled", help='"small" for GPT-2 small, or a model as for `serve`')
    parser.add_argument("--ranks", type=int, nargs=2, default=[4, 32], metavar=("LEAST", "MOST"))
    parser.add_argument("--distinct", type=int, default=64, metavar="N")
    arguments = parser.parse_args()
    config = config_of(arguments.model)
    make_adapters(arguments.folder, arguments.count, config, tuple(arguments.ranks), arguments.distinct)
    print(f"{arguments.count} adapters for {arguments.model} in {arguments.folder}")


if __name__ == "__main__":
    main()
