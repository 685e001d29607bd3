"""Checkpoints: what transformers saves we load, what we save transformers loads, and damage is named."""

from __future__ import annotations

import json
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_from_scratch.gpt2.checkpoint import load_gpt2, load_model, save_gpt2
from tests.checkpoints import TOKENIZER, assert_same_model
from tests.helpers import REPOSITORY, real_checkpoint, tiny_model, transformers_twin

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


def test_loading_does_not_wait_for_pytorchs_compiler_to_be_imported() -> None:
    program = "import sys, lora_from_scratch.gpt2 as g; g.load_gpt2(); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


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
