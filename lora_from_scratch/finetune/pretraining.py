"""Pretraining a small GPT-2 on plain text, as the bundled model was made.

A corpus is a text file (or `.gz`) with one paragraph per line and a blank line between books. The last books are held
out entirely: the model is evaluated on books that it has not seen at all.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_from_scratch.finetune.distributed import find_device
from lora_from_scratch.finetune.evaluation import perplexity
from lora_from_scratch.finetune.step_seeds import shuffled_places, step_seed
from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings, autocast
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from lora_from_scratch.support.files import check_writable, remove_leftovers, write_directory_atomically

CHECKPOINT = "checkpoint.pt"  # in the output directory; kept, so that a run can be extended
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end-of-text token
END_OF_TEXT_ID = 0  # as `Tokenizer.train` numbers the tokens


@dataclass(frozen=True)
class PretrainingSettings:
    """Settings of a pretraining run; the defaults are those of the bundled model.

    The matrices inside the blocks are trained with Muon (Jordan et al. 2024), everything else with AdamW.

    Raises:
        ValueError: a number is out of range that `TrainingSettings` and `GPT2Config` do not check themselves.
    """

    steps: int = 5000
    batch_size: int = 16
    context: int = 256
    vocab_size: int = 4096
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 256
    dropout: float = 0.1
    matrix_learning_rate: float = 0.02  # for Muon
    learning_rate: float = 1.5e-3  # for AdamW
    weight_decay: float = 0.1
    warmup_steps: int = 200
    held_out_books: int = 2
    precision: str = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        smallest = {"batch_size": 1, "context": 2, "vocab_size": SMALLEST_VOCABULARY, "held_out_books": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.matrix_learning_rate < math.inf:
            raise ValueError(f"matrix_learning_rate must be a positive number, got {self.matrix_learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a number of at least 0, got {self.weight_decay}")


def read_books(corpus: str | Path) -> list[str]:
    """Read the books of a corpus file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 text, or a damaged `.gz`.
    """
    path = Path(corpus)
    if not path.is_file():
        raise FileNotFoundError(
            f"no corpus at {path}: give a text file (or .gz) with one paragraph per line and a blank line between books"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not readable as UTF-8 text: {error}") from None
    books = [book.strip("\n") for book in text.replace("\r\n", "\n").split("\n\n") if book.strip()]
    if not books:
        raise ValueError(f"{path} is empty: give at least one book")
    return books


def windows_at(tokens: Tensor, context: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The batch of one step, (batch_size, context): each window of the text once per epoch.

    Each epoch starts at a different offset and visits its windows in a different order, both drawn from (seed, epoch),
    so that the batch is a function of the step alone.
    """
    per_epoch = (len(tokens) - context) // context
    picked = []
    for epoch, window in shuffled_places(per_epoch, batch_size, seed, step):
        start = step_seed(seed, epoch, stream=2) % context + window * context
        picked.append(tokens[start : start + context])
    return torch.stack(picked)


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor, context: int, precision: str = "fp32") -> float:
    """Mean nats per token over the full windows of a text; the first token of a window is not predicted.

    A text shorter than a window is treated as one window.
    """
    device = next(model.parameters()).device
    context = min(context, len(tokens))
    windows = tokens[: len(tokens) // context * context].view(-1, context)
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in windows.split(16):
        ids = batch.to(device)
        with autocast(device, precision):
            logits = model(ids)
        total += float(next_token_loss(logits, ids)) * len(batch)
    model.train(was_training)
    return total / len(windows)


def make_optimizers(model: GPT2, settings: PretrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks; AdamW for embeddings, biases and normalisation."""
    inside = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    muon = torch.optim.Muon(
        inside, lr=settings.matrix_learning_rate, weight_decay=settings.weight_decay, adjust_lr_fn="original"
    )
    adamw = torch.optim.AdamW(
        [{"params": embeddings, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    return [muon, adamw]


def pretrain(
    corpus: str | Path,
    output: str | Path,
    settings: PretrainingSettings,
    *,
    device: str = "cpu",
    evaluate_every: int = 500,
    progress: bool = True,
) -> dict[str, float]:
    """Train a tokenizer and a GPT-2 on a corpus and save both in Hugging Face's layout.

    If it is interrupted and called again, it resumes from `output/checkpoint.pt`.

    Returns:
        The loss on each held-out book, by its place in the corpus, and on all of them together ("held-out").

    Raises:
        ValueError, OSError: something is wrong with the corpus, the settings or the output folder. Raised before
            anything is written.
    """
    output = Path(output)
    check_writable(output)
    place, training = find_device(device), _training_settings(settings)
    _config(settings, settings.vocab_size)  # raises now instead of after the tokenizer is trained
    books = read_books(corpus)
    if settings.held_out_books >= len(books):
        raise ValueError(
            f"the corpus has {len(books)} books, and the last {settings.held_out_books} are to be held out: "
            "none is left to train on (a blank line ends a book)"
        )
    read, held_out = books[: -settings.held_out_books], books[-settings.held_out_books :]
    tokenizer = _tokenizer(read, output, settings)
    tokens, held_out_tokens = _tokens(tokenizer, read), _tokens(tokenizer, held_out)
    if len(tokens) < 2 * settings.context:
        raise ValueError(
            f"the books to train on have {len(tokens)} tokens; a context of {settings.context} needs at least "
            f"{2 * settings.context}"
        )

    torch.manual_seed(settings.seed)
    model = GPT2(_config(settings, tokenizer.vocab_size)).to(place)

    def batch_at(step: int) -> Batch:
        ids = windows_at(tokens, settings.context, settings.batch_size, settings.seed, step)
        return Batch(ids, ids)

    def evaluate() -> dict[str, float]:
        loss = held_out_loss(model, held_out_tokens, settings.context, settings.precision)
        return {"held-out loss": loss, "perplexity": perplexity(loss)}

    trainer = Trainer(
        model,
        batch_at,
        training,
        optimizers=make_optimizers(model, settings),
        checkpoint=output / CHECKPOINT,
        checkpoint_every=200,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        settings_tag=_tag(settings, tokens),
        progress=progress,
        description="pretraining",
    )
    write_directory_atomically(output, tokenizer.save)  # the checkpoint is useless without it
    trainer.run()
    if trainer.world.rank == 0:
        from lora_from_scratch.gpt2.checkpoint import save_gpt2

        remove_leftovers(output)
        # Dropout is a setting of this run; do not impose it on later fine-tuning.
        model.config = replace(model.config, embd_pdrop=0.0, resid_pdrop=0.0)
        save_gpt2(model, tokenizer, output, dtype=torch.float16)
    model.half().float()  # evaluate the weights as saved
    first = len(books) - len(held_out)
    losses = {
        f"book {first + i}": held_out_loss(model, _tokens(tokenizer, [book]), settings.context)
        for i, book in enumerate(held_out)
    }
    return {**losses, "held-out": held_out_loss(model, held_out_tokens, settings.context)}


def _config(settings: PretrainingSettings, vocab_size: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=settings.context,
        n_embd=settings.n_embd,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        embd_pdrop=settings.dropout,
        attn_pdrop=0.0,
        resid_pdrop=settings.dropout,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )


def _training_settings(settings: PretrainingSettings) -> TrainingSettings:
    return TrainingSettings(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        schedule="trapezoid",
        precision=settings.precision,
        seed=settings.seed,
    )


def _tag(settings: PretrainingSettings, tokens: Tensor) -> str:
    """Identifies a run, besides its training settings: the sizes, the optimisers' settings, the text's CRC-32."""
    text = zlib.crc32(tokens.numpy().tobytes())
    return str({name: value for name, value in asdict(settings).items() if name != "steps"} | {"text": text})


def _tokenizer(books: list[str], output: Path, settings: PretrainingSettings) -> Tokenizer:
    """The tokenizer of the run to resume, or a new one; the same books give the same tokenizer."""
    if (output / CHECKPOINT).is_file():
        return Tokenizer.from_directory(output)
    return Tokenizer.train(books, settings.vocab_size)


def _tokens(tokenizer: Tokenizer, books: list[str]) -> Tensor:
    """The tokens of all books in sequence, each book followed by the end-of-text token."""
    return torch.tensor([token for book in books for token in [*tokenizer.encode(book), tokenizer.eos_id]])
