"""`finetune` with less memory: a base in four bits from the beginning, an optimiser whose state is in a file.

And what else its flags reach: soft prompts that begin with words.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_from_scratch.cli import main
from lora_from_scratch.finetune import run as running
from lora_from_scratch.finetune.paged_optimizer import PagedAdamW
from lora_from_scratch.finetune.run import Run, finetune
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2.checkpoint import load_gpt2, save_gpt2
from lora_from_scratch.gpt2.model import Conv1D
from lora_from_scratch.methods.adapter_files import WEIGHTS_FILE
from lora_from_scratch.methods.loftq import LoftQ
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.qlora import QLoRA
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.quantization.nf4_linear import nf4_layers
from tests.tiny_runs import SHORT, files_in, make_model, shorten_evaluation, write_data


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qlora")
    make_model(directory / "model")
    write_data(directory / "data.csv")
    return directory


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_evaluation(monkeypatch)


def command(here: Path, output: Path, *more: str) -> list[str]:
    places = ["--model", here / "model", "--data", here / "data.csv", "--output", output]
    return ["finetune", *map(str, places), *SHORT, *more]


def qlora_run(here: Path, output: Path, **changes: Any) -> Run:
    return Run(
        method=QLoRA(rank=2, keep_base=False),
        settings=TrainingSettings(steps=2, learning_rate=1e-2, precision="fp32"),
        output=output,
        model=str(here / "model"),
        data=str(here / "data.csv"),
        batch_size=2,
        split="",
        **changes,
    )


def report_of(output: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((output / "report.json").read_text())["report"]
    return report


# --- QLoRA ------------------------------------------------------------------------------------------


def test_no_full_matrix_is_there_from_loading_to_saving(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watch(place: type, name: str) -> None:
        whole = getattr(place, name)

        def watched(self: Any, *arguments: Any, **more: Any) -> Any:
            model = self.model if isinstance(self, Trainer) else arguments[0]
            assert len(nf4_layers(model)) == 8
            assert not [module for module in model.modules() if isinstance(module, Conv1D)]
            seen.append(name)
            return whole(self, *arguments, **more)

        monkeypatch.setattr(place, name, watched)

    watch(QLoRA, "adapt")
    watch(Trainer, "run")
    watch(QLoRA, "save")
    monkeypatch.setattr(running, "load_language_model", None)  # nothing is evaluated: the full model is not needed
    finetune(qlora_run(here, tmp_path / "out"), progress=False)
    assert seen == ["adapt", "run", "save"]


def test_it_learns_what_it_learns_on_a_base_that_is_loaded_first_and_quantised_then(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = finetune(qlora_run(here, tmp_path / "ours"), progress=False)
    monkeypatch.setattr(QLoRA, "load_base", Method.load_base)
    theirs = finetune(qlora_run(here, tmp_path / "theirs"), progress=False)
    assert report.losses == theirs.losses
    assert (tmp_path / "ours" / WEIGHTS_FILE).read_bytes() == (tmp_path / "theirs" / WEIGHTS_FILE).read_bytes()
    base, _ = load_gpt2(here / "model")
    assert report.total_parameters == theirs.total_parameters == sum(p.numel() for p in base.parameters())


def test_qlora_runs_from_the_command_line_twice_into_one_place_and_is_judged_against_the_full_base(
    here: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        assert main(command(here, tmp_path, "--method", "qlora")) == 0
    scores = report_of(tmp_path)["scores"]
    assert scores["divergence"] > 1e-4  # with a base in four bits it would be smaller than quantising makes it
    model, _ = load_gpt2(here / "model")
    assert isinstance(load_adapter(model, tmp_path), QLoRA)
    assert main(command(here, tmp_path / "loftq", "--method", "loftq", "--iterations", "2")) == 0


def test_a_run_does_not_go_on_with_the_checkpoint_of_another_quantised_base(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any) -> tuple[int, int]:
        raise KeyboardInterrupt

    flags = ("--method", "qlora", "--checkpoint-every", "1")
    model = make_model(tmp_path / "model")
    other, tokenizer = load_gpt2(model)
    with monkeypatch.context() as patch:
        patch.setattr(running, "_save", stop)
        assert main([*command(here, tmp_path / "out", *flags), "--model", str(model)]) == 130
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight.mul_(1.5)  # type: ignore[union-attr, operator]
    save_gpt2(other, tokenizer, model)
    assert main([*command(here, tmp_path / "out", *flags), "--model", str(model)]) == 2
    assert "different: data, model or method" in capsys.readouterr().err


def test_a_tokenizer_with_too_many_tokens_is_refused_for_a_quantised_base_too(here: Path, tmp_path: Path) -> None:
    model, _ = load_gpt2(make_model(tmp_path / "model"))
    vocabulary = json.loads((tmp_path / "model" / "vocab.json").read_text())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert len(vocabulary) == config["vocab_size"] == model.config.vocab_size
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = "transformer.wte.weight"
    save_file({**weights, name: weights[name][:-1].clone()}, tmp_path / "model" / "model.safetensors")
    config |= {"vocab_size": config["vocab_size"] - 1}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for method in (QLoRA(), LoftQ()):
        with pytest.raises(
            ValueError,
            match=rf"has {len(vocabulary)} tokens, more than the model's vocabulary of {len(vocabulary) - 1}",
        ):
            method.load_base(tmp_path / "model")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--quant-type", "int4"], "quant_type must be one of"),
        (["--blocksize", "63"], "blocksize must be one of"),
        (["--iterations", "2"], "method qlora does not take --iterations; its flags are: "),
        (["--model", "no/such/model"], "no directory 'no/such/model'"),
    ],
)
def test_a_wrong_flag_of_qlora_ends_in_one_line(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main([*command(here, tmp_path / "out", "--method", "qlora"), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.json"])
def test_a_model_with_a_file_missing_ends_in_one_line(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    model = make_model(tmp_path / "model")
    (model / name).unlink()
    assert main([*command(here, tmp_path / "out", "--method", "qlora"), "--model", str(model)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "out").exists()


# --- Soft prompts that begin with words --------------------------------------------------------------


def test_a_prompt_that_begins_with_words_has_the_rows_of_their_tokens(here: Path, tmp_path: Path) -> None:
    text = "Tell the tale"
    flags = ["--method", "prompt", "--num-virtual-tokens", "30", "--init", "text", "--init-text", text]
    prompt = ["finetune", "--model", str(here / "model"), "--data", str(here / "data.csv"), "--output", str(tmp_path)]
    prompt += ["--steps", "1", "--batch-size", "2", "--cards", "1", "--precision", "fp32", "--learning-rate", "1e-9"]
    assert main([*prompt, *flags]) == 0
    model, tokenizer = load_gpt2(here / "model")
    ids = tokenizer.encode(text)
    assert 1 < len(ids) < 30
    rows = model.transformer.wte.weight[torch.tensor((ids * 30)[:30])].detach()
    (learned,) = load_file(tmp_path / WEIGHTS_FILE).values()
    assert torch.allclose(learned, rows, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--init", "text"], "init_text"),
        (["--init", "text", "--init-text", ""], "init_text"),
        (["--init-text", "Tell the tale"], "got init='vocabulary' and init_text='Tell the tale'"),
        (["--init", "text", "--init-text", "a tale " * 40], "tokens but the prompt only 20: shorten the text"),
        (["--init", "words"], "init must be one of vocabulary, text, random"),
        (["--init", "text", "--init-text"], "argument --init-text: expected one argument"),
    ],
)
def test_words_that_are_missing_or_too_many_end_in_one_line(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    places = ["--model", here / "model", "--data", here / "data.csv", "--output", tmp_path / "out"]
    assert main(["finetune", *map(str, places), "--method", "prompt", "--steps", "1", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


# --- Parameters that are trained and not saved ---------------------------------------------------------


def test_the_report_counts_what_a_prefix_trains_and_what_is_left_of_it(here: Path, tmp_path: Path) -> None:
    places = ["--model", here / "model", "--data", here / "data.csv", "--output", tmp_path]
    more = ["--steps", "1", "--batch-size", "2", "--cards", "1", "--num-virtual-tokens", "3", "--hidden", "8"]
    assert main(["finetune", *map(str, places), "--method", "prefix", *more]) == 0
    report = report_of(tmp_path)
    d, out = 32, 2 * 2 * 32
    assert report["trained_parameters"] == 3 * d + (d * 8 + 8) + (8 * out + out)
    assert report["saved_parameters"] == 3 * out


# --- An optimiser whose state is in a file ----------------------------------------------------------------


def test_the_paged_optimiser_trains_as_the_usual_one_does(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, made = PagedAdamW.__init__, []

    def spy(self: PagedAdamW, *arguments: Any, **more: Any) -> None:
        whole(self, *arguments, **more)
        made.append(self)

    monkeypatch.setattr(PagedAdamW, "__init__", spy)
    flags = ["--weight-decay", "0.5", "--learning-rate", "0.01"]
    for optimizer in ("adamw", "paged-adamw"):
        assert not made
        assert main(command(here, tmp_path / optimizer, "--optimizer", optimizer, *flags)) == 0
    (paged,) = made
    assert Path(paged.directory or "").resolve() == tmp_path.resolve()  # on the output's disk, not in /tmp
    ours, theirs = report_of(tmp_path / "paged-adamw")["losses"], report_of(tmp_path / "adamw")["losses"]
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert len(set(ours)) == 3
    left = files_in(tmp_path / "paged-adamw")
    assert left.keys() == files_in(tmp_path / "adamw").keys()


def test_no_room_for_the_optimiser_s_file_is_found_out_before_the_training(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert main(command(here, tmp_path / "out", "--optimizer", "paged-adamw")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: cannot keep ")
    assert last.endswith(f"bytes of optimiser state in a file in {tmp_path}: No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_the_optimiser_s_file_has_its_place_on_the_disk_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, blocks = mmap.mmap, []

    def spy(file: int, size: int) -> mmap.mmap:
        blocks.append((os.fstat(file).st_blocks * 512, size))
        return whole(file, size)

    monkeypatch.setattr("lora_from_scratch.finetune.paged_optimizer.mmap.mmap", spy)
    PagedAdamW([torch.nn.Parameter(torch.zeros(300, 300))], directory=tmp_path)
    ((taken, size),) = blocks
    assert taken >= size >= 2 * 4 * 300 * 300


def test_an_unknown_optimiser_and_a_missing_folder_are_refused(here: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer must be one of adamw, paged-adamw, got 'sgd'"):
        qlora_run(here, tmp_path, optimizer="sgd")
    with pytest.raises(OSError, match=r"in a file in .*missing: No such file"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(3))], directory=tmp_path / "missing")
    assert main(command(here, tmp_path / "out", "--optimizer", "sgd")) == 2
