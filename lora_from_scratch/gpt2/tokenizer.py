"""GPT-2's tokenizer: text to token ids and back, without losing a byte.

Text becomes UTF-8 bytes, each byte one visible character (the *byte alphabet*), and the merges of
`merges.txt` are applied in their order (byte pair encoding, Sennrich et al. 2016; on bytes: Radford et
al. 2019, section 2.2). There are 256 bytes, so there is no text that cannot be written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from lora_from_scratch.support.files import write_atomically

END_OF_TEXT = "<|endoftext|>"  # GPT-2's only special token: the end of a document
MERGES_HEADER = "#version: 0.2"  # the first line of `merges.txt`; not a merge

Merge = tuple[str, str]


class Tokenizer:
    """Byte-level BPE with GPT-2's own way of cutting text into words, and no space put in front.

    `<|endoftext|>` written out in a text becomes the one special id, as in `transformers`: whoever encodes
    text from strangers and does not want that has to look for it first.

    Args:
        vocab: each token, in the byte alphabet, and its id; the ids are 0 to the number of tokens - 1.
        merges: the pairs that are joined, the most important first.

    Raises:
        ValueError: the ids have gaps, a byte or `<|endoftext|>` has no token, or vocabulary and merges
            do not belong together.
    """

    def __init__(self, vocab: dict[str, int], merges: Sequence[Merge]) -> None:
        _check(vocab, merges)
        self.vocab = vocab
        self.merges = list(merges)
        self.eos_id = vocab[END_OF_TEXT]
        self._encoder = Encoder(BPE(vocab=vocab, merges=self.merges))
        self._encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._encoder.decoder = decoders.ByteLevel()
        self._encoder.add_special_tokens([END_OF_TEXT])

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; no token is added in front or behind.

        Raises:
            ValueError: `text` holds half of a surrogate pair, which is not text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts at once, on several cores."""
        for text in texts:
            text.encode("utf-8")  # a lone surrogate ends here, in a UnicodeEncodeError that says where
        return [encoding.ids for encoding in self._encoder.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; `decode(encode(text)) == text` for every text.

        Where the ids stop in the middle of a character, that character is shown as U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token ids must be between 0 and {self.vocab_size - 1}, got {token}")
        return self._encoder.decode(list(ids), skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """Write `vocab.json` and `merges.txt` into `directory`, which is made where it is missing."""
        by_id = dict(sorted(self.vocab.items(), key=lambda item: item[1]))
        lines = [MERGES_HEADER, *(f"{left} {right}" for left, right in self.merges)]
        files = {"vocab.json": json.dumps(by_id, ensure_ascii=False), "merges.txt": "\n".join([*lines, ""])}
        for name, text in files.items():
            write_atomically(Path(directory) / name, partial(Path.write_bytes, data=text.encode()))

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read `vocab.json` and `merges.txt`, or else a `tokenizer.json` (all that transformers 5 saves).

        Raises:
            FileNotFoundError: neither is there.
            ValueError: a file is damaged, is not a GPT-2's, or the two do not belong together.
        """
        directory = Path(directory)
        vocab, merges = directory / "vocab.json", directory / "merges.txt"
        try:
            if vocab.exists() and merges.exists():
                return cls(_read_json(vocab), _read_merges(merges))
            if (directory / "tokenizer.json").exists():
                return cls(*_read_tokenizer_json(directory / "tokenizer.json"))
        except ValueError as error:
            raise ValueError(f"the tokenizer in {directory} cannot be read: {error}") from None
        missing = " and ".join(path.name for path in (vocab, merges) if not path.exists())
        raise FileNotFoundError(f"{directory} has no tokenizer: {missing} missing, and no tokenizer.json instead")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary from `texts`: `<|endoftext|>` is id 0, then the 256 bytes, then the merges.

        A pair has to occur at least twice to be merged, so that little text gives fewer than `vocab_size`
        tokens. The same texts always give the same tokenizer.

        Raises:
            ValueError: `vocab_size` is below 257 (the bytes and `<|endoftext|>`).
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab_size}")
        encoder = Encoder(BPE())
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        encoder.train_from_iterator(texts, trainer)
        model = json.loads(encoder.to_str())["model"]
        return cls(model["vocab"], _as_pairs(model["merges"]))


# --- Reading and checking the files ----------------------------------------------------------------


def _check(vocab: Any, merges: Sequence[Merge]) -> None:
    """Every way in which the files could give wrong ids in silence is an error here."""
    if not isinstance(vocab, dict) or not all(type(token_id) is int for token_id in vocab.values()):
        raise ValueError("the vocabulary must be one JSON object of tokens and whole-number ids")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"the ids of the {len(vocab)} tokens must be 0 to {len(vocab) - 1}, each once")
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if missing := sorted((alphabet | {END_OF_TEXT}) - vocab.keys()):
        raise ValueError(f"the vocabulary has no token for {_some(missing)}")
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise ValueError(f"the merge {left!r} + {right!r} needs the token {token!r}: not in the vocabulary")
    # Names in angle or square brackets are special tokens, which no merge makes.
    made = {left + right for left, right in merges} | alphabet
    unmade = [token for token in vocab if token not in made and (token[:1], token[-1:]) not in (("<", ">"), ("[", "]"))]
    if unmade:
        raise ValueError(f"no merge makes the token {_some(unmade)}: merges missing, or another vocabulary's")


def _some(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not readable JSON: {error}") from None


def _read_merges(path: Path) -> list[Merge]:
    merges = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ValueError(f"line {number} of {path.name} must be two tokens with a space between, got {line!r}")
        merges.append((left, right))
    return merges


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[Merge]]:
    """The vocabulary and the merges of `tokenizers`' own format, where they mean what GPT-2 means by them."""
    given = _read_json(path)
    try:
        model, words, added = given["model"], given["pre_tokenizer"], given["added_tokens"]
        if model["type"] != "BPE" or words["type"] != "ByteLevel" or words["add_prefix_space"] or given["normalizer"]:
            raise ValueError(f"{path.name} is not GPT-2's byte-level BPE (without a space put in front)")
        if extra := [token["content"] for token in added if token["content"] != END_OF_TEXT]:
            raise ValueError(f"{path.name} adds the token {_some(extra)}: only {END_OF_TEXT} is supported")
        return model["vocab"], _as_pairs(model["merges"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path.name} is not a tokenizer ({type(error).__name__}: {error})") from None


def _as_pairs(merges: Sequence[Any]) -> list[Merge]:
    """Merges as pairs: releases of `tokenizers` write them as "a b" or as ["a", "b"]."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return [(left, right) for left, right in pairs]
