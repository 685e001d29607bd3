"""The tokenizer against transformers' GPT-2 tokenizer on the real vocabulary."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_from_scratch.gpt2.tokenizer import END_OF_TEXT, Tokenizer
from tests.helpers import real_checkpoint, shared

TEXTS = [
    "",
    " ",
    "Once upon a time, there was a king.",
    "no space in front",
    "  two, then   three \t tabs\t\tand\n\n\nnewlines\r\n  ",
    "emoji \U0001f9d9\u200d\u2640\ufe0f\U0001f40d \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "\u4ece\u524d\u6709\u4e00\u4e2a\u56fd\u738b\uff0c\u4ed6\u6709\u4e09\u4e2a\u513f\u5b50\u3002",
    "control \x00\x01\x07\x1b\x7f\x85\xa0\xad\u2028\u2029\ufeff",
    "I'll say it's they've we'd 'S 'LL don\u2019t",
    "combining e\u0301 and \u0645\u0631\u062d\u0628\u0627 and \u0928\u092e\u0938\u094d\u0924\u0947",
    "numbers 3.14159 1,000,000 2\u00b2 \u0663\u0664",
    "a" * 300,
    f"{END_OF_TEXT}",
    f"one {END_OF_TEXT} two{END_OF_TEXT}{END_OF_TEXT}\n<|endoftext |> <|ENDOFTEXT|>",
    "the last code point \U0010ffff, private \ue000",
]


@cache
def real() -> Tokenizer:
    return Tokenizer.from_directory(shared("data/gpt2"))


@cache
def bundled() -> Tokenizer:
    return Tokenizer.from_directory(real_checkpoint())


@cache
def peer() -> Any:
    transformers = pytest.importorskip("transformers")
    folder = shared("data/gpt2")
    return transformers.GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers_on_the_real_vocabulary(text: str) -> None:
    assert real().encode(text) == peer()(text).input_ids
    assert real().decode(real().encode(text)) == text


@given(text=st.text(max_size=60))
@settings(deadline=None, max_examples=200)
def test_ids_equal_those_of_transformers_on_any_text(text: str) -> None:
    assert real().encode(text) == peer()(text).input_ids


@given(text=st.text(max_size=60) | st.text(alphabet=" \n\t'sab\u00e9\u4e00<|endoftext|>", max_size=60))
@settings(deadline=None, max_examples=200)
def test_decoding_gives_back_every_text(text: str) -> None:
    tokenizer = bundled()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_published_ids_come_out() -> None:
    """ "Hello world" is 15496 995 in OpenAI's own encoder; 50256 is the end of text."""
    assert real().encode("Hello world") == [15496, 995]
    assert (real().eos_id, real().vocab_size) == (50256, 50257)


def test_end_of_text_written_in_a_text_is_the_one_special_id() -> None:
    assert real().encode(f"a{END_OF_TEXT}b") == [*real().encode("a"), real().eos_id, *real().encode("b")]


def test_a_batch_gives_what_each_text_gives_alone() -> None:
    assert real().encode_batch(TEXTS) == [real().encode(text) for text in TEXTS]


def test_ids_that_stop_inside_a_character_decode_to_the_replacement_character() -> None:
    ids = real().encode("\U0001f9d9")
    assert len(ids) > 1
    assert real().decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize("token", [-1, 50257])
def test_decoding_an_unknown_id_is_a_value_error(token: int) -> None:
    with pytest.raises(ValueError, match=rf"between 0 and 50256, got {token}"):
        real().decode([15496, token])


def test_half_a_surrogate_pair_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        real().encode("\ud800")


# --- Saving, loading, training ---------------------------------------------------------------------

FOLK = ["The king and the queen lived in the castle. "] * 3 + ["The king's three sons \u00fcber \U0001f40d."] * 2


def test_saving_and_loading_gives_the_same_ids_and_the_same_bytes(tmp_path: Path) -> None:
    real().save(tmp_path / "a")
    again = Tokenizer.from_directory(tmp_path / "a")
    again.save(tmp_path / "b")
    assert again.encode_batch(TEXTS) == real().encode_batch(TEXTS)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "merges.txt").read_bytes() == (shared("data/gpt2") / "merges.txt").read_bytes()


def test_the_tokenizer_that_transformers_saves_is_read(tmp_path: Path) -> None:
    peer().save_pretrained(tmp_path)
    assert Tokenizer.from_directory(tmp_path).encode_batch(TEXTS) == real().encode_batch(TEXTS)


def test_transformers_reads_the_tokenizer_that_we_train(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.train(FOLK, 300)
    ours.save(tmp_path)
    theirs = transformers.GPT2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    for text in [*TEXTS, *FOLK]:
        assert ours.encode(text) == theirs(text).input_ids


def test_training_gives_the_same_tokenizer_each_time_with_end_of_text_first() -> None:
    one, other = Tokenizer.train(FOLK, 300), Tokenizer.train(iter(FOLK), 300)
    assert one.vocab == other.vocab
    assert one.merges == other.merges
    assert one.eos_id == 0
    assert one.vocab_size == 300
    assert len(one.encode(FOLK[0])) < len(FOLK[0]) / 2
    assert all(one.decode(one.encode(text)) == text for text in TEXTS)


def test_a_short_text_trains_a_smaller_vocabulary() -> None:
    assert Tokenizer.train(["ab ab"], 400).vocab_size == 258  # the one pair that occurs twice


def test_a_vocabulary_without_room_for_the_bytes_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"at least 257 .* got 256"):
        Tokenizer.train(FOLK, 256)


# --- Files that are not right ----------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Tokenizer.train(FOLK, 280).save(tmp_path)
    return tmp_path


def edit_vocab(directory: Path, remove: str | None = None, add: dict[str, Any] | None = None) -> None:
    vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    vocab.pop(remove, None)
    (directory / "vocab.json").write_text(json.dumps(vocab | (add or {})), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b'{"a": 0, ', "vocab.json is not readable JSON"),
        ("vocab.json", b"\xff\xfe", "vocab.json is not UTF-8"),
        ("vocab.json", b"[1, 2]", "must be a JSON object"),
        ("vocab.json", b'{"a": 1.5}', "integer ids"),
        ("vocab.json", b'{"a": 0, "b": 0}', "0 to 1, each exactly once"),
        ("vocab.json", b'{"a": 0}', "no token for"),
        ("merges.txt", b"#version: 0.2\nt", "line 2 of merges.txt"),
        ("merges.txt", b"#version: 0.2\nt h e\n", "line 2 of merges.txt"),
        ("merges.txt", b"z q\n", "needs the token 'zq'"),
        ("merges.txt", b"\xff", "merges.txt is not UTF-8"),
        ("merges.txt", b"", "no merge gives the token"),
    ],
)
def test_a_damaged_file_is_a_value_error_of_one_line(saved: Path, name: str, content: bytes, message: str) -> None:
    (saved / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        Tokenizer.from_directory(saved)
    assert "\n" not in str(raised.value)
    assert str(saved) in str(raised.value)


def test_merges_that_are_cut_short_are_a_value_error(saved: Path) -> None:
    lines = (saved / "merges.txt").read_text(encoding="utf-8").split("\n")
    (saved / "merges.txt").write_text("\n".join(lines[:-4]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no merge gives the token .* and 2 more"):
        Tokenizer.from_directory(saved)


def test_a_vocabulary_without_end_of_text_is_a_value_error(saved: Path) -> None:
    vocab = json.loads((saved / "vocab.json").read_text(encoding="utf-8"))
    del vocab[END_OF_TEXT]
    (saved / "vocab.json").write_text(json.dumps({token: number - 1 for token, number in vocab.items()}))
    with pytest.raises(ValueError, match=r"no token for '<\|endoftext\|>'"):
        Tokenizer.from_directory(saved)


def test_the_files_of_two_models_do_not_mix(saved: Path) -> None:
    shutil.copy(shared("data/gpt2") / "merges.txt", saved / "merges.txt")
    with pytest.raises(ValueError, match="not in the vocabulary"):
        Tokenizer.from_directory(saved)


def test_a_special_token_that_no_merge_makes_may_be_in_the_vocabulary(saved: Path) -> None:
    edit_vocab(saved, add={"<pad>": 280})
    assert Tokenizer.from_directory(saved).vocab_size == 281


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Tokenizer.from_directory(saved)


def test_windows_line_ends_do_not_change_the_tokenizer(saved: Path) -> None:
    before = Tokenizer.from_directory(saved).merges
    merges = saved / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.from_directory(saved).merges == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not GPT-2's byte-level BPE"),
        ({"normalizer": {"type": "Lowercase"}}, "not GPT-2's byte-level BPE"),
        (
            {"added_tokens": [{"id": 50258, "content": "<pad>"}]},
            "must follow the 50257 ids of the vocabulary",
        ),
        ({"added_tokens": [{"id": 50257, "content": "<pad>", "lstrip": True}]}, "'<pad>' has lstrip"),
        ({"model": None}, "is not a tokenizer"),
    ],
)
def test_a_tokenizer_json_that_is_not_a_gpt2s_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    peer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_directory(tmp_path)


# --- Added tokens, another end, a space in front ---------------------------------------------------

SETTINGS = {
    "added tokens": ({"pad_token": "<|pad|>", "additional_special_tokens": ["<|sep|>", "<|mask|>"]}, {}),
    "another end": ({"eos_token": "<|stop|>"}, {}),
    "a space in front": ({}, {"add_prefix_space": True}),
    "all of them": ({"pad_token": "[PAD]", "eos_token": "<|stop|>"}, {"add_prefix_space": True}),
}
MIXED = [
    "a<|sep|>b",
    "x <|pad|> y",
    " <|mask|>",
    "[PAD]one[PAD]",
    "no special token",
    "<|stop|>",
    "the end<|endoftext|>",
    "",
]


def with_settings(name: str) -> Any:
    special, options = SETTINGS[name]
    folder = shared("data/gpt2")
    transformers = pytest.importorskip("transformers")
    made = transformers.GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), **options)
    made.add_special_tokens(special)
    return made


def as_transformers_4(theirs: Any, folder: Path) -> None:
    """`save_pretrained` as it was before tokenizer.json was all that is written."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared("data/gpt2") / name, folder)
    (folder / "added_tokens.json").write_text(json.dumps(theirs.get_added_vocab()))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": theirs.eos_token}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": theirs.add_prefix_space}))


@pytest.mark.parametrize("form", ["transformers 4", "transformers 5", "ours"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_tokenizer_with_settings_of_its_own_gives_the_ids_of_transformers(
    name: str, form: str, tmp_path: Path
) -> None:
    theirs = with_settings(name)
    if form == "transformers 4":
        as_transformers_4(theirs, tmp_path)
    else:
        theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    if form == "ours":
        ours.save(tmp_path / "again")
        ours = Tokenizer.from_directory(tmp_path / "again")
        theirs = type(theirs).from_pretrained(tmp_path / "again")
    assert ours.eos_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)
    for text in MIXED:
        assert ours.encode(text) == theirs(text).input_ids, text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=False)


def test_two_files_that_give_a_token_different_ids_are_refused(saved: Path) -> None:
    count = Tokenizer.from_directory(saved).vocab_size
    (saved / "added_tokens.json").write_text(json.dumps({"<pad>": count}))
    (saved / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(count + 1): {"content": "<pad>"}}})
    )
    with pytest.raises(ValueError, match=r"the files give the token '<pad>' two different ids"):
        Tokenizer.from_directory(saved)


def test_a_tokenizer_json_that_disagrees_with_the_two_files_is_refused(tmp_path: Path) -> None:
    peer().save_pretrained(tmp_path)
    small = Tokenizer.train(["a small text, a small text"], 270)
    small.save(tmp_path)
    with pytest.raises(ValueError, match=r"does not match vocab\.json and merges\.txt; keep one of them"):
        Tokenizer.from_directory(tmp_path)
