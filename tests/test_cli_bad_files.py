"""The command line and bad files: damaged models, adapters and data end in one line that names the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_from_scratch.finetune.data import Example
from lora_from_scratch.gpt2.checkpoint import load_gpt2, load_model
from lora_from_scratch.methods.registry import load_adapter
from tests.cli_calls import complaint
from tests.helpers import REPOSITORY
from tests.tiny_runs import SHORT, examples, make_model, write_data


@pytest.fixture
def here(cli_directory: Path, short_evaluation: None) -> Path:
    return cli_directory


def _reshape(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(2, 3)
    save_file(tensors, directory / "model.safetensors")


def _cut(name: str, share: float) -> Callable[[Path], object]:
    def cut(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(share * len(content))])

    return cut


def _replace(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


NOISE = bytes(Random(0).randrange(256) for _ in range(5000))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_remove("config.json"), "config.json"),
        (_replace("config.json", b'{"n_embd": 32,'), "config.json is not a readable JSON file"),
        (_replace("config.json", b'{"model_type": "bert"}'), "do not match its config.json: no bert."),
        (_replace("config.json", b'{"model_type": "fox"}'), "transformers cannot load a causal language model from"),
        (_replace("config.json", b'{"n_embd": 33, "n_head": 2}'), "n_embd must be a multiple of n_head"),
        (_replace("config.json", b"{}"), "do not match its config.json: missing"),
        (_remove("model.safetensors"), "has no weights"),
        (_cut("model.safetensors", 0.0), "model.safetensors is damaged or truncated"),
        (_cut("model.safetensors", 0.01), "model.safetensors is damaged or truncated"),
        (_cut("model.safetensors", 0.99), "model.safetensors is damaged or truncated"),
        (_replace("model.safetensors", NOISE), "model.safetensors is damaged or truncated"),
        (_reshape, "transformer.h.1.mlp.c_fc.weight (2, 3) instead of (32, 128)"),
        (_remove("vocab.json"), "vocab.json missing"),
        (_cut("vocab.json", 0.5), "vocab.json is not readable JSON"),
        (_cut("merges.txt", 0.5), "the tokenizer in"),
        (_replace("merges.txt", NOISE), "merges.txt is not UTF-8 text"),
    ],
)
def test_a_damaged_model_ends_in_one_line_that_names_the_file(
    here: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    model = shutil.copytree(here / "model", tmp_path / "model")
    damage(model)
    assert said in complaint("generate", "--model", model, "--prompt", "a")
    run = ["finetune", "--model", model, "--data", here / "data.csv", "--output", tmp_path / "out", *SHORT]
    assert said in complaint(*run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_remove("adapter_config.json"), "adapter_config.json is not in it"),
        (_remove("adapter_model.safetensors"), "adapter_model.safetensors is not in it"),
        (_cut("adapter_model.safetensors", 0.9), "adapter_model.safetensors is damaged"),
        (_replace("adapter_model.safetensors", NOISE), "adapter_model.safetensors is damaged"),
        (_replace("adapter_config.json", b"{"), "adapter_config.json is not a readable JSON file"),
        (_replace("adapter_config.json", b'{"peft_type": "MAGIC"}'), "peft_type 'MAGIC' is not supported"),
        (shutil.rmtree, "there is no adapter directory"),
    ],
)
def test_a_damaged_adapter_ends_in_one_line_that_names_it(
    here: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    adapter = shutil.copytree(here / "adapter", tmp_path / "adapter")
    damage(adapter)
    line = complaint("generate", "--model", here / "model", "--adapter", adapter, "--prompt", "a")
    assert said in line
    assert str(adapter) in line


def test_an_adapter_made_for_another_model_is_refused(here: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "wider", n_embd=48)
    line = complaint("evaluate", "--model", other, "--adapter", here / "adapter", "--data", here / "data.csv")
    assert "do not fit this model; were they made for another one?" in line


ODD = ["x", -1, 0, 1.5, None, [], {}, True, [1], {"a": 1}]


def _with_odd_values(file: Path, more: dict[str, Any], load: Callable[[], object]) -> list[str]:
    """Put odd values into every field of a JSON file, and say which of them ended in an error of another kind than
    those that the command line turns into one line."""
    fields = {**more, **json.loads(file.read_text())}
    wrong = []
    for name in fields:
        for value in ODD:
            file.write_text(json.dumps({**fields, name: value}))
            try:
                load()
            except (ValueError, OSError):
                continue
            except Exception as error:
                wrong.append(f"{name}={value!r}: {error!r}")
    return wrong


def test_no_value_in_a_model_s_configuration_ends_in_a_traceback(here: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(here / "model", tmp_path / "model")

    def load() -> None:
        load_model(directory)(torch.zeros(1, 2, dtype=torch.long))

    assert _with_odd_values(directory / "config.json", {}, load) == []


def test_no_value_in_an_adapter_s_configuration_ends_in_a_traceback(here: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(here / "adapter", tmp_path / "adapter")
    model, _ = load_gpt2(here / "model")

    def load() -> None:
        load_adapter(model, adapter).undo(model)

    more: dict[str, Any] = {
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "bias": "none",
        "lora_dropout": 0.0,
    }
    assert _with_odd_values(adapter / "adapter_config.json", more, load) == []


def test_json_that_is_nested_too_deep_is_a_damaged_file(here: Path, tmp_path: Path) -> None:
    copies = {name: shutil.copytree(here / name, tmp_path / name) for name in ("model", "adapter")}
    (copies["adapter"] / "adapter_config.json").write_text("[" * 100_000)
    assert "adapter_config.json" in complaint(
        "generate", "--model", copies["model"], "--adapter", copies["adapter"], "--prompt", "a"
    )
    (copies["model"] / "config.json").write_text("[" * 100_000)
    assert "config.json" in complaint("generate", "--model", copies["model"], "--prompt", "a")


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b"", 1, "the header must name the column 'mr'"),
        (b"mr,text\na[b],c\n", 1, "the header must name the column 'ref'"),
        (b"mr,ref\n", 1, "there are no records after the header"),
        (b"mr,ref\na[b],x\na[b,x\n", 3, "the bracket of slot 'a' is not closed"),
        (b"mr,ref\na[b],x\na[c],\n", 3, "the reference is empty"),
        (b"mr,ref\na[b],x,y\n", 2, "3 fields"),
        (b"mr,ref\na[b],\xff\n", 2, "is not UTF-8"),
        (b'mr,ref\na[b],"x\n', 2, "close every quote"),
    ],
)
def test_a_malformed_data_file_is_named_with_its_line(
    here: Path, tmp_path: Path, content: bytes, line: int, said: str
) -> None:
    data = tmp_path / "bad.csv"
    data.write_bytes(content)
    for command in (["finetune", "--output", tmp_path / "out"], ["evaluate"]):
        message = complaint(*command, "--model", here / "model", "--data", data)
        assert message.startswith(f"error: {data}:{line}: ")
        assert said in message
    assert list(tmp_path.iterdir()) == [data]


def test_data_that_do_not_fit_into_the_context_are_refused_before_the_training(here: Path, tmp_path: Path) -> None:
    long = [Example(f"hero[fox], number[{i}], tale[{'far away ' * 80}]", "Once.") for i in range(3)]
    data = write_data(tmp_path / "long.csv", long)
    run = ["finetune", "--model", here / "model", "--data", data, "--output", tmp_path / "out", *SHORT]
    assert "leaves no room for a text" in complaint(*run)
    few = write_data(tmp_path / "few.csv", examples(2))
    assert "2 different meanings; a split into three needs at least 3" in complaint(*run, "--data", few)
    assert not (tmp_path / "out").exists()


def test_a_model_of_the_hub_without_a_network_ends_soon_and_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "lora_from_scratch", "generate", "--model", "gpt2", "--prompt", "a"]
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: there is no directory 'gpt2', and the Hugging Face Hub cannot be reached")
