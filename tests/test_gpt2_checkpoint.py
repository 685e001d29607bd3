"""Checkpoints: what transformers saves we load, what we save transformers loads, and damage is named."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_from_scratch.gpt2 import checkpoint
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory, load_gpt2, load_model, load_tokenizer, save_gpt2
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.gpt2.tokenizer import Tokenizer
from tests.helpers import real_checkpoint, tiny_model, transformers_twin

TOKENIZER = Tokenizer.train(["a king and a queen and a king"] * 2, 270)


def assert_same_model(one: GPT2, other: GPT2) -> None:
    assert one.config == other.config
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sound checkpoint, to be damaged."""
    save_gpt2(tiny_model(vocab_size=300), TOKENIZER, tmp_path / "model")
    return tmp_path / "model"


# --- To and from transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["1GB", "5KB"])
def test_what_transformers_saves_is_loaded_whole_or_in_shards(tmp_path: Path, shard: str) -> None:
    model = tiny_model()
    transformers_twin(model).save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "5KB")
    assert_same_model(load_model(tmp_path), model)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_older_bin_files_are_loaded_with_masks_and_the_tied_head(tmp_path: Path, sharded: bool) -> None:
    model = tiny_model()
    state: dict[str, Tensor] = dict(transformers_twin(model).state_dict())
    assert "lm_head.weight" in state
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_json_dict()))
    if sharded:
        shards = {name: f"pytorch_model-{1 + number % 2:05}-of-00002.bin" for number, name in enumerate(state)}
        for shard in set(shards.values()):
            torch.save({name: state[name] for name in state if shards[name] == shard}, tmp_path / shard)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_model(load_model(tmp_path), model)


def test_a_checkpoint_of_the_bare_transformer_is_loaded(saved: Path) -> None:
    before = load_model(saved)
    weights = saved / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(weights).items()}, weights)
    assert_same_model(load_model(saved), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_transformers_loads_what_we_save(tmp_path: Path, dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_model(vocab_size=300)
    save_gpt2(model, TOKENIZER, tmp_path, dtype=dtype)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    ours = load_model(tmp_path, dtype=dtype)
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, theirs.state_dict()[name]), name
        assert torch.equal(tensor, model.state_dict()[name].to(dtype)), name
    ids = torch.tensor([[1, 5, 2, 290]])
    torch.testing.assert_close(ours.float()(ids), theirs.float()(ids).logits, atol=1e-5, rtol=1e-5)
    assert transformers.AutoConfig.from_pretrained(tmp_path).n_embd == model.config.n_embd
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("a king").input_ids == TOKENIZER.encode("a king")


def test_the_bundled_checkpoint_loads_in_fp32_and_eval_mode_with_its_tokenizer() -> None:
    model, tokenizer = load_gpt2(real_checkpoint())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert tokenizer.vocab_size == model.config.vocab_size == 4096
    assert tokenizer.eos_id == model.config.eos_token_id


def test_loading_leaves_the_random_state_alone(saved: Path) -> None:
    before = torch.get_rng_state()
    load_model(saved)
    assert torch.equal(before, torch.get_rng_state())


# --- Saving ----------------------------------------------------------------------------------------


def test_saving_and_loading_gives_the_same_model_and_tokenizer(tmp_path: Path) -> None:
    model = tiny_model(vocab_size=300)
    save_gpt2(model, TOKENIZER, tmp_path / "new" / "model")
    again, tokenizer = load_gpt2(tmp_path / "new" / "model")
    assert_same_model(again, model)
    assert (tokenizer.vocab, tokenizer.merges) == (TOKENIZER.vocab, TOKENIZER.merges)


def test_the_same_model_always_gives_the_same_bytes(tmp_path: Path, saved: Path) -> None:
    model, tokenizer = load_gpt2(saved)
    save_gpt2(model, tokenizer, tmp_path / "again")
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "vocab.json",
    ]
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_saving_over_a_model_replaces_it_and_leaves_other_files(saved: Path) -> None:
    (saved / "README.md").write_text("a card")
    loaded = load_model(saved)
    other = tiny_model(seed=1, vocab_size=300)
    save_gpt2(other, None, saved)
    assert_same_model(load_model(saved), other)
    assert_same_model(loaded, tiny_model(vocab_size=300))
    assert (saved / "README.md").read_text() == "a card"
    assert (saved / "vocab.json").exists()


def test_a_loaded_model_does_not_change_with_the_file(saved: Path) -> None:
    model = load_model(saved)
    size = (saved / "model.safetensors").stat().st_size
    with (saved / "model.safetensors").open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert_same_model(model, tiny_model(vocab_size=300))


def test_saved_files_are_readable_by_whom_the_umask_says(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    assert {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()} == {
        stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    }
    assert saved.stat().st_mode == (tmp_path / "folder").stat().st_mode


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more than this into one file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 20_000])
def test_a_full_disk_is_an_os_error_and_leaves_everything_as_it_was(tmp_path: Path, saved: Path, size: int) -> None:
    before = {path: path.read_bytes() for path in saved.iterdir()}
    model = tiny_model(seed=1, vocab_size=300)
    for directory in (saved, tmp_path / "new"):
        with files_of_at_most(size), pytest.raises(OSError) as raised:  # noqa: PT011 (the kind is the point)
            save_gpt2(model, TOKENIZER, directory)
        assert "\n" not in str(raised.value)
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
    assert list(tmp_path.iterdir()) == [saved]


def test_weights_too_large_for_fp16_are_a_value_error(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight has weights too large for torch\.float16"):
        save_gpt2(model, None, tmp_path / "model", dtype=torch.float16)
    assert not (tmp_path / "model").exists()


def test_a_model_with_adapters_on_it_is_a_value_error(tmp_path: Path) -> None:
    model = tiny_model()
    model.transformer.h[0].lora_A = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"merge or undo its adapters first: transformer\.h\.0\.lora_A"):
        save_gpt2(model, None, tmp_path / "model")


def test_a_file_in_the_place_of_the_directory_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(OSError, match="is a file"):
        save_gpt2(tiny_model(), None, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


# --- What is not right -----------------------------------------------------------------------------

Weights = dict[str, Tensor]


def without(weights: Weights, name: str) -> Weights:
    return {key: tensor for key, tensor in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, "transformer.h.1.attn.c_attn.bias"), r"missing: transformer\.h\.1\.attn\.c_attn\.bias"),
        (lambda w: {}, r"missing: .* and 24 more"),
        (lambda w: w | {"score.weight": torch.ones(2)}, r"unexpected: transformer\.score\.weight"),
        (
            lambda w: w | {"transformer.ln_f.bias": torch.ones(25)},
            r"not of the configured shape: transformer\.ln_f\.bias \(25,\) instead of \(24,\)",
        ),
        (
            lambda w: w | {"transformer.ln_f.bias": torch.ones(24, dtype=torch.int8)},
            r"not floating-point: transformer\.ln_f\.bias",
        ),
        (lambda w: w | {"lm_head.weight": w["transformer.wte.weight"] + 1}, r"lm_head\.weight of their own"),
        (lambda w: w | {"wte.weight": w["transformer.wte.weight"].clone()}, r"hold transformer\.wte\.weight twice"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, change: Callable[[Weights], Weights], message: str) -> None:
    save_file(change(load_file(saved / "model.safetensors")), saved / "model.safetensors")
    with pytest.raises(ValueError, match=message) as raised:
        load_gpt2(saved)
    assert "\n" not in str(raised.value)


def test_a_head_equal_to_the_embedding_is_accepted(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}, saved / "model.safetensors")
    assert_same_model(load_model(saved), tiny_model(vocab_size=300))


def as_bin(directory: Path, content: Any) -> Path:
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")
    return directory / "pytorch_model.bin"


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_weight_file_that_is_cut_short_is_a_value_error_of_one_line(saved: Path, kind: str, kept: int) -> None:
    if kind == "pytorch_model.bin":
        as_bin(saved, load_file(saved / "model.safetensors"))
    (saved / kind).write_bytes((saved / kind).read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{kind} is damaged") as raised:
        load_gpt2(saved)
    assert "\n" not in str(raised.value)


def test_a_weight_file_of_noise_is_a_value_error(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    with pytest.raises(ValueError, match="is damaged"):
        load_gpt2(saved)


class Bomb:
    """A pickle that runs code when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle ran its code",))


@pytest.mark.parametrize("plain", [False, True])
def test_a_bin_file_never_runs_code(saved: Path, plain: bool) -> None:
    path = as_bin(saved, {"wte.weight": Bomb()})
    if plain:
        path.write_bytes(pickle.dumps({"wte.weight": Bomb()}, protocol=2))
    with pytest.raises(ValueError, match=r"refused for safety|is damaged"):
        load_gpt2(saved)


@pytest.mark.parametrize("content", [[1, 2], {"wte.weight": 3}], ids=str)
def test_a_bin_file_without_named_tensors_is_a_value_error(saved: Path, content: Any) -> None:
    as_bin(saved, content)
    with pytest.raises(ValueError, match="does not hold named tensors"):
        load_gpt2(saved)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ("{", ValueError, "not the index of a sharded checkpoint"),
        ("[]", ValueError, "not the index of a sharded checkpoint"),
        ('{"weight_map": {"a": 3}}', ValueError, "names 3, which is not a file beside it"),
        ('{"weight_map": {"a": "../other.safetensors"}}', ValueError, "not a file beside it"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', FileNotFoundError, "model-00001-of-00002"),
    ],
)
def test_a_damaged_index_or_a_missing_shard_is_named(
    saved: Path, index: str, error: type[Exception], message: str
) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(error, match=message):
        load_gpt2(saved)


@pytest.mark.parametrize(
    ("remove", "message"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("vocab.json", "vocab.json missing")],
)
def test_a_missing_file_is_named(saved: Path, remove: str, message: str) -> None:
    (saved / remove).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_gpt2(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'gpt2', got 'llama'"),
        ({"n_head": 5}, "multiple of n_head"),
        ({"n_layer": 3}, r"missing: transformer\.h\.2\."),
        ({"n_embd": 12}, "not of the configured shape"),
        ({"scale_attn_by_inverse_layer_idx": True}, "not supported"),
    ],
)
def test_a_configuration_of_another_model_is_a_value_error(saved: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_gpt2(saved)


def test_a_tokenizer_with_more_tokens_than_the_model_knows_is_a_value_error(saved: Path) -> None:
    save_gpt2(tiny_model(vocab_size=100), None, saved)
    with pytest.raises(ValueError, match=r"has \d+ tokens, more than the 100"):
        load_gpt2(saved)


# --- Where a model comes from ----------------------------------------------------------------------


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
