"""The benchmarks' commands can be parsed, and what the comparisons with other libraries time runs on a tiny model."""

from __future__ import annotations

import argparse
import ast
import json
import re
import runpy
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from benchmarks import lora_vs_peft, memory_accounting, serving
from benchmarks.make_adapters import make_adapters
from benchmarks.serving_sides import zipf_traffic
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.methods.adapter_files import WEIGHTS_FILE
from tests.helpers import REPOSITORY

pytestmark = pytest.mark.filterwarnings("ignore:'benchmarks", "ignore:`is_gradient_checkpointing`")

BENCHMARKS = REPOSITORY / "benchmarks"
COMMAND = re.compile(r"python -m (benchmarks\.\w+)([^\n`]*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
PLACEHOLDER = re.compile(r"(?<![\w./])[A-Z][A-Z]*(?![\w./])")  # UNIT, FOLDER, R


def commands() -> Iterator[tuple[str, str, frozenset[str]]]:
    """Module, arguments and options of each command in the README's table and in the benchmarks' docstrings."""
    for line in (BENCHMARKS / "README.md").read_text(encoding="utf-8").splitlines():
        found = COMMAND.findall(line)
        for module, arguments in found:
            yield module, arguments, frozenset(FLAG.findall(line if len(found) == 1 else arguments))
    for file in sorted((*BENCHMARKS.glob("*.py"), BENCHMARKS / "answer_mutants/__main__.py")):
        for module, rest in COMMAND.findall(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""):
            arguments = re.split(r" {2,}|#", rest)[0]
            yield module, arguments, frozenset(FLAG.findall(arguments))


def source_of(module: str) -> Path:
    place = REPOSITORY / module.replace(".", "/")
    return place / "__main__.py" if place.is_dir() else place.with_suffix(".py")


def modules() -> list[str]:
    """Every benchmark that is a command."""
    files = [file for file in BENCHMARKS.glob("*.py") if "__main__" in file.read_text(encoding="utf-8")]
    return sorted([*(f"benchmarks.{file.stem}" for file in files), "benchmarks.answer_mutants"])


def run(module: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class ParsedError(Exception):
    """Raised instead of running what was asked for."""


@pytest.fixture
def usage(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands end when their arguments have been parsed; their usage is added to this list."""
    found: list[str] = []
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: Any) -> Any:
        found.append(parser.format_usage())
        parse(parser, *arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    return found


@pytest.mark.parametrize("module", modules())
def test_every_benchmark_has_help(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "ArgumentParser(" in source_of(module).read_text(encoding="utf-8"), "it would begin to work"
    with pytest.raises(SystemExit) as ended:
        run(module, "--help", monkeypatch=monkeypatch)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize(
    ("module", "arguments", "options"),
    [pytest.param(*command, id=f"{command[0]}{number}") for number, command in enumerate(commands())],
)
def test_every_command_that_is_written_down_is_understood(
    module: str,
    arguments: str,
    options: frozenset[str],
    usage: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert module in modules()
    words = re.sub(r"\[|\]|\.\.\.", "", arguments).split()
    if any(PLACEHOLDER.fullmatch(word) for word in words):
        with pytest.raises(SystemExit):
            run(module, "--help", monkeypatch=monkeypatch)
    else:
        with pytest.raises(ParsedError):
            run(module, *words, monkeypatch=monkeypatch)
    assert options <= set(FLAG.findall(usage[0]))


# --- What the comparisons with other libraries time -----------------------------------------------------------

TINY = ("--model", "tiny", "--pairs", "1", "--threads", "1")


@pytest.fixture
def results(tmp_path: Path) -> serving.Results:
    return serving.Results(tmp_path / "serving.json")


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_lora_and_peft_take_the_same_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(lora_vs_peft.torch, "set_num_threads", lambda number: None)
    run("benchmarks.lora_vs_peft", *TINY, "--batch", "2", "--tokens", "16", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["(a)", "(a)", *["(b)"] * 4] * 2
    saved = [numbers(line.partition(" saved ")[2])[0] for line in lines if " saved " in line]
    assert len(saved) == 6
    assert max(saved) <= 1.001


def test_the_family_and_peft_take_the_same_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    more = ("--batch", "2", "--tokens", "16", "--output", str(tmp_path / "table.md"))
    run("benchmarks.family_vs_peft", *TINY, *more, monkeypatch=monkeypatch)
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+), .* \|$", table, re.MULTILINE)
    assert rows == ["DoRA", "VeRA", "AdaLoRA", "RandLoRA", "FourierFT"]
    assert "a ratio of 0." in table


def test_a_mixed_batch_of_peft_gives_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    run("benchmarks.mixed_batch", *TINY, "--adapters", "2", "--rows", "4", monkeypatch=monkeypatch)
    assert "tiny, 2 adapters of rank 8, 4 rows of 1 " in capsys.readouterr().out


def test_every_side_of_the_serving_benchmark_writes_the_same_texts(results: serving.Results, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = argparse.Namespace(
        model="tiny", folder=tmp_path, adapters=[5], requests=6, prompt=7, new=5, rounds=1, sides=serving.SIDES
    )
    model = lora_vs_peft.base_model("tiny").eval()
    make_adapters(tmp_path / "tiny", 5, model.config, (4, 32), 4)
    for file in {path.stat().st_ino: path for path in tmp_path.rglob(WEIGHTS_FILE)}.values():
        factors = load_file(file)
        stronger = {name: factor * (100 if "lora_B" in name else 1) for name, factor in factors.items()}
        file.write_bytes(save(stronger, {"format": "pt"}))
    serving.traffic(options, results)
    answers = {side: results.values[f"traffic/tiny/5/0/{side}"] for side in serving.SIDES}
    asked = zipf_traffic(5, 6, 7, 5, model.config.vocab_size, seed=0)
    plain = [
        zlib.crc32(repr(text).encode()) for text in generate(model, [one.prompt for one in asked], max_new_tokens=5)
    ]
    assert answers.pop("base")["texts"] == plain
    texts = answers["ours"]["texts"]
    assert {side: answer["texts"] for side, answer in answers.items()} == dict.fromkeys(answers, texts)
    assert not set(texts) & set(plain), "the adapters do nothing"
    assert {answer["tokens"] for answer in answers.values()} == {6 * 5}
    assert json.loads(results.path.read_text()).keys() == results.values.keys()


def test_the_batched_product_and_pefts_are_timed_in_pairs(results: serving.Results, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    serving.product(argparse.Namespace(model="tiny", folder=tmp_path, pairs=1), results)
    expected = {f"product/tiny/{what}/0/{side}" for what in ("step", "alone") for side in ("ours", "peft")}
    assert results.values.keys() == expected


def test_nf4_of_bitsandbytes_is_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    run("benchmarks.nf4_vs_bitsandbytes", "--size", "128", "--rounds", "1", monkeypatch=monkeypatch)
    assert len(re.findall(r"^(?:de)?quantise b?float(?:16|32) .* <= ", capsys.readouterr().out, re.MULTILINE)) == 4


def test_fused_attention_is_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("benchmarks.attention", "--pairs", "1", "--batch", "1", "--tokens", "8", monkeypatch=monkeypatch)
    assert capsys.readouterr().out.count("explicit / fused = ") == 2


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_memory_is_predicted_and_measured(name: str) -> None:
    config = lora_vs_peft.base_model("tiny").config
    method = next(method for method in memory_accounting.methods() if method.name == name)
    cells = memory_accounting.compare(config, method, 2, {"precision": "fp32"}).strip("| ").split(" | ")
    assert cells[0] == name
    assert len(cells) == len(memory_accounting.HEADINGS)
    assert float(cells[8]) == pytest.approx(1, abs=0.1)
