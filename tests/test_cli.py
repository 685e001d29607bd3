"""The command line: what goes in wrong ends in one line and leaves nothing behind; what goes in right comes out."""

from __future__ import annotations

import argparse
import contextlib
import io
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

from lora_from_scratch import cli
from lora_from_scratch.cli import COMMANDS, build_parser, doctor, main
from lora_from_scratch.finetune.data import Example
from lora_from_scratch.gpt2.checkpoint import load_gpt2, load_model, save_gpt2
from lora_from_scratch.method import load_adapter
from tests.helpers import REPOSITORY
from tests.tiny_runs import SHORT, examples, files_in, make_model, short_judgement, write_data

CARD = "hero[fox], trait[wise], place[on an island], wish[a crown], ending[happy]"


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `data.csv`, and `adapter`: what a short run of LoRA wrote."""
    directory = tmp_path_factory.mktemp("cli")
    model, data = make_model(directory / "model"), write_data(directory / "data.csv")
    with pytest.MonkeyPatch.context() as patch:
        short_judgement(patch)
        run = ["finetune", "--model", str(model), "--data", str(data), "--output", str(directory / "adapter")]
        assert main([*run, *SHORT, "--steps", "8", "--learning-rate", "0.05"]) == 0
    return directory


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    short_judgement(monkeypatch)


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in arguments])
    return code, out.getvalue(), err.getvalue()


def complaint(*arguments: object) -> str:
    """The one line with which bad input ends."""
    code, _, err = call(*arguments)
    assert code == 2
    assert "Traceback" not in err
    lines = err.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum("error: " in line for line in lines) == 1
    return lines[-1]


def output_of(*arguments: object) -> str:
    code, out, err = call(*arguments)
    assert code == 0, err
    return out


# --- Help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_in_which_every_flag_is_explained(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: lora-from-scratch {command}" in capsys.readouterr().out
    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for action in subparsers.choices[command]._actions:
        assert action.help, f"{command} {action.option_strings} has no help"


def test_without_a_command_the_help_comes_and_names_every_command() -> None:
    out = output_of()
    assert all(f"\n    {command} " in out for command in COMMANDS)


def test_the_examples_in_the_help_are_command_lines_that_parse() -> None:
    import shlex

    lines = [line.strip() for line in cli.EPILOG.splitlines() if line.startswith("  lora-from-scratch")]
    assert len(lines) >= 4
    for line in lines:
        build_parser().parse_args(shlex.split(line.split("   ")[0])[1:])


def test_the_console_script_answers() -> None:
    script = Path(sys.executable).with_name("lora-from-scratch")
    if not script.exists():
        pytest.skip("the package is not installed")
    done = subprocess.run([script, "doctor", "--no-such-flag"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unrecognized arguments: --no-such-flag (see lora-from-scratch --help)\n"


# --- Bad input: flags -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rank", "0"], "rank must be a whole number of at least 1, got 0"),
        (["--rank", "33"], "rank must be between 1 and 32"),
        (["--rank", "two"], "--rank takes whole numbers, got 'two'"),
        (["--rank", "2", "3"], "unrecognized arguments: 3"),
        (["--alpha", "0"], "alpha must be a positive number"),
        (["--dropout", "1"], "dropout must be at least 0 and below 1"),
        (["--targets", "c_atn"], "the target 'c_atn' matches nothing; the model has transformer.h.(n).attn.c_attn"),
        (["--targets", "("], "'(' is not a regular expression"),
        (["--method", "full"], "method full has no --rank; its hyperparameters are: none"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many' (see lora-from-scratch finetune --help)"),
        (["--learning-rate", "-1"], "learning_rate must be a positive number, got -1.0"),
        (["--learning-rate", "0"], "learning_rate must be a positive number, got 0.0"),
        (["--learning-rate", "nan"], "learning_rate must be a positive number, got nan"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--warmup-steps", "9"], "warmup_steps must be from 0 to 3, got 9"),
        (["--accumulation", "0"], "accumulation must be at least 1, got 0"),
        (["--clip-norm", "-1"], "clip_norm must not be negative"),
        (["--weight-decay", "-1"], "weight_decay must not be negative"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--seed", "-1"], "must be from 0 to 2**63 - 1, got -1"),
        (["--seed", str(2**63)], "must be from 0 to 2**63 - 1"),
        (["--cards", "0"], "cards must be at least 1, got 0"),
        (["--checkpoint-every", "0"], "checkpoint_every must be at least 1, got 0"),
        (["--device", "toaster"], "unknown device 'toaster'; the devices are cpu, cuda, cuda:0, cuda:1, ... and auto"),
        (["--device", "cuda"], "PyTorch sees no GPU here; use --device cpu"),
        (["--data", "no-such.csv"], "there is no data set no-such.csv"),
        (["--model", "no/such/model"], "no directory 'no/such/model'"),
        (["--model", ""], "there is no directory ''"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_and_writes_nothing(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    model = ["--model", here / "model", "--data", here / "data.csv", "--output", tmp_path / "out" / "below"]
    assert said in complaint("finetune", *model, *SHORT, *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_not_there_is_refused_and_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_from_scratch.finetune.distributed import find_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="the GPUs here are cuda:0 to cuda:1"):
        find_device("cuda:2")
    assert str(find_device("auto")) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")  # torchrun: one GPU for each process
    assert str(find_device("cuda")) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(find_device("auto")) == "cpu"


@pytest.mark.parametrize("command", ["finetune", "demo", "pretrain"])
@pytest.mark.parametrize("place", ["a file", "below a file", "read-only"])
def test_a_place_that_cannot_be_written_is_found_out_before_the_work(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    monkeypatch.setattr("lora_from_scratch.finetune.training.Trainer.run", lambda self: pytest.fail("it began"))
    if place == "read-only":  # root may write anywhere, so the system has to be played

        def refuse(*args: Any, **keywords: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    output = {"a file": file, "below a file": file / "x" / "y", "read-only": tmp_path / "out"}[place]
    source = ["--corpus", here / "data.csv"] if command == "pretrain" else ["--model", here / "model"]
    line = complaint(command, *source, "--output", output)
    assert f"cannot write to {output}: " in line
    assert files_in(tmp_path) == {"notes.txt": b"mine"}


def test_the_output_may_not_be_the_model_or_hold_another_kind_of_result(here: Path, tmp_path: Path) -> None:
    model = shutil.copytree(here / "model", tmp_path / "model")
    adapter = shutil.copytree(here / "adapter", tmp_path / "adapter")
    before = files_in(tmp_path)
    flags = ["finetune", "--model", model, "--data", here / "data.csv", *SHORT[:-2]]
    assert "is the model's own directory" in complaint(*flags, "--method", "full", "--output", model)
    assert "is the model's own directory" in complaint(*flags, "--output", tmp_path / "x" / ".." / "model")
    assert "holds an adapter" in complaint(*flags, "--method", "full", "--output", adapter)
    shutil.copytree(model, tmp_path / "other")
    assert "holds a whole model" in complaint(*flags, "--output", tmp_path / "other")
    assert before.items() <= files_in(tmp_path).items()


# --- Bad input: files -------------------------------------------------------------------------------


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
        (_replace("config.json", b'{"model_type": "bert"}'), "model_type must be 'gpt2', got 'bert'"),
        (_replace("config.json", b'{"n_embd": 33, "n_head": 2}'), "n_embd must be a multiple of n_head"),
        (_replace("config.json", b"{}"), "do not fit its config.json: missing"),
        (_remove("model.safetensors"), "has no weights"),
        (_cut("model.safetensors", 0.0), "model.safetensors is damaged or cut short"),
        (_cut("model.safetensors", 0.01), "model.safetensors is damaged or cut short"),
        (_cut("model.safetensors", 0.99), "model.safetensors is damaged or cut short"),
        (_replace("model.safetensors", NOISE), "model.safetensors is damaged or cut short"),
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
        (b"mr,ref\n", 1, "no record follows the header"),
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


# --- Generating -------------------------------------------------------------------------------------


def test_generating_with_an_adapter_equals_generating_from_the_merged_model(here: Path, tmp_path: Path) -> None:
    model, tokenizer = load_gpt2(here / "model")
    method = load_adapter(model, here / "adapter")
    save_gpt2(method.merged_copy(model), tokenizer, tmp_path / "merged")
    drawing = ["--card", CARD, "--max-new-tokens", "20", "--temperature", "0.8", "--seed", "3"]
    adapted = output_of("generate", "--model", here / "model", "--adapter", here / "adapter", *drawing)
    assert adapted == output_of("generate", "--model", tmp_path / "merged", *drawing)
    assert adapted != output_of("generate", "--model", here / "model", *drawing)
    assert adapted.startswith(f"{CARD}\n")


def test_prompts_come_from_flags_or_else_from_standard_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["generate", "--model", here / "model", "--max-new-tokens", "3"]
    out = output_of(*command, "--prompt", "Once", "--prompt", "Then")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\r\n\nThen\n"))
    assert output_of(*command) == out
    for nothing in (io.StringIO(""), None):
        monkeypatch.setattr(sys, "stdin", nothing)
        assert "nothing to go on with" in complaint(*command)


def test_an_empty_prompt_is_the_beginning_of_a_text(here: Path) -> None:
    assert len(output_of("generate", "--model", here / "model", "--prompt", "", "--max-new-tokens", "3")) > 1


def test_a_prompt_may_fill_all_but_one_token_of_the_context_and_no_more(here: Path) -> None:
    _, tokenizer = load_gpt2(here / "model")
    token = tokenizer.encode("x")
    assert len(token) == 1
    command = ["generate", "--model", here / "model", "--prompt"]
    assert output_of(*command, "x" * 159).startswith("x" * 159)  # the default of 80 new tokens gives way
    assert "more than the model's context of 160" in complaint(*command, "x" * 160)
    assert "more than the model's context of 160" in complaint(*command, "x" * 100, "--max-new-tokens", "61")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--top-k", "3"], "need a temperature above 0"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "inf"], "temperature"),
        (["--temperature", "1", "--top-p", "0"], "top_p must be above 0"),
        (["--temperature", "1", "--beams", "2"], "a beam search draws nothing"),
        (["--beams", "0"], "num_beams must be at least 1"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--no-repeat-ngram-size", "-1"], "no_repeat_ngram_size"),
        (["--card", "hero[fox"], "the bracket of slot 'hero' is not closed"),
        (["--card", ""], "the meaning representation is empty"),
        (["--prompt", "\udcff"], "surrogates not allowed"),
        (["--adapter", ""], "the name of the directory is empty"),
    ],
)
def test_a_wrong_flag_of_generate_ends_in_one_line(here: Path, flags: list[str], said: str) -> None:
    assert said in complaint("generate", "--model", here / "model", "--prompt", "a", *flags)


def test_a_model_of_weights_that_are_not_numbers_is_refused(here: Path, tmp_path: Path) -> None:
    model, tokenizer = load_gpt2(here / "model")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    save_gpt2(model, tokenizer, tmp_path)
    assert "the model's logits are not numbers" in complaint("generate", "--model", tmp_path, "--prompt", "a")


# --- Evaluating -------------------------------------------------------------------------------------


def test_evaluate_gives_the_numbers_of_the_report(here: Path) -> None:
    command = ["evaluate", "--model", here / "model", "--data", here / "data.csv", "--cards", "1", "--adapter"]
    scores = json.loads(output_of(*command, here / "adapter", "--json"))
    assert set(scores) == {"bleu", "slot_errors", "perplexity", "tale_perplexity", "divergence"}
    assert scores == json.loads((here / "adapter" / "report.json").read_text())["report"]["scores"]
    said = output_of(*command, here / "adapter")
    for number in (f"{scores['bleu']:.2f}", f"{scores['perplexity']:.2f}", f"{scores['divergence']:.3f}"):
        assert number in said


def test_the_base_model_has_no_divergence_from_itself(here: Path) -> None:
    base = ["evaluate", "--model", here / "model", "--data", here / "data.csv", "--cards", "1", "--json"]
    assert json.loads(output_of(*base))["divergence"] == pytest.approx(0, abs=1e-6)


def test_a_perplexity_beyond_all_numbers_is_null_in_json(here: Path, tmp_path: Path) -> None:
    model, tokenizer = load_gpt2(here / "model")
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e6)
    save_gpt2(model, tokenizer, tmp_path)
    command = ["evaluate", "--model", tmp_path, "--data", here / "data.csv", "--cards", "1"]
    assert json.loads(output_of(*command, "--json"))["perplexity"] is None
    assert "perplexity             inf" in output_of(*command)


# --- The doctor -------------------------------------------------------------------------------------


def test_the_doctor_says_what_to_mend_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.CHECKS, "bundled model", lambda: "5,900,000 parameters")
    code, out, _ = call("doctor")
    assert (code, out.count("MEND"), out.count("\nok ")) == (0, 0, len(doctor.CHECKS) - 1)

    def broken() -> str:
        raise RuntimeError("two\nlines")

    monkeypatch.setitem(doctor.CHECKS, "disk", broken)
    code, out, _ = call("doctor")
    assert code == 1
    assert "MEND  disk           two lines\n" in out


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (lambda m: m.setattr(doctor, "REQUIRED", ("torch", "no-such-package")), "missing: no-such-package; run: "),
        (lambda m: m.setattr(doctor, "NEEDED_DISK", 1e18), "MB free here"),
        (lambda m: m.setitem(sys.modules, "torch", None), "MEND  PyTorch"),
        (lambda m: m.setattr("lora_from_scratch.gpt2.checkpoint.BUNDLED_DIRECTORY", Path("no")), "MEND  bundled"),
        (lambda m: m.setattr(doctor.tempfile, "TemporaryFile", _refuse), "this folder cannot be written"),
    ],
)
def test_the_doctor_finds(monkeypatch: pytest.MonkeyPatch, patch: Callable[[Any], None], said: str) -> None:
    patch(monkeypatch)
    code, out, _ = call("doctor")
    assert code == 1
    assert said in out


def _refuse(*args: Any, **keywords: Any) -> None:
    raise PermissionError(13, "Permission denied")


def test_the_doctor_runs_where_torch_is_missing_and_the_others_send_there(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    command = [sys.executable, "-m", "lora_from_scratch"]
    seen = subprocess.run([*command, "doctor"], env=environment, capture_output=True, text=True, check=False)
    assert seen.returncode == 1
    assert "MEND  PyTorch        no torch here\n" in seen.stdout
    other = subprocess.run([*command, "evaluate"], env=environment, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert other.stderr == "error: no torch here; the installation is incomplete, see: lora-from-scratch doctor\n"


# --- The terminal -----------------------------------------------------------------------------------


def test_a_closed_pipe_and_a_full_disk_behind_it_end_without_a_traceback() -> None:
    command = f"{sys.executable} -m lora_from_scratch doctor"
    full = subprocess.run(
        f"{command} > /dev/full", shell=True, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    assert (full.returncode, full.stderr) == (2, "error: No space left on device\n")
    closed = subprocess.run(
        ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (closed.stdout, closed.stderr) == ("141\n", "")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you ...")])
def test_too_little_memory_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(options: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", broken)
    assert "not enough memory; try a smaller batch" in complaint("doctor")


def test_a_mistake_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: argparse.Namespace) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])
