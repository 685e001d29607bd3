"""`inspect`: what it says of a model and a method holds for the real model, and it needs no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_from_scratch.finetune.accounting import predicted_memory
from lora_from_scratch.finetune.inspection import Inspection, inspect_model, read_headers
from lora_from_scratch.gpt2.checkpoint import load_gpt2, save_gpt2
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.qlora import QLoRA
from lora_from_scratch.methods.registry import method_classes
from tests.cli_calls import complaint, output_of
from tests.helpers import tiny_model

FULL = FullFineTuning(keep_base=False)


def directory_of(kind: str, directory: Path) -> Path:
    """Only the configuration of a tiny model."""
    from tests.any_models import TRANSFORMERS

    transformers: Any = pytest.importorskip("transformers")
    name, config, settings = TRANSFORMERS[kind]
    getattr(transformers, config)(**settings, architectures=[name]).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspected")
    save_gpt2(tiny_model(), None, directory)
    return directory


def sums(found: Inspection) -> tuple[int, int]:
    return sum(kind.parameters for kind in found.layers), sum(kind.trained for kind in found.layers)


# --- Numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "lora", "dora", "vera", "bitfit", "layernorm", "adapter", "qlora"])
def test_every_parameter_is_in_one_row(gpt2: Path, name: str) -> None:
    method = method_classes()[name](**{"adapter": {"width": 2}, "bitfit": {}, "layernorm": {}}.get(name, {}))
    found = inspect_model(gpt2, [method], batch_size=1, tokens=4)
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    method.adapt(model)
    trained = sum(p.numel() for p in method.trainable(model).values())
    assert found.parameters == total
    assert found.costs[name].trained == trained
    assert sums(found) == (total, trained)


def test_a_lora_trains_rank_times_in_plus_out_of_every_layer(gpt2: Path) -> None:
    for kind in inspect_model(gpt2, [LoRA(rank=3)], 1, 4).layers:
        expected = kind.count * 3 * sum(kind.size) if kind.size else 0
        assert kind.trained == expected, kind.name


def test_the_saved_bytes_are_those_of_the_tensors_in_the_file(gpt2: Path, tmp_path: Path) -> None:
    for method in (LoRA(rank=3), QLoRA(rank=2), FULL):
        model = tiny_model()
        method.adapt(model)
        method.save(model, tmp_path / method.name)
        file = next((tmp_path / method.name).glob("*.safetensors"))
        tensors = sum(tensor.nbytes for tensor in load_file(file).values())
        assert inspect_model(gpt2, [method], 1, 4).costs[method.name].saved_bytes == tensors


@pytest.mark.parametrize("method", [LoRA(rank=3), QLoRA(rank=2), FULL], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_memory_is_what_the_accounting_by_hand_predicts(gpt2: Path, method: Any, precision: str) -> None:
    config = tiny_model().config
    predicted = predicted_memory(config, method, 3, 8, precision=precision)
    cost = inspect_model(gpt2, [method], 3, 8, precision).costs[method.name]
    assert cost.weights == predicted.weights - method.bytes_for_undo(config)
    assert (cost.gradients, cost.optimizer) == (predicted.gradients, predicted.optimizer)
    logits = 3 * 8 * config.vocab_size * (4 if precision == "fp32" else 2)
    assert cost.activations == predicted.activations + logits


def test_the_work_is_what_the_shapes_say(gpt2: Path) -> None:
    config, rows, tokens, rank = tiny_model().config, 2, 8, 3
    d, layers = config.n_embd, config.n_layer
    in_layers = layers * (4 * d * d + 2 * d * config.mlp_width)
    sides = layers * (4 * d + 2 * d + 2 * (d + config.mlp_width))  # in + out of c_attn, c_proj, c_fc and mlp.c_proj
    attention = layers * 2 * tokens * d  # for each token: its products with all keys, and with all values
    base = rows * tokens * (in_layers + attention + config.vocab_size * d)
    found = inspect_model(gpt2, [FULL, LoRA(rank=rank)], rows, tokens)
    assert found.base_forward == found.costs["full"].forward == base
    assert found.costs["lora"].forward == base + rows * tokens * rank * sides
    full, lora = found.costs["full"].step, found.costs["lora"].step
    assert full is not None
    assert lora is not None
    assert full == 3 * base  # the backward pass has two products for each product of the forward pass
    assert lora < full


# --- Any model, and no weights ----------------------------------------------------------------------------------


def test_a_model_that_fits_into_no_memory_is_inspected(tmp_path: Path) -> None:
    directory = directory_of("llama", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_size": 2**16, "intermediate_size": 2**18, "head_dim": 2**15}
    (directory / "config.json").write_text(json.dumps(config))
    text = output_of("inspect", directory, "--method", "qlora", "--rank", 4, "--batch-size", 1, "--tokens", 2)
    assert "no weight files" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| model.layers.(n).mlp.up_proj"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[1:5] == ["2", f"{2**16:,}", f"{2**18:,}", f"{2 * 2**34:,}"]
    assert cells[6] == f"{2 * 4 * (2**16 + 2**18):,}"


@pytest.mark.parametrize("kind", ["qwen2", "gpt-neox"])
def test_of_another_family_the_numbers_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    from tests.any_models import model_of

    found = inspect_model(directory_of(kind, tmp_path), [LoRA(rank=2)], 1, 4)
    assert found.parameters == sum(p.numel() for p in model_of(kind).parameters())
    assert sums(found)[0] == found.parameters
    assert sums(found)[1] == found.costs["lora"].trained


def test_a_model_for_pictures_has_a_table_and_no_work(tmp_path: Path) -> None:
    text = output_of("inspect", directory_of("vit", tmp_path), "--rank", 2)
    assert text.startswith("ViTForImageClassification: ")
    assert "vit.layers.(n).attention.q_proj" in text
    assert text.count("not known") == 6


def test_inspecting_leaves_nothing_behind_that_disturbs_a_real_model(gpt2: Path) -> None:
    before = tiny_model()(torch.arange(6)[None])
    inspect_model(gpt2, [QLoRA(rank=2)], 1, 4)
    model = tiny_model()
    assert torch.equal(model(torch.arange(6)[None]), before)
    QLoRA(rank=2).adapt(model)
    assert bool(model(torch.arange(6)[None]).isfinite().all())


def test_the_bundled_models_header_is_read(tmp_path: Path) -> None:
    model, _ = load_gpt2()
    found = read_headers("bundled")
    assert found.names == ("model.safetensors",)
    assert found.dtypes == {"F16": sum(p.numel() for p in model.parameters())}


def test_a_sharded_checkpoint_counts_all_its_files(tmp_path: Path) -> None:
    from tests.any_models import model_of

    model_of("llama").save_pretrained(tmp_path, max_shard_size="5KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    found = read_headers(tmp_path)
    assert found.names == tuple(file.name for file in files)
    assert found.bytes == sum(file.stat().st_size for file in files)
    assert sum(found.dtypes.values()) == sum(p.numel() for p in model_of("llama").parameters())


# --- What is wrong ----------------------------------------------------------------------------------------------


def test_bad_input_ends_in_one_line(gpt2: Path, tmp_path: Path) -> None:
    llama = directory_of("llama", tmp_path / "llama")
    assert "prefix works inside the GPT-2" in complaint("inspect", llama, "--method", "prefix")
    assert "batch_size must be at least 1" in complaint("inspect", gpt2, "--batch-size", 0)
    assert "there is no directory" in complaint("inspect", tmp_path / "nothing")
    damaged = shutil.copytree(gpt2, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "model.safetensors is damaged or truncated" in complaint("inspect", damaged)
    (llama / "config.json").write_text('{"model_type": "fox"}')
    assert "transformers cannot load a model from" in complaint("inspect", llama)
