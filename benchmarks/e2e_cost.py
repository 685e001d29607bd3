"""What `lora-from-scratch e2e` costs on a GPT-2 small or medium: seconds for a training step and for decoding.

    python -m benchmarks.e2e_cost --data E2E [--sizes small medium] [--steps 3] [--meanings 4] [--vocabulary DIR]

The weights are random, so that nothing has to be downloaded: the time of a step does not depend on their values, but a
random model never ends a text by itself, so every text has the maximum length of 64 tokens. Seconds are those of the
processor (`time.process_time`), with one thread. `--vocabulary` is a directory with GPT-2's vocab.json and merges.txt;
without it the bundled tokenizer cuts the texts into more tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from lora_from_scratch.compare.lora_paper import Recipe
from lora_from_scratch.finetune.completions import Completions, prompt_text
from lora_from_scratch.finetune.data import Dataset, references_by_mr
from lora_from_scratch.finetune.label_smoothing import LabelSmoothing, labels_of
from lora_from_scratch.finetune.peak_memory import PeakMemory
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer
from lora_from_scratch.gpt2.checkpoint import load_tokenizer
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer

SIZES = {"small": (768, 12, 12), "medium": (1024, 24, 16), "large": (1280, 36, 20)}  # width, blocks, heads
TRAINING_PAIRS, TEST_MEANINGS = 42_061, 630  # of E2E


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(size: str, dataset: Dataset, tokenizer: Tokenizer, steps: int, meanings: int) -> tuple[float, float, int]:
    """Seconds for a training step (the median, without the first) and for a meaning, and the peak memory in bytes."""
    width, blocks, heads = SIZES[size]
    end = tokenizer.eos_id
    torch.manual_seed(0)
    model = GPT2(
        GPT2Config(
            n_embd=width,
            n_layer=blocks,
            n_head=heads,
            vocab_size=tokenizer.vocab_size,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    recipe, memory = Recipe(), PeakMemory(torch.device("cpu"))
    method = recipe.method(0)
    method.adapt(model)
    completions = Completions(dataset.train, tokenizer, model.config.n_positions)
    trainer = Trainer(
        LabelSmoothing(model, recipe.label_smoothing),
        lambda step: labels_of(completions.batch_at(step, recipe.batch_size, 0)),
        recipe.training(1, 0),
        method=method,
        progress=False,
    )
    times = []
    for step in range(steps + 1):
        trainer.step, trainer.settings = step, recipe.training(step + 1, 0)
        times.append(seconds(trainer.run))
    prompts = [tokenizer.encode(prompt_text(mr)) for mr in list(references_by_mr(dataset.test))[:meanings]]
    decoding = seconds(
        lambda: generate(
            model,
            prompts,
            max_new_tokens=recipe.max_new_tokens,
            num_beams=recipe.beams,
            length_penalty=recipe.length_penalty,
            no_repeat_ngram_size=recipe.no_repeat_ngram_size,
            eos_id=end,
        )
    )
    return median(times[1:]), decoding / len(prompts), memory.bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an E2E CSV file or directory")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "medium"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--meanings", type=int, default=4)
    parser.add_argument("--vocabulary", default="bundled")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset, tokenizer = load_dataset(options.data), load_tokenizer(options.vocabulary)
    steps = Recipe().steps_for(TRAINING_PAIRS)
    print("| GPT-2 | s per step | hours of training | s per meaning | hours of decoding | peak memory |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    for size in options.sizes:
        step, meaning, peak = measure(size, dataset, tokenizer, options.steps, options.meanings)
        cells = (step, step * steps / 3600, meaning, meaning * TEST_MEANINGS / 3600)
        print(f"| {size} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {peak / 1e9:.1f} GB |", flush=True)


if __name__ == "__main__":
    main()
