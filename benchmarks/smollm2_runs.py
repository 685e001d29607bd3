"""One run of `benchmarks.smollm2`, in a process of its own: fine-tune SmolLM2 with one method and measure everything.

python -m benchmarks.smollm2_runs base FOLDER        the model itself, and a text sampled from it
python -m benchmarks.smollm2_runs METHOD FOLDER --rate RATE [--seed 0]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.smollm2_rates import settings_for
from benchmarks.smollm2_weights import origin, round_again
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.data import Dataset, Example, references_by_mr
from lora_from_scratch.finetune.evaluation import first_cards, perplexity, tale_perplexity, text_drawn_from, write_texts
from lora_from_scratch.finetune.metrics import bleu, completion_loss, divergence_from_base, slot_error_rate
from lora_from_scratch.finetune.peak_memory import peak_resident_bytes
from lora_from_scratch.finetune.tasks import load_dataset
from lora_from_scratch.finetune.training import Trainer
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.registry import for_training, method_class
from lora_from_scratch.models.checkpoint import AnyTokenizer, LanguageModel, load_language_model
from lora_from_scratch.support.files import write_json

MODEL = "smollm2"
STEPS, BATCH_SIZE = 24, 4
CARDS = 24  # of the test set
DRAWN = "drawn.pt"  # the text that the base model wrote, in the folder of results
ROWS, TOKENS = 8, 64  # of that text
ROUNDED_AGAIN = ("full", "lora")  # whose weights are rounded to Q4_1 after training


def precision() -> str:
    """bf16 if the processor multiplies it (AVX-512 BF16 or AMX), else fp32."""
    file = Path("/proc/cpuinfo")
    flags = file.read_text() if file.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def base_result(folder: Path) -> dict[str, Any]:
    """The scores of the model itself, and the measurements of its weights."""
    began = time.process_time()
    model, tokenizer = load_language_model(MODEL)
    torch.save(text_drawn_from(model, tokenizer, ROWS, TOKENS), folder / DRAWN)
    scores = {**_scores(model, tokenizer, load_dataset("story-cards")), "divergence": 0.0}
    return {"scores": scores, "origin": asdict(origin(model)), "cpu_seconds": time.process_time() - began}


def result(name: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Fine-tune and measure."""
    began = time.process_time()
    method = for_training(method_class(name), seed)
    data = load_dataset("story-cards")
    model, tokenizer = method.load_base(MODEL)
    training, trained = _train(method, model, tokenizer, data, rate, seed)
    peak = peak_resident_bytes()
    base, _ = load_language_model(MODEL)
    drawn = torch.load(folder / DRAWN, weights_only=True)
    scores = {
        **_scores(model, tokenizer, data),
        "divergence": divergence_from_base(model, base, drawn),
    }
    again = None
    if name in ROUNDED_AGAIN:
        if method.can_merge:
            method.merge(model)
        update = round_again(model, base)
        again = {"update": asdict(update), "perplexity": _perplexity(model, tokenizer, data)}
    return {
        "trained": trained,
        "training_cpu_seconds": training,
        "cpu_seconds": time.process_time() - began,
        "peak_bytes_training": peak,
        "peak_bytes": peak_resident_bytes(),
        "scores": scores,
        "rounded_again": again,
    }


def _train(
    method: Method, model: LanguageModel, tokenizer: AnyTokenizer, data: Dataset, rate: float, seed: int
) -> tuple[float, int]:
    """Seconds of the processor, and the number of trained parameters."""
    method.adapt(model)
    completions = Completions(data.train, tokenizer, model.config.n_positions)
    trainer = Trainer(
        model,
        lambda step: completions.batch_at(step, BATCH_SIZE, seed),
        settings_for(STEPS, rate, precision(), seed),
        method=method,
        progress=False,
    )
    began = time.process_time()
    trainer.run()
    return time.process_time() - began, sum(p.numel() for p in trainer.trainable.values())


def _scores(model: LanguageModel, tokenizer: AnyTokenizer, data: Dataset) -> dict[str, float]:
    references = references_by_mr(first_cards(data.test, CARDS))
    texts = write_texts(model, tokenizer, list(references))
    return {
        "bleu": bleu(texts, list(references.values())),
        "slot_errors": slot_error_rate(texts, list(references), data.lexicon),
        "perplexity": _perplexity(model, tokenizer, data),
        "tale_perplexity": tale_perplexity(model, tokenizer),
    }


def _perplexity(model: LanguageModel, tokenizer: AnyTokenizer, data: Dataset) -> float:
    """Of the first reference of each test card."""
    references = references_by_mr(first_cards(data.test, CARDS))
    firsts = sorted((Example(mr, refs[0]) for mr, refs in references.items()), key=lambda e: len(e.mr) + len(e.ref))
    return perplexity(
        completion_loss(model, Completions(firsts, tokenizer, model.config.n_positions).batches(batch_size=8))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.method == "base":
        write_json(options.folder / "base.json", base_result(options.folder))
        return
    found = {"method": options.method, "seed": options.seed, "rate": options.rate}
    found |= result(options.method, options.rate, options.seed, options.folder)
    write_json(options.folder / f"{options.method}-{options.seed}.json", found)


if __name__ == "__main__":
    main()
