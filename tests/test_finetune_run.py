"""A whole run of `finetune`: the same every time, whatever happens on the way; and the demo made of two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_from_scratch.cli import main
from lora_from_scratch.finetune import defaults
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.evaluation import first_cards, perplexity, write_texts
from lora_from_scratch.finetune.report import HEADINGS, rows, size
from lora_from_scratch.finetune.run import Run, finetune
from lora_from_scratch.finetune.training import TrainingSettings
from lora_from_scratch.gpt2.checkpoint import load_gpt2
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.methods.adapter_files import WEIGHTS_FILE
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.registry import load_adapter, method_classes
from tests.cli_calls import complaint
from tests.tiny_runs import ADAPTER, RESULT, SHORT, examples, files_in, make_model, run_in, write_data


@pytest.fixture
def here(quiet_run: Path, short_evaluation: None) -> Path:
    return quiet_run


def adapter(output: Path) -> bytes:
    return (output / WEIGHTS_FILE).read_bytes()


# --- What comes out ---------------------------------------------------------------------------------


def test_a_run_leaves_the_adapter_and_the_report_and_nothing_else(here: Path) -> None:
    assert set(files_in(here / "quiet")) == RESULT


def test_two_runs_give_the_same_adapter_bytes_and_another_seed_gives_others(here: Path, tmp_path: Path) -> None:
    assert main(run_in(here, tmp_path / "again")) == 0
    for name in ADAPTER:
        assert (tmp_path / "again" / name).read_bytes() == (here / "quiet" / name).read_bytes()
    assert main(run_in(here, tmp_path / "other", "--seed", "1", "--learning-rate", "1e-9")) == 0
    begun, other = load_file(here / "quiet" / WEIGHTS_FILE), load_file(tmp_path / "other" / WEIGHTS_FILE)
    factors = [name for name in begun if "lora_A" in name]
    assert all(not torch.allclose(begun[name], other[name], atol=0.05) for name in factors)  # A began elsewhere


def test_the_report_holds_what_the_table_says(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(run_in(here, tmp_path / "out")) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("| method"))
    names, cells = ([cell.strip() for cell in lines[i].split("|")[1:-1]] for i in (header, header + 2))
    said = dict(zip(names, cells, strict=True))
    document = json.loads((tmp_path / "out" / "report.json").read_text())
    report, scores = document["report"], document["report"]["scores"]
    weights = load_file(tmp_path / "out" / WEIGHTS_FILE)
    base, _ = load_gpt2(here / "model")
    assert said["method"] == report["method"] == "lora"
    assert report["trained_parameters"] == sum(t.numel() for t in weights.values())
    assert report["total_parameters"] == sum(p.numel() for p in base.parameters())
    assert said["trained"] == f"{report['trained_parameters']:,}"
    assert said["share"] == f"{100 * report['trained_parameters'] / report['total_parameters']:.2f} %"
    assert said["BLEU"] == f"{scores['bleu']:.1f}"
    assert said["slot errors"] == f"{100 * scores['slot_errors']:.1f} %"
    assert said["perplexity"] == f"{scores['perplexity']:.2f}"
    assert said["tales: before"] == f"{report['tale_perplexity_before']:.1f}"
    assert said["after"] == f"{scores['tale_perplexity']:.1f}"
    assert report["saved_bytes"] == sum(len(b) for n, b in files_in(tmp_path / "out").items() if n in ADAPTER)
    assert said["saved"] == size(report["saved_bytes"])
    assert len(report["losses"]) == 3
    assert report["final_loss"] == pytest.approx(sum(report["losses"]) / 3)
    assert document["run"]["method"]["rank"] == 2
    assert document["run"]["settings"]["learning_rate"] == report["learning_rate"]


def test_the_samples_are_what_the_model_writes_before_and_after(here: Path) -> None:
    report = json.loads((here / "quiet" / "report.json").read_text())["report"]
    model, tokenizer = load_gpt2(here / "model")
    (sample,) = report["samples"]
    assert write_texts(model, tokenizer, [sample["mr"]]) == [sample["before"]]
    load_adapter(model, here / "quiet")
    assert write_texts(model, tokenizer, [sample["mr"]]) == [sample["after"]]


def test_bytes_of_other_files_in_the_output_are_not_counted_and_the_files_stay(here: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):  # the second run replaces the first one's files
        assert main(run_in(here, tmp_path, "--overwrite")) == 0
        report = json.loads((tmp_path / "report.json").read_text())["report"]
        assert report["saved_bytes"] == sum((tmp_path / name).stat().st_size for name in ADAPTER)
    assert set(files_in(tmp_path)) == RESULT | {"notes.txt"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rank", "3"], "different: rank"),
        (["--seed", "4"], "different: seed"),
        (["--learning-rate", "0.5", "--cards", "2"], "different: cards, learning_rate"),
        (["--method", "qlora"], "different: method"),
    ],
)
def test_the_result_of_another_run_is_replaced_only_when_that_is_asked_for(
    here: Path, tmp_path: Path, more: list[str], said: str
) -> None:
    assert main(run_in(here, tmp_path)) == 0
    before = files_in(tmp_path)
    message = complaint(*run_in(here, tmp_path, *more))
    assert f"{tmp_path} holds the result of another run ({said})" in message
    assert "--overwrite" in message
    assert files_in(tmp_path) == before
    assert main(run_in(here, tmp_path)) == 0  # the same run may be repeated
    assert main(run_in(here, tmp_path, *more, "--overwrite")) == 0
    assert files_in(tmp_path)["report.json"] != before["report.json"]


def test_an_output_with_other_files_is_refused_by_name(here: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert "holds other files (thesis.tex)" in complaint(*run_in(here, tmp_path))
    assert set(files_in(tmp_path)) == {"thesis.tex"}


def test_full_fine_tuning_writes_a_whole_model_that_serves_as_model_and_as_adapter(here: Path, tmp_path: Path) -> None:
    places = ["--model", here / "model", "--data", here / "data.csv", "--output", tmp_path]
    assert main([*map(str, ["finetune", "--method", "full", *places]), *SHORT[:-2]]) == 0
    ours, tokenizer = load_gpt2(tmp_path)
    ids = torch.tensor([tokenizer.encode("hero[fox]\nOnce")])
    base, _ = load_gpt2(here / "model")
    assert not torch.allclose(base(ids), ours(ids), atol=1e-3)
    load_adapter(base, tmp_path)
    assert torch.equal(base(ids), ours(ids))


def test_the_learning_rate_is_the_method_s_own_unless_one_is_given(here: Path, tmp_path: Path) -> None:
    def rate(output: Path) -> object:
        return json.loads((output / "report.json").read_text())["report"]["learning_rate"]

    assert rate(here / "quiet") == LoRA.learning_rates.bundled
    assert main(run_in(here, tmp_path, "--learning-rate", "1e-5")) == 0
    assert rate(tmp_path) == 1e-5


def test_every_method_has_a_tuned_learning_rate() -> None:
    small, large = GPT2Config(n_embd=256, n_head=8), GPT2Config()
    for method in method_classes():
        assert all(0 < defaults.learning_rate_for(method, config) < 1 for config in (small, large))
    with pytest.raises(ValueError, match="unknown method 'magic'; the methods are full, lora"):
        defaults.learning_rate_for("magic", small)


# --- The pieces -------------------------------------------------------------------------------------


def test_a_run_without_a_split_trains_and_saves_only(here: Path, tmp_path: Path) -> None:
    settings = TrainingSettings(steps=3, learning_rate=1e-3, precision="fp32")
    run = Run(LoRA(rank=2), settings, tmp_path, str(here / "model"), str(here / "data.csv"), 2, split="")
    report = finetune(run, progress=False)
    assert report.scores is None
    assert set(files_in(tmp_path)) == RESULT
    assert rows([report])[0][HEADINGS.index("BLEU") :] == ("",) * 5
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        replace(run, batch_size=0)


def test_a_method_that_takes_some_of_the_context_leaves_the_longest_examples_out(here: Path, tmp_path: Path) -> None:
    _, tokenizer = load_gpt2(here / "model")
    pairs = examples(8)
    longest = max(len(ids) for ids, _ in Completions(pairs, tokenizer, 999).rows)
    model, data = make_model(tmp_path / "model", n_positions=longest), write_data(tmp_path / "data.csv", pairs)
    command = ["finetune", "--method", "prompt", "--model", model, "--data", data, "--output", tmp_path / "out"]
    assert main([*map(str, command), *SHORT[:-2], "--steps", "8"]) == 0  # two epochs of 8 examples


def test_examples_that_are_too_long_are_left_out_and_counted(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = examples(8)
    pairs[0] = replace(pairs[0], ref=" ".join([pairs[0].ref] * 9))
    pairs[5] = replace(pairs[5], ref=" ".join([pairs[5].ref] * 9))
    write_data(tmp_path / "data.csv", pairs)
    _, tokenizer = load_gpt2(here / "model")
    left_out = Completions(pairs, tokenizer, 160).left_out
    assert left_out == 2
    assert main([*run_in(here, tmp_path / "out"), "--data", str(tmp_path / "data.csv")]) == 0
    assert "examples are longer than the context of 160 tokens and are skipped" in capsys.readouterr().out


def test_the_first_cards_keep_all_their_references() -> None:
    pairs = [replace(e, ref=f"{e.ref} {i}") for e in examples(4) for i in range(3)]
    assert first_cards(pairs, 2) == pairs[:6]
    assert first_cards(pairs, 99) == pairs


def test_perplexity_is_the_exponential_and_never_an_error() -> None:
    assert perplexity(2.0) == pytest.approx(7.389056)
    assert perplexity(1e6) == float("inf")


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_440_000, "1.4 MB"), (250_000_000, "250 MB")]
)
def test_sizes_are_written_for_people(count: int, said: str) -> None:
    assert size(count) == said
