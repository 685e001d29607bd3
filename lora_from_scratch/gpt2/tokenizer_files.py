"""Reading the files of a GPT-2 tokenizer as written by transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"  # GPT-2's only special token: it marks the end of a document
CONFIG = "tokenizer_config.json"
SETTINGS_FILES = (CONFIG, "special_tokens_map.json", "added_tokens.json")

Merge = tuple[str, str]


def read_settings(
    directory: Path, added: Mapping[str, int] | None = None, add_prefix_space: bool = False
) -> dict[str, Any]:
    """The arguments of `Tokenizer` other than the vocabulary and merges, from transformers' files.

    Args:
        added, add_prefix_space: the values in `tokenizer.json`, if there is one; the other files may add to them.

    Raises:
        ValueError: a file is damaged, two files give a token different ids, or a token needs an unsupported feature.
    """
    config, names, more = (
        read_json(directory / name) if (directory / name).exists() else {} for name in SETTINGS_FILES
    )
    tokens = dict(added or {})
    try:
        decoder = {
            token["content"]: int(token_id) for token_id, token in config.get("added_tokens_decoder", {}).items()
        }
        _refuse_stripping(directory / CONFIG, config.get("added_tokens_decoder", {}).values())
        for token, token_id in [*decoder.items(), *more.items()]:
            if tokens.setdefault(token, token_id) != token_id:
                raise ValueError(
                    f"the files give the token {token!r} two different ids, {tokens[token]} and {token_id}"
                )
        end = names.get("eos_token") or config.get("eos_token") or END_OF_TEXT
        end = end["content"] if isinstance(end, dict) else end
        return {"added": tokens, "end": end, "add_prefix_space": bool(config.get("add_prefix_space", add_prefix_space))}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{CONFIG} or another tokenizer file is malformed ({type(error).__name__}: {error})") from None


def _refuse_stripping(path: Path, tokens: Iterable[Mapping[str, Any]]) -> None:
    """Refuse added tokens that absorb surrounding spaces or match only whole words: the ids would differ."""
    for token in tokens:
        on = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if on:
            raise ValueError(f"{path.name}: the token {token['content']!r} has {on[0]}, which is not supported")


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not readable JSON: {error}") from None


def read_merges(path: Path) -> list[Merge]:
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ValueError(f"line {number} of {path.name} must be two tokens separated by a space, got {line!r}")
        merges.append((left, right))
    return merges


def read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[Merge], dict[str, int], bool]:
    """The vocabulary, merges, added tokens and `add_prefix_space` of a GPT-2 tokenizer in `tokenizers`' own format."""
    given = read_json(path)
    try:
        model, words, added = given["model"], given["pre_tokenizer"], given["added_tokens"]
        if model["type"] != "BPE" or words["type"] != "ByteLevel" or given["normalizer"]:
            raise ValueError(f"{path.name} is not GPT-2's byte-level BPE")
        vocab = model["vocab"]
        tokens = {token["content"]: token["id"] for token in added if vocab.get(token["content"]) != token["id"]}
        _refuse_stripping(path, added)
        return vocab, as_pairs(model["merges"]), tokens, bool(words["add_prefix_space"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path.name} is not a tokenizer ({type(error).__name__}: {error})") from None


def as_pairs(merges: Sequence[Any]) -> list[Merge]:
    """Merges as pairs; different releases of `tokenizers` write them as "a b" or as ["a", "b"]."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return [(left, right) for left, right in pairs]
