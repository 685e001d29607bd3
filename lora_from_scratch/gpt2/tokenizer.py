"""GPT-2's tokenizer: text to token ids and back, without losing a byte.

Text becomes UTF-8 bytes, each byte one visible character (the *byte alphabet*), and the merges of
`merges.txt` are applied in their order (byte pair encoding, Sennrich et al. 2016; on bytes: Radford et
al. 2019, section 2.2). There are 256 bytes, so there is no text that cannot be written.
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
    """Byte-level BPE with GPT-2's own way of cutting text into words, and no space put in front.

    `<|endoftext|>` written out in a text becomes the one special id, as in `transformers`: whoever encodes
    text from strangers and does not want that has to look for it first. Added tokens work in the same way.

    Args:
        vocab: each token, in the byte alphabet, and its id; the ids are 0 to the number of tokens - 1.
        merges: the pairs that are joined, the most important first.
        added: tokens that somebody added to a GPT-2, such as `<|pad|>`, and their ids, which follow those of `vocab`.
        end: the token that ends a text, one of `vocab` or `added`.
        add_prefix_space: put a space in front of a text that begins without one.

    Raises:
        ValueError: the ids have gaps, a byte or the end token has no token, or vocabulary and merges
            do not belong together.
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
        self._encoder.add_special_tokens([*self._special(), *by_id])  # the encoder numbers new ones in this order

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return len(self.vocab) + len(self.added)

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
        """Write `vocab.json` and `merges.txt` into `directory`, which is made where it is missing.

        What differs from GPT-2's usual tokenizer, such as added tokens, goes into `tokenizer_config.json`.
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
        """What transformers calls it."""
        special = {token: self.vocab[token] for token in self._special()} | self.added
        decoder = {str(token_id): {"content": token, "special": True} for token, token_id in special.items()}
        usual = dict.fromkeys(("bos_token", "eos_token", "unk_token"), self.end) | {"tokenizer_class": "GPT2Tokenizer"}
        return {**usual, "add_prefix_space": self.add_prefix_space, "added_tokens_decoder": decoder}

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read `vocab.json` and `merges.txt`, or else a `tokenizer.json` (all that transformers 5 saves).

        Added tokens, another end token and `add_prefix_space` are read from the files in which transformers keeps them
        (`added_tokens.json`, `tokenizer_config.json`, `special_tokens_map.json`).

        Raises:
            FileNotFoundError: neither is there.
            ValueError: a file is damaged, is not a GPT-2's, or two of them do not belong together.
        """
        directory = Path(directory)
        vocab, merges = directory / "vocab.json", directory / "merges.txt"
        one_file = directory / "tokenizer.json"
        try:
            if vocab.exists() and merges.exists():
                parts = tokenizer_files.read_json(vocab), tokenizer_files.read_merges(merges)
                if one_file.exists() and tokenizer_files.read_tokenizer_json(one_file)[:2] != parts:
                    raise ValueError(f"{one_file.name} has other tokens than {vocab.name} and {merges.name}; keep one")
                return cls(*parts, **tokenizer_files.read_settings(directory))
            if one_file.exists():
                pieces, pairs, added, space = tokenizer_files.read_tokenizer_json(one_file)
                return cls(pieces, pairs, **tokenizer_files.read_settings(directory, added, space))
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
        return cls(model["vocab"], tokenizer_files.as_pairs(model["merges"]))


# --- Checking --------------------------------------------------------------------------------------


def _check(vocab: Any, merges: Sequence[Merge], added: Mapping[str, int], end: str) -> None:
    """Every way in which the files could give wrong ids in silence is an error here."""
    if not isinstance(vocab, dict) or not all(type(token_id) is int for token_id in vocab.values()):
        raise ValueError("the vocabulary must be one JSON object of tokens and whole-number ids")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"the ids of the {len(vocab)} tokens must be 0 to {len(vocab) - 1}, each once")
    if again := sorted(added.keys() & vocab.keys()):
        raise ValueError(f"the added token {_some(again)} is in the vocabulary under another id")
    if sorted(added.values()) != list(range(len(vocab), len(vocab) + len(added))):
        ids = ", ".join(f"{token!r} {token_id}" for token, token_id in added.items())
        raise ValueError(
            f"the ids of added tokens must follow the {len(vocab)} of the vocabulary without a gap, got {ids}"
        )
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if missing := sorted((alphabet | {end}) - vocab.keys() - added.keys()):
        raise ValueError(f"the vocabulary has no token for {_some(missing)}")
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise ValueError(f"the merge {left!r} + {right!r} needs the token {token!r}: not in the vocabulary")
    # Names in angle or square brackets are special tokens, which no merge makes.
    made = {left + right for left, right in merges} | alphabet | {end}
    unmade = [token for token in vocab if token not in made and (token[:1], token[-1:]) not in (("<", ">"), ("[", "]"))]
    if unmade:
        raise ValueError(f"no merge makes the token {_some(unmade)}: merges missing, or another vocabulary's")


def _some(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
