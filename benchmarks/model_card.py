"""Write the bundled model's card: everything in it that is a number or a text of the model is measured here.

    python -m benchmarks.model_card CORPUS [--titles TITLE ...]

CORPUS is the file that the model was pretrained on; TITLES are those of the held-out books, in their order.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from lora_from_scratch.finetune.evaluation import tale_perplexity
from lora_from_scratch.finetune.pretraining import PretrainingSettings, held_out_loss, read_books
from lora_from_scratch.gpt2.checkpoint import BUNDLED_DIRECTORY, load_gpt2
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.support.files import write_atomically

PROMPTS = ("Once upon a time there was a woodcutter", "The old woman", '"Where are you going?"', "In the morning")

CARD = """\
# The bundled GPT-2

A GPT-2 in Hugging Face's own layout, made for the course: small enough for a laptop, real enough to be adapted. It has
read fairy tales and children's novels, and nothing else. `transformers` loads this directory too.

Written by `python -m benchmarks.model_card`; the numbers and the texts below were measured on the weights in this
directory.

## Configuration

{configuration}

## Data

{books} English children's books in the public domain ({characters:.1f} MB, from Project Gutenberg; headers, footers,
headings and notes removed, straightened to ASCII): the coloured fairy books of Andrew Lang, Grimm, Andersen, the Oz
books, Alice, The Jungle Books, Peter Pan and others. The last {held_out} books of the file were held out whole: neither
the model nor its tokenizer has seen a line of them.

## Training

`lora-from-scratch pretrain --corpus tales.txt.gz`: {training}

## How well it does

Windows of {context} tokens; the first token of a window is not predicted. Nats per token of this tokenizer.

| text | tokens | loss | perplexity | bits per character |
|---|---:|---:|---:|---:|
{losses}

The perplexity of the project's own tales (`assets/tales.txt`, read by nobody), each from its beginning: {tales:.1f}.

## What it writes

Drawn by seeds 0, 1, 2, ... at temperature 0.8, top-p 0.95, the first text of each; not chosen by hand.

{samples}

## Limits

It knows no facts, no languages but English, nothing after 1930, and it follows no instructions. It loses the thread
after a few sentences. Its sources hold the prejudices of their time about peoples, women, disability and class; so can
its texts. It is for learning how models are adapted, and for nothing else.

## Licence

The books are in the public domain; the weights are under the project's MIT licence.
"""


def loss_row(name: str, text: str, model: GPT2, tokenizer: Tokenizer) -> str:
    ids = torch.tensor([*tokenizer.encode(text), tokenizer.eos_id])
    loss = held_out_loss(model, ids, model.config.n_positions)
    bits = loss / math.log(2) * len(ids) / len(text)
    return f"| {name} | {len(ids):,} | {loss:.3f} | {math.exp(loss):.1f} | {bits:.3f} |"


def samples(model: GPT2, tokenizer: Tokenizer) -> str:
    written = []
    for seed, prompt in enumerate(PROMPTS):
        [new] = generate(
            model,
            [tokenizer.encode(prompt)],
            max_new_tokens=90,
            temperature=0.8,
            top_p=0.95,
            seed=seed,
            eos_id=tokenizer.eos_id,
        )
        text = " ".join((prompt + tokenizer.decode(new)).split())
        written.append(f"> **{prompt}**{text[len(prompt) :]} ...")
    return "\n\n".join(written)


def configuration(model: GPT2) -> str:
    c = model.config
    count = sum(p.numel() for p in model.parameters())
    rows = {
        "parameters": f"{count:,}",
        "layers, heads, width": f"{c.n_layer}, {c.n_head}, {c.n_embd}",
        "context": f"{c.n_positions} tokens",
        "tokenizer": f"byte-level BPE, {c.vocab_size:,} tokens, trained on the same books",
        "stored in": "fp16 (safetensors)",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--titles", nargs="+", default=["Through the Looking-Glass", "Tik-Tok of Oz"])
    parser.add_argument("--training", default="", help="how the run went: steps, tokens, time, machine")
    options = parser.parse_args()
    held_out = PretrainingSettings.held_out_books
    books = read_books(options.corpus)
    model, tokenizer = load_gpt2()
    rows = [
        loss_row(f"*{title}*", book, model, tokenizer)
        for title, book in zip(options.titles, books[-held_out:], strict=True)
    ]
    rows.append(loss_row("both held-out books", "\n".join(books[-held_out:]), model, tokenizer))
    text = CARD.format(
        configuration=configuration(model),
        books=len(books),
        characters=sum(map(len, books)) / 1e6,
        held_out=held_out,
        training=options.training,
        context=model.config.n_positions,
        losses="\n".join(rows),
        tales=tale_perplexity(model, tokenizer),
        samples=samples(model, tokenizer),
    )
    write_atomically(BUNDLED_DIRECTORY / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
