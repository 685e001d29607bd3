"""GPT-2's tokenizer: text to token ids and back, without loss.

Text is encoded as UTF-8 bytes, each byte is represented by a visible character (the *byte alphabet*), and the merges of
`merges.txt` are applied in order (byte pair encoding, Sennrich et al. 2016; on bytes: Radford et al. 2019, section
2.2). As every one of the 256 bytes has a token, any text can be encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from lora_from_scratch.gpt2 import tokenizer_files
from lora_from_scratch.gpt2.tokenizer_files import CONFIG, END_OF_TEXT, Merge
from lora_from_scratch.support.files import write_atomically

MERGES_HEADER = "#version: 0.2"  # the first line of `merges.txt`; not a merge


class Tokenizer:
    """Byte-level BPE with GPT-2's rule for splitting text into words, and no space added in front.

    The string `<|endoftext|>` in a text is encoded as the special token, as in `transformers`. If that is not wanted in
    untrusted text, look for it before encoding. Added tokens work in the same way.

    Args:
        vocab: maps each token, in the byte alphabet, to its id; the ids are 0 to the number of tokens - 1.
        merges: the pairs to merge, in order of priority.
        added: tokens added to a GPT-2 later, such as `<|pad|>`, with their ids, which follow those of `vocab`.
        end: the token that ends a text, in `vocab` or `added`.
        add_prefix_space: add a space in front of a text that does not begin with one.

    Raises:
        ValueError: the ids have gaps, a byte or the end token is not in the vocabulary, or the vocabulary and the
            merges do not match.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[Merge],
        added: Mapping[str, int] | None = None,
        *,
        end: str = END_OF_TEXT,
        add_prefix_space: bool = False,
    ) -> None:
        self.added = {token: token_id for token, token_id in (added or {}).items() if vocab.get(token) != token_id}
        _check(vocab, merges, self.added, end)
        self.vocab = vocab
        self.merges = list(merges)
        self.end, self.add_prefix_space = end, add_prefix_space
        self.eos_id = {**vocab, **self.added}[end]
        self._encoder = Encoder(BPE(vocab=vocab, merges=self.merges))
        self._encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        self._encoder.decoder = decoders.ByteLevel()
        by_id = sorted(self.added, key=lambda token: self.added[token])
        self._encoder.add_special_tokens([*self._special(), *by_id])  # the encoder numbers new tokens in this order

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including added ones."""
        return len(self.vocab) + len(self.added)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; no token is added before or after it.

        Raises:
            ValueError: `text` contains half of a surrogate pair, which is not valid text.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts at once, on several cores."""
        for text in texts:
            text.encode("utf-8")  # a lone surrogate raises a UnicodeEncodeError with its position
        return [encoding.ids for encoding in self._encoder.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; `decode(encode(text)) == text` for every text.

        A character whose bytes are incomplete is decoded as U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token ids must be between 0 and {self.vocab_size - 1}, got {token}")
        return self._encoder.decode(list(ids), skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """Write `vocab.json` and `merges.txt` into `directory`, which is created if it does not exist.

        Differences from GPT-2's usual tokenizer, such as added tokens, are written to `tokenizer_config.json`.
        """
        by_id = dict(sorted(self.vocab.items(), key=lambda item: item[1]))
        lines = [MERGES_HEADER, *(f"{left} {right}" for left, right in self.merges)]
        files = {"vocab.json": json.dumps(by_id, ensure_ascii=False), "merges.txt": "\n".join([*lines, ""])}
        if self.added or self.end != END_OF_TEXT or self.add_prefix_space:
            files[CONFIG] = json.dumps(self._config(), ensure_ascii=False, indent=2)
        for name, text in files.items():
            write_atomically(Path(directory) / name, partial(Path.write_bytes, data=text.encode()))

    def _special(self) -> list[str]:
        """The special tokens of the vocabulary itself."""
        return [token for token in dict.fromkeys((END_OF_TEXT, self.end)) if token in self.vocab]

    def _config(self) -> dict[str, Any]:
        """The contents of transformers' `tokenizer_config.json`."""
        special = {token: self.vocab[token] for token in self._special()} | self.added
        decoder = {str(token_id): {"content": token, "special": True} for token, token_id in special.items()}
        usual = dict.fromkeys(("bos_token", "eos_token", "unk_token"), self.end) | {"tokenizer_class": "GPT2Tokenizer"}
        return {**usual, "add_prefix_space": self.add_prefix_space, "added_tokens_decoder": decoder}

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read `vocab.json` and `merges.txt`, or else a `tokenizer.json` (the only file that transformers 5 saves).

        Added tokens, another end token and `add_prefix_space` are read from the files in which transformers keeps them
        (`added_tokens.json`, `tokenizer_config.json`, `special_tokens_map.json`).

        Raises:
            FileNotFoundError: neither exists.
            ValueError: a file is damaged, does not belong to a GPT-2, or two of the files do not match.
        """
        directory = Path(directory)
        vocab, merges = directory / "vocab.json", directory / "merges.txt"
        one_file = directory / "tokenizer.json"
        try:
            if vocab.exists() and merges.exists():
                parts = tokenizer_files.read_json(vocab), tokenizer_files.read_merges(merges)
                if one_file.exists() and tokenizer_files.read_tokenizer_json(one_file)[:2] != parts:
                    raise ValueError(f"{one_file.name} does not match {vocab.name} and {merges.name}; keep one of them")
                return cls(*parts, **tokenizer_files.read_settings(directory))
            if one_file.exists():
                pieces, pairs, added, space = tokenizer_files.read_tokenizer_json(one_file)
                return cls(pieces, pairs, **tokenizer_files.read_settings(directory, added, space))
        except ValueError as error:
            raise ValueError(f"the tokenizer in {directory} cannot be read: {error}") from None
        missing = " and ".join(path.name for path in (vocab, merges) if not path.exists())
        raise FileNotFoundError(f"{directory} has no tokenizer: {missing} missing, and there is no tokenizer.json")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary from `texts`: `<|endoftext|>` has id 0, then come the 256 bytes, then the merges.

        A pair must occur at least twice to be merged, so a short text gives fewer than `vocab_size` tokens. The same
        texts always give the same tokenizer.

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
        return cls(model["vocab"], tokenizer_files.as_pairs(model["merges"]))


# --- Checking --------------------------------------------------------------------------------------


def _check(vocab: Any, merges: Sequence[Merge], added: Mapping[str, int], end: str) -> None:
    """Raise an error for anything in the files that would silently give wrong ids."""
    if not isinstance(vocab, dict) or not all(type(token_id) is int for token_id in vocab.values()):
        raise ValueError("the vocabulary must be a JSON object that maps tokens to integer ids")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"the ids of the {len(vocab)} tokens must be 0 to {len(vocab) - 1}, each exactly once")
    if again := sorted(added.keys() & vocab.keys()):
        raise ValueError(f"the added token {_some(again)} is in the vocabulary with another id")
    if sorted(added.values()) != list(range(len(vocab), len(vocab) + len(added))):
        ids = ", ".join(f"{token!r} {token_id}" for token, token_id in added.items())
        raise ValueError(
            f"the ids of added tokens must follow the {len(vocab)} ids of the vocabulary without a gap, got {ids}"
        )
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if missing := sorted((alphabet | {end}) - vocab.keys() - added.keys()):
        raise ValueError(f"the vocabulary has no token for {_some(missing)}")
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise ValueError(f"the merge {left!r} + {right!r} needs the token {token!r}: not in the vocabulary")
    # Names in angle or square brackets are special tokens, which are not made by merges.
    made = {left + right for left, right in merges} | alphabet | {end}
    unmade = [token for token in vocab if token not in made and (token[:1], token[-1:]) not in (("<", ">"), ("[", "]"))]
    if unmade:
        raise ValueError(
            f"no merge gives the token {_some(unmade)}: merges are missing or belong to another vocabulary"
        )


def _some(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
