"""The atlas: every method with several seeds; interrupted, resumed, and spread over machines."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.readme import ATLAS, ROOT, atlas_block, atlas_picture
from lora_from_scratch.compare import atlas, side_by_side
from lora_from_scratch.compare.shootout import contestants
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.run import Report, Run, finetune
from lora_from_scratch.gpt2.checkpoint import checkpoint_directory
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.registry import method_class
from tests.cli_calls import call, complaint
from tests.tiny_runs import make_model, shorten_evaluation, write_data

METHODS = ("bitfit", "lora", "ia3")
FLAGS = ("--methods", *METHODS, "--steps", "2", "--cards", "1", "--seeds", "0", "1")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("atlas")
    make_model(directory / "model")
    write_data(directory / "data.csv")
    return directory


@pytest.fixture
def carried_out(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are carried out in this process, on less; here are their names."""
    shorten_evaluation(monkeypatch)
    names: list[str] = []

    def in_this_process(runs: list[Run], jobs: int | None, done: Callable[[int, Report], object]) -> None:
        for place, run in enumerate(runs):
            names.append(run.output.name)
            done(place, finetune(replace(run, data=str(here / "data.csv"), batch_size=2), progress=False))

    monkeypatch.setattr(side_by_side, "run_in_processes", in_this_process)
    monkeypatch.setattr(side_by_side, "load_dataset", lambda name: name)  # all cards take a second
    return names


def run_atlas(here: Path, output: Path, *more: str) -> tuple[int, str, str]:
    return call("atlas", "--model", here / "model", "--output", output, *FLAGS, *more)


def results(output: Path) -> dict[str, Any]:
    """The results without what differs from run to run: seconds, memory."""
    document: dict[str, Any] = json.loads((output / "atlas.json").read_text())
    for method in document["methods"]:
        for run in method["runs"]:
            assert run.pop("seconds") > 0
            run.pop("peak_memory_bytes")
    return document


@pytest.fixture
def whole(here: Path, tmp_path: Path, carried_out: list[str]) -> Path:
    """The folder of an atlas that was not interrupted."""
    code, _, err = run_atlas(here, tmp_path / "whole")
    assert code == 0, err
    return tmp_path / "whole"


def test_all_methods_are_carried_out_with_one_seed_before_the_next_and_written(
    whole: Path, carried_out: list[str]
) -> None:
    assert carried_out == [f"{name}-{seed}" for seed in (0, 1) for name in METHODS]
    found = results(whole)
    assert [method["name"] for method in found["methods"]] == list(METHODS)
    assert [[run["seed"] for run in method["runs"]] for method in found["methods"]] == [[0, 1]] * 3
    page = (whole / "table.md").read_text()
    assert page == atlas.page(json.loads((whole / "atlas.json").read_text()))
    for name in METHODS:
        assert f"\n| {name} " in page
    assert (whole / "atlas.png").read_bytes().startswith(b"\x89PNG")


def test_killed_and_resumed_or_in_shards_it_gives_the_same(
    here: Path, tmp_path: Path, whole: Path, carried_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    carried_out.clear()
    with monkeypatch.context() as patch:  # the process is killed when the third run begins
        train = side_by_side.run_in_processes

        def two(runs: list[Run], jobs: int | None, done: Any) -> None:
            train(runs[:2], jobs, done)
            raise KeyboardInterrupt

        patch.setattr(side_by_side, "run_in_processes", two)
        assert run_atlas(here, tmp_path / "killed")[0] == 130
    assert not (tmp_path / "killed" / "atlas.json").exists()
    code, said, _ = run_atlas(here, tmp_path / "killed", "--collect")
    assert code == 0
    assert "2 of 6 runs" in said
    assert run_atlas(here, tmp_path / "killed")[0] == 0
    assert sorted(carried_out) == sorted(f"{name}-{seed}" for seed in (0, 1) for name in METHODS)
    assert results(tmp_path / "killed") == results(whole)

    carried_out.clear()
    for number in ("1/3", "2/3", "3/3"):
        assert run_atlas(here, tmp_path / number[0], "--shard", number)[0] == 0
        assert not (tmp_path / number[0] / "atlas.json").exists()
        if (tmp_path / number[0]).exists():
            shutil.copytree(tmp_path / number[0], tmp_path / "collected", dirs_exist_ok=True)
    assert len(carried_out) == 6
    assert run_atlas(here, tmp_path / "collected")[0] == 0
    assert len(carried_out) == 6
    assert results(tmp_path / "collected") == results(whole)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "lara"], "unknown method 'lara'"),
        (["--shard", "0/3"], "--shard should look like 3/16"),
        (["--shard", "1/3", "--collect"], "it does not go with --shard"),
        (["--collect"], "no run with these settings is finished in"),
        (["--seeds", "-1"], "must be from 0 to 2**63 - 1, got -1"),
    ],
)
def test_bad_input_ends_in_one_line_before_anything_is_trained(
    here: Path, tmp_path: Path, carried_out: list[str], flags: list[str], said: str
) -> None:
    assert said in complaint("atlas", "--model", here / "model", "--output", tmp_path / "out", *flags)
    assert carried_out == []
    assert list(tmp_path.iterdir()) == []


def test_by_default_every_contestant_takes_part() -> None:
    assert set(contestants()) > {"full", "lora", "dora", "ia3", "pez"}
    assert {method.name for method in contestants().values()} >= {method_class(name).name for name in ("vera", "nola")}


def test_the_multiply_adds_are_those_of_the_formula() -> None:
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    tokens, d, layers, vocabulary, rank = 16, 8, 2, 50, 4
    products = tokens * (layers * 12 * d * d + vocabulary * d)  # of the input with the weights
    attention = layers * 2 * tokens * tokens * d  # q k^T, and the weights with v
    model = GPT2(config)
    forward, step = atlas.multiply_adds(model)
    assert forward == products + attention
    # Backward: for every product one for each of its two inputs; the first has no input that needs a gradient.
    assert step == 3 * forward
    LoRA(rank=rank, targets=("attn.c_proj", "mlp.c_fc")).adapt(model)
    assert atlas.multiply_adds(model)[0] == forward + layers * tokens * rank * (d + d + d + 4 * d)


def test_means_have_the_smallest_and_the_largest_where_there_are_several_seeds() -> None:
    assert atlas.spread([1234.56], 1) == "1,234.6"
    assert atlas.spread([1.0, 2.0, 6.0], 1) == "3.0 (1.0 to 6.0)"


# --- What is committed ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(ATLAS.read_text(encoding="utf-8"))
    return document


def test_the_committed_pages_show_the_committed_results(committed: dict[str, Any]) -> None:
    assert atlas_block(committed) in (ROOT / "docs" / "atlas.md").read_text(encoding="utf-8")
    assert atlas_picture(committed) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_committed_atlas_has_every_method_with_its_rate_and_all_seeds(committed: dict[str, Any]) -> None:
    assert committed["steps"] == defaults.STEPS
    width = GPT2Config.from_json(checkpoint_directory("bundled") / "config.json").n_embd
    rates = {name: method.learning_rate(width) for name, method in contestants().items()}
    assert {method["name"]: method["learning_rate"] for method in committed["methods"]} == rates
    assert {tuple(run["seed"] for run in method["runs"]) for method in committed["methods"]} == {atlas.SEEDS}


def test_the_figure_in_words_names_the_best_first(committed: dict[str, Any]) -> None:
    document = copy.deepcopy(committed)
    for number, method in enumerate(document["methods"]):
        for run in method["runs"]:
            run["bleu"] = float(number)
    names = [method["name"] for method in reversed(document["methods"])]
    said = atlas.alternative_text(document)
    assert said.endswith("By BLEU: " + "; ".join(f"{n} {len(names) - 1 - i:.1f}" for i, n in enumerate(names)) + ".")
