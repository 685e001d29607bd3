"""Pretraining: what is read and what is held out, the same weights whatever happens, and that it learns."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from lora_from_scratch.cli import main
from lora_from_scratch.finetune import pretraining
from lora_from_scratch.finetune.pretraining import (
    PretrainingSettings,
    held_out_loss,
    make_optimizers,
    pretrain,
    read_books,
    windows_at,
)
from lora_from_scratch.finetune.training import Batch, Trainer
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from tests.helpers import tiny_model
from tests.tiny_runs import files_in

TINY = PretrainingSettings(
    steps=12,
    batch_size=4,
    context=16,
    vocab_size=257,
    n_layer=1,
    n_head=2,
    n_embd=16,
    warmup_steps=2,
    held_out_books=2,
    precision="fp32",
)
FLAGS = [word for name, value in asdict(TINY).items() for word in (f"--{name.replace('_', '-')}", str(value))]


def write_corpus(path: Path, books: int = 6, seed: int = 0) -> Path:
    """Books of letters in which each letter but the first is the one after the letter before: easy to learn.

    The two books at the end have capital letters, which the others lack.
    """
    rng = Random(seed)
    texts = []
    for number in range(books):
        alphabet = "ABCDEFGH" if number >= books - 2 else "abcdefgh"
        starts = [rng.randrange(8) for _ in range(12)]
        texts.append("\n".join("".join(alphabet[(s + i) % 8] for i in range(24)) for s in starts))
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "books.txt")


# --- The corpus -------------------------------------------------------------------------------------


def test_a_corpus_is_read_as_text_and_as_gz_with_any_line_ends(tmp_path: Path, corpus: Path) -> None:
    books = read_books(corpus)
    assert len(books) == 6
    assert all("\n\n" not in book and book == book.strip("\n") for book in books)
    (tmp_path / "books.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    (tmp_path / "windows.txt").write_bytes(corpus.read_bytes().replace(b"\n", b"\r\n"))
    assert read_books(tmp_path / "books.gz") == read_books(tmp_path / "windows.txt") == books


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("no.txt", None, "no corpus at"),
        ("empty.txt", b"\n\n", "is empty: give at least one book"),
        ("latin.txt", "Dörfer".encode("latin-1"), "is not readable as UTF-8 text"),
        ("damaged.gz", gzip.compress(b"x" * 5000, mtime=0)[:-9], "is not readable as UTF-8 text"),
        ("text.gz", b"not compressed", "is not readable as UTF-8 text"),
        ("few.txt", b"One book.\n\nTwo books.", "none is left to train on"),
        ("short.txt", b"a\n\nb\n\nc", "a context of 16 needs at least 32"),
    ],
)
def test_a_corpus_that_does_not_serve_ends_in_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["pretrain", "--corpus", str(tmp_path / name), "--output", str(tmp_path / "out"), *FLAGS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("steps", "0", "steps must be at least 1"),
        ("batch-size", "0", "batch_size must be at least 1, got 0"),
        ("context", "1", "context must be at least 2, got 1"),
        ("vocab-size", "256", "vocab_size must be at least 257, got 256"),
        ("held-out-books", "0", "held_out_books must be at least 1, got 0"),
        ("n-head", "3", "n_embd must be a multiple of n_head"),
        ("n-layer", "0", "n_layer must be a whole number of at least 1"),
        ("dropout", "1", "embd_pdrop must be at least 0 and below 1"),
        ("learning-rate", "0", "learning_rate must be a positive number"),
        ("matrix-learning-rate", "nan", "matrix_learning_rate must be a positive number, got nan"),
        ("weight-decay", "-1", "weight_decay must be a number of at least 0"),
        ("precision", "fp8", "precision must be one of bf16, fp32"),
        ("warmup-steps", "13", "warmup_steps must be from 0 to 12"),
        ("device", "toaster", "unknown device 'toaster'"),
    ],
)
def test_a_wrong_setting_ends_in_one_line_before_anything_is_read_or_written(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.setattr(pretraining.Tokenizer, "train", lambda *args: pytest.fail("minutes of work were begun"))
    flags = ["--corpus", str(corpus), "--output", str(tmp_path / "out"), *FLAGS, f"--{flag}", value]
    assert main(["pretrain", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


# --- Windows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "context"), [(100, 8), (101, 8), (64, 16), (33, 16)])
def test_every_window_comes_once_an_epoch(length: int, context: int) -> None:
    tokens = torch.arange(length)
    per_epoch = (length - context) // context
    starts = []
    for step in range(2 * per_epoch):  # one window a step
        (window,) = windows_at(tokens, context, 1, seed=3, step=step)
        assert window.tolist() == list(range(int(window[0]), int(window[0]) + context))  # a piece of the text
        starts.append(int(window[0]))
    for epoch in (starts[:per_epoch], starts[per_epoch:]):
        offset = min(epoch)
        assert offset < context
        assert sorted(epoch) == [offset + i * context for i in range(per_epoch)]  # side by side, none twice


def test_another_epoch_has_another_order_and_another_offset() -> None:
    tokens = torch.arange(1000)
    epochs = [[int(windows_at(tokens, 8, 1, 0, e * 124 + i)[0, 0]) for i in range(124)] for e in range(4)]
    assert len({min(epoch) for epoch in epochs}) > 1
    orders = [tuple((start - min(epoch)) // 8 for start in epoch) for epoch in epochs]
    assert len(set(orders)) == 4


def test_a_batch_is_the_same_however_the_windows_are_dealt_out() -> None:
    tokens = torch.arange(500)
    together = torch.cat([windows_at(tokens, 8, 6, 1, step) for step in range(10)])
    one_by_one = torch.cat([windows_at(tokens, 8, 1, 1, step) for step in range(60)])
    assert torch.equal(together, one_by_one)


# --- What is held out -------------------------------------------------------------------------------


def test_held_out_books_enter_neither_the_training_nor_the_tokenizer(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    trained_on: list[str] = []
    whole_step, whole_train = Trainer._one_step, Tokenizer.train

    def one_step(self: Trainer, step: int) -> Any:
        seen.update(self.batch_at(step).input_ids.flatten().tolist())
        return whole_step(self, step)

    def train(texts: list[str], vocab_size: int) -> Tokenizer:
        trained_on.extend(texts)
        return whole_train(texts, vocab_size)

    monkeypatch.setattr(Trainer, "_one_step", one_step)
    monkeypatch.setattr(pretraining.Tokenizer, "train", train)
    losses = pretrain(corpus, tmp_path / "out", replace(TINY, vocab_size=280, steps=60), progress=False)
    tokenizer = Tokenizer.from_directory(tmp_path / "out")
    read = "".join(tokenizer.decode([token]) for token in seen if token != tokenizer.eos_id)
    assert set("abcdefgh") <= set(read)
    assert set(read) <= set("abcdefgh\n")  # the held-out books are in capitals
    assert trained_on == read_books(corpus)[:4]
    assert tokenizer.vocab_size > 257
    assert not any(set("ABCDEFGH") & set(left + right) for left, right in tokenizer.merges)
    assert set(losses) == {"book 4", "book 5", "held-out"}


def test_the_loss_of_a_text_is_that_of_its_whole_windows() -> None:
    """Written out: log-probabilities of every token of a window but the first."""
    model = tiny_model(n_positions=8)
    tokens = torch.randint(61, (21,), generator=torch.Generator().manual_seed(0))

    def written_out(text: torch.Tensor, context: int) -> float:
        losses = []
        for start in range(0, len(text) - context + 1, context):
            window = text[start : start + context]
            with torch.no_grad():
                log_p = model(window[None])[0].log_softmax(-1)
            losses += [-float(log_p[i - 1, window[i]]) for i in range(1, context)]
        return math.fsum(losses) / len(losses)

    assert held_out_loss(model, tokens, 8) == pytest.approx(written_out(tokens, 8), abs=1e-5)
    assert held_out_loss(model, tokens[:5], 8) == pytest.approx(written_out(tokens[:5], 5), abs=1e-5)  # a short book
    model.train()
    held_out_loss(model, tokens, 8)
    assert model.training


def test_the_losses_returned_are_those_of_the_saved_model(corpus: Path, tmp_path: Path) -> None:
    losses = pretrain(corpus, tmp_path / "out", TINY, progress=False)
    model, tokenizer = load_gpt2(tmp_path / "out")
    book = read_books(corpus)[4]
    tokens = torch.tensor([*tokenizer.encode(book), tokenizer.eos_id])
    assert losses["book 4"] == pytest.approx(held_out_loss(model, tokens, 16), abs=1e-6)


# --- The optimisers ---------------------------------------------------------------------------------


def test_every_parameter_has_exactly_one_optimiser_and_matrices_of_the_blocks_have_muon() -> None:
    model = tiny_model()
    muon, adamw = make_optimizers(model, TINY)
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon, by_adamw = (
        Counter(names[id(p)] for group in optimizer.param_groups for p in group["params"])
        for optimizer in (muon, adamw)
    )
    assert by_muon + by_adamw == Counter(names.values())
    assert set(by_muon) == {n for n, p in model.named_parameters() if ".h." in n and p.ndim == 2}
    decayed = {names[id(p)] for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {"transformer.wte.weight", "transformer.wpe.weight"}


# --- Killed and started again -----------------------------------------------------------------------


def test_a_run_that_is_interrupted_and_started_again_gives_the_same_files(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = pretraining.Trainer

    class Checkpointing(whole):  # type: ignore[misc, valid-type]
        """Every three steps instead of every two hundred."""

        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **{**keywords, "checkpoint_every": 3})

    monkeypatch.setattr(pretraining, "Trainer", Checkpointing)
    command = ["pretrain", "--corpus", str(corpus), *FLAGS, "--output"]
    assert main([*command, str(tmp_path / "quiet")]) == 0
    quiet_said = capsys.readouterr().out

    def interrupted_at(stop: int) -> Any:
        def windows(tokens: torch.Tensor, context: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            return windows_at(tokens, context, batch_size, seed, step)

        return windows

    for stop in (0, 5, 10):  # before the first checkpoint, and after the first and the third
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretraining, "windows_at", interrupted_at(stop))
            assert main([*command, str(tmp_path / "troubled")]) == 130
        assert "model.safetensors" not in files_in(tmp_path / "troubled")
    assert main([*command, str(tmp_path / "troubled")]) == 0
    quiet, troubled = files_in(tmp_path / "quiet"), files_in(tmp_path / "troubled")
    assert set(troubled) == set(quiet)
    assert set(quiet) == {"checkpoint.pt", "config.json", "merges.txt", "model.safetensors", "vocab.json"}
    for name in set(quiet) - {"checkpoint.pt"}:  # which has the seconds in it
        assert troubled[name] == quiet[name]
    assert capsys.readouterr().out.replace("troubled", "quiet").endswith(quiet_said)


def test_a_checkpoint_is_not_gone_on_with_on_another_corpus(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(corpus, tmp_path / "out", TINY, progress=False)
    before = files_in(tmp_path / "out")
    other = write_corpus(tmp_path / "other.txt", seed=1)
    assert main(["pretrain", "--corpus", str(other), "--output", str(tmp_path / "out"), *FLAGS]) == 2
    assert "is the checkpoint of another run" in capsys.readouterr().err
    assert files_in(tmp_path / "out") == before
    (tmp_path / "out" / "checkpoint.pt").unlink()  # as the message says; the tokenizer is then made anew
    pretrain(other, tmp_path / "out", replace(TINY, vocab_size=270), progress=False)
    assert load_gpt2(tmp_path / "out")[1].vocab_size == 270


# --- Learning ---------------------------------------------------------------------------------------


def test_the_loss_falls_far_below_the_entropy_of_the_single_letters(corpus: Path, tmp_path: Path) -> None:
    """Whoever only counts letters cannot get below their entropy; each letter follows from the one before."""
    letters = Counter("".join(book + "\0" for book in read_books(corpus)[:4]))
    entropy = -sum(n / letters.total() * math.log(n / letters.total()) for n in letters.values())
    ends: list[float] = []
    whole = Trainer.run

    def run(self: Trainer) -> Any:
        history = whole(self)
        ends.extend(history.losses)
        return history

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", run)
        pretrain(corpus, tmp_path / "out", replace(TINY, steps=150, dropout=0.0, learning_rate=5e-3), progress=False)
    assert ends[0] > entropy
    assert sum(ends[-10:]) / 10 < 0.6 * entropy


def test_transformers_loads_what_was_pretrained(corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pretrain(corpus, tmp_path / "out", TINY, progress=False)
    ours, tokenizer = load_gpt2(tmp_path / "out")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode("abcdefgh")])
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-4)
    assert theirs.config.eos_token_id == tokenizer.eos_id
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_positions"] == 16


def test_what_is_predicted_is_the_window_itself(corpus: Path, tmp_path: Path) -> None:
    batches: list[Batch] = []
    whole = Trainer._one_step

    def one_step(self: Trainer, step: int) -> Any:
        batches.append(self.batch_at(step))
        return whole(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_one_step", one_step)
        pretrain(corpus, tmp_path / "out", replace(TINY, steps=3), progress=False)
    assert all(torch.equal(batch.input_ids, batch.labels) and batch.input_ids.shape == (4, 16) for batch in batches)
