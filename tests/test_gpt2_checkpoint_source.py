"""Where a checkpoint comes from: the package, a directory, or the hub, with and without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_from_scratch.gpt2 import checkpoint
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory, load_gpt2, load_tokenizer
from tests.checkpoints import TOKENIZER, assert_same_model
from tests.helpers import tiny_model


def test_no_bundled_model_is_a_file_not_found_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BUNDLED_DIRECTORY", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="bundled GPT-2 is missing"):
        load_gpt2()


def test_bundled_is_the_directory_in_the_package(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BUNDLED_DIRECTORY", saved)
    monkeypatch.chdir(saved.parent)
    (saved.parent / "bundled").mkdir()
    assert checkpoint_directory() == checkpoint_directory("bundled") == saved
    assert checkpoint_directory("./bundled") == Path("bundled")
    assert load_tokenizer().vocab == TOKENIZER.vocab


@pytest.mark.parametrize("source", ["", "./none", "a/b/c", "no such model", "../x", Path("none"), "-x", "https://a/b"])
def test_what_is_neither_a_directory_nor_a_hub_name_is_a_file_not_found_error(
    source: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        load_gpt2(source)


def test_a_file_instead_of_a_directory_is_a_value_error(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is a file"):
        load_gpt2(saved / "config.json")


class Hub:
    """Stands in for the hub: one repository, of which only what matches the patterns is downloaded."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache

    def snapshot_download(self, name: str, *, allow_patterns: list[str]) -> str:
        assert name in ("gpt2", "openai-community/gpt2-medium")
        self.cache.mkdir(exist_ok=True)
        for path in self.repository.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, self.cache / path.name)
        return str(self.cache)


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2-medium"])
@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin"])
def test_a_model_of_the_hub_is_downloaded_without_what_is_not_needed(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    hub = Hub(saved, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path)
    weights = load_file(saved / "model.safetensors")
    if kind == "shards":
        (saved / "model.safetensors").rename(saved / "model-00001-of-00001.safetensors")
        weight_map = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
        (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if kind == "bin":
        (saved / "model.safetensors").unlink()
    for unwanted in ("pytorch_model.bin", "tf_model.h5", "rust_model.ot"):
        torch.save(weights, saved / unwanted)
    model, tokenizer = load_gpt2(name)
    assert_same_model(model, tiny_model(vocab_size=300))
    assert tokenizer.vocab == TOKENIZER.vocab
    downloaded = {path.name for path in hub.cache.iterdir()}
    assert ("pytorch_model.bin" in downloaded) == (kind == "bin")
    assert not downloaded & {"tf_model.h5", "rust_model.ot"}


def test_without_a_network_and_a_cache_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def nowhere(name: str, **options: Any) -> str:
        options |= {"endpoint": "http://127.0.0.1:9", "cache_dir": tmp_path}
        return real_download(name, **options)

    real_download = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nowhere)
    with pytest.raises(
        OSError, match=r"cannot be reached .* check the network, or give 'bundled' or a directory"
    ) as raised:
        load_gpt2("gpt2")
    assert "\n" not in str(raised.value)


def test_a_name_that_the_hub_does_not_know_is_a_file_not_found_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(name: str, **_: Any) -> str:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.snapshot_download", unknown)
    with pytest.raises(FileNotFoundError, match="no directory 'gpt7', and the Hugging Face Hub has no public model"):
        load_gpt2("gpt7")
