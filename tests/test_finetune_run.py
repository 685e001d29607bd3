"""A whole run of `finetune`: the same every time, whatever happens on the way; and the demo made of two."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_from_scratch import demo as demonstration
from lora_from_scratch.cli import main
from lora_from_scratch.finetune import defaults, evaluation
from lora_from_scratch.finetune import run as running
from lora_from_scratch.finetune.completions import Completions
from lora_from_scratch.finetune.evaluation import Scores, first_cards, perplexity, write_texts
from lora_from_scratch.finetune.report import HEADINGS, describe, rows, size, table
from lora_from_scratch.finetune.run import CHECKPOINT, Report, Run, finetune
from lora_from_scratch.finetune.training import Trainer, TrainingSettings
from lora_from_scratch.gpt2.checkpoint import load_gpt2, save_gpt2
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.lora import LoRA
from lora_from_scratch.method import METHODS, load_adapter
from lora_from_scratch.peft_format import CONFIG_FILE, WEIGHTS_FILE
from tests.helpers import REPOSITORY
from tests.tiny_runs import SHORT, examples, files_in, make_model, short_judgement, write_data

ADAPTER = {CONFIG_FILE, WEIGHTS_FILE}
RESULT = ADAPTER | {"report.json"}


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `data.csv`, and `quiet`: what a run wrote that nothing disturbed."""
    directory = tmp_path_factory.mktemp("finetune")
    make_model(directory / "model")
    write_data(directory / "data.csv")
    with pytest.MonkeyPatch.context() as patch:
        short_judgement(patch)
        assert main(run_in(directory, directory / "quiet")) == 0
    return directory


def run_in(here: Path, output: Path, *more: str) -> list[str]:
    places = ["--model", here / "model", "--data", here / "data.csv", "--output", output]
    return ["finetune", *map(str, places), *SHORT, *more]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    short_judgement(monkeypatch)


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
        assert main(run_in(here, tmp_path)) == 0
        report = json.loads((tmp_path / "report.json").read_text())["report"]
        assert report["saved_bytes"] == sum((tmp_path / name).stat().st_size for name in ADAPTER)
    assert set(files_in(tmp_path)) == RESULT | {"notes.txt"}


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

    assert rate(here / "quiet") == defaults.LEARNING_RATES["lora"][0]
    assert main(run_in(here, tmp_path, "--learning-rate", "1e-5")) == 0
    assert rate(tmp_path) == 1e-5


def test_every_method_has_a_tuned_learning_rate_and_a_stranger_has_to_give_one() -> None:
    small, large = GPT2Config(n_embd=256, n_head=8), GPT2Config()
    for method in METHODS:
        assert all(0 < defaults.learning_rate_for(method, config) < 1 for config in (small, large))
    with pytest.raises(ValueError, match="method magic has no tuned learning rate; give one"):
        defaults.learning_rate_for("magic", small)


# --- Killed, interrupted, started again -------------------------------------------------------------


def test_a_run_that_is_killed_and_started_again_ends_with_the_same_adapter(here: Path, tmp_path: Path) -> None:
    """SIGKILL when the first checkpoint has just been written."""
    quiet, troubled = tmp_path / "quiet", tmp_path / "troubled"
    long = ["--steps", "12", "--checkpoint-every", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "lora_from_scratch", *run_in(here, troubled, *long)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (troubled / CHECKPOINT).exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert ADAPTER.isdisjoint(files_in(troubled))
    (troubled / ".adapter_model.safetensors.ab12cd34.part").write_bytes(b"half")  # as a kill while writing leaves it
    assert main(run_in(here, troubled, *long)) == 0
    assert main(run_in(here, quiet, *long)) == 0
    assert adapter(troubled) == adapter(quiet)
    assert set(files_in(troubled)) == RESULT
    losses = [json.loads((place / "report.json").read_text())["report"]["losses"] for place in (quiet, troubled)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("moment", ["training", "saving", "judging", "reporting"])
def test_an_interrupted_run_goes_on_when_it_is_started_again(
    here: Path, tmp_path: Path, moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        if moment == "training":
            patch.setattr(Trainer, "_after_step", interrupt)
        elif moment == "saving":
            patch.setattr(LoRA, "to_adapter", interrupt)
        else:
            patch.setattr(running, {"judging": "evaluate", "reporting": "write_json"}[moment], interrupt)
        assert main(run_in(here, tmp_path)) == 130
    assert "goes on from its last checkpoint when started again" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        if moment != "training":  # the training was over and is not done again
            patch.setattr(Trainer, "_one_step", lambda *args: pytest.fail("trained once more"))
        assert main(run_in(here, tmp_path)) == 0
    assert adapter(tmp_path) == adapter(here / "quiet")
    assert set(files_in(tmp_path)) == RESULT


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (["--rank", "3"], "data, model or method"),
        (["--batch-size", "3"], "data, model or method"),
        (["--seed", "1"], "seed"),
        (["--steps", "4"], "steps"),
        ("data", "data, model or method"),
        ("model", "data, model or method"),
    ],
)
def test_the_checkpoint_of_another_run_is_not_gone_on_with(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, differs: str
) -> None:
    """Also where only the content of the data or of the model has changed, under the same name."""
    make_model(tmp_path / "model")
    write_data(tmp_path / "data.csv")
    output = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoRA, "to_adapter", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(run_in(tmp_path, output)) == 130
    before = files_in(output)
    if change == "data":
        write_data(tmp_path / "data.csv", examples(9))
    if change == "model":
        model, tokenizer = load_gpt2(tmp_path / "model")
        with torch.no_grad():
            model.transformer.wte.weight[0, 0] += 1
        save_gpt2(model, tokenizer, tmp_path / "model")
    capsys.readouterr()
    assert main(run_in(tmp_path, output, *(change if isinstance(change, list) else []))) == 2
    assert differs in capsys.readouterr().err.splitlines()[-1]
    assert files_in(output) == before


# --- Full disks and other misfortune ----------------------------------------------------------------


def _nth_call_fails(n: int, error: Exception, whole: Callable[..., Any]) -> Callable[..., Any]:
    calls = iter(range(1, 1000))

    def fail(*args: Any, **keywords: Any) -> Any:
        if next(calls) == n:
            raise error
        return whole(*args, **keywords)

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("where", "error", "left"),
    [
        (("os.fsync", 1), FULL, set()),  # the checkpoint
        (("os.fsync", 2), FULL, {CHECKPOINT}),  # the adapter
        (("os.fsync", 4), FULL, {CHECKPOINT, *ADAPTER}),  # the report
        (("torch.save", 1), RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), set()),
        (("lora_from_scratch.peft_format.save_file", 1), SafetensorError("I/O error: No space left"), {CHECKPOINT}),
    ],
)
def test_a_full_disk_ends_in_one_line_with_nothing_half_written_and_the_run_can_go_on(
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    where: tuple[str, int],
    error: Exception,
    left: set[str],
) -> None:
    output = tmp_path / "new" / "out"
    name, call = where
    module, _, function = name.rpartition(".")
    __import__(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, _nth_call_fails(call, error, getattr(sys.modules[module], function)))
        assert main(run_in(here, output)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "space left" in last or "file write failed" in last
    assert set(files_in(tmp_path / "new")) == {f"out/{name}" for name in left} if left else not output.exists()
    assert main(run_in(here, output)) == 0
    assert adapter(output) == adapter(here / "quiet")
    assert set(files_in(output)) == RESULT


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """The system itself refuses to write more: what a full disk is for every writer, torch's C++ and safetensors' Rust
    alike."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kept", [0, 4096, 20_000])
def test_where_the_system_refuses_to_write_nothing_is_left(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: int
) -> None:
    with _largest_file(kept):
        code = main(run_in(here, tmp_path / "out"))
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_is_one_line_with_the_step_and_what_to_try(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ["--learning-rate", "1e30", "--clip-norm", "0", "--warmup-steps", "0", "--steps", "20"]
    assert main(run_in(here, tmp_path / "out", *wild)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: stopped at step ")
    assert "Try a learning rate ten times smaller" in last
    assert not (tmp_path / "out").exists()


def test_a_report_of_a_run_that_went_astray_is_json_that_every_program_reads(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "completion_loss", lambda model, batches: 1e4)  # e**10000 is beyond all numbers
    assert main(run_in(here, tmp_path)) == 0
    document = (tmp_path / "report.json").read_text()
    assert "Infinity" not in document
    assert "NaN" not in document
    assert json.loads(document)["report"]["scores"]["perplexity"] is None


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
    assert "examples are longer than the context of 160 tokens and are left out" in capsys.readouterr().out


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


# --- The demo ---------------------------------------------------------------------------------------


def report(name: str, **changes: Any) -> Report:
    scores = Scores(bleu=40.0, slot_errors=0.1, perplexity=3.0, tale_perplexity=50.0, divergence=0.2)
    sample = {"mr": "hero[fox]", "before": "A tree.", "after": f"A fox, says {name}."}
    given = Report(name, 100, 1000, 1e-3, 60.0, 500_000_000, 2_000_000, 1.0, "out", scores, 30.0, [sample], [2.0, 1.0])
    return replace(given, **changes)


def test_the_table_is_markdown_with_a_row_for_each_report() -> None:
    lines = table([report("full"), report("lora", trained_parameters=10)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) == set("|-:")
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["10.00 %", "1.00 %"]


def test_the_description_shows_each_card_before_and_by_each_method() -> None:
    said = describe([report("full"), report("lora")])
    assert said.splitlines() == [
        "Card    hero[fox]",
        "before  A tree.",
        "full    A fox, says full.",
        "lora    A fox, says lora.",
    ]


def test_the_demo_writes_table_numbers_figure_and_both_results(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(runs: list[Run]) -> list[Report]:
        short = [replace(run, data=str(here / "data.csv"), batch_size=2, cards=1) for run in runs]
        return [finetune(run, progress=False) for run in short]

    monkeypatch.setattr(demonstration, "in_fresh_processes", in_this_process)
    assert main(["demo", "--model", str(here / "model"), "--output", str(tmp_path), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().strip() in said
    both = json.loads((tmp_path / "demo.json").read_text())
    assert [each["method"] for each in both] == ["full", "lora"]
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    load_gpt2(tmp_path / "full")
    model, _ = load_gpt2(here / "model")
    load_adapter(model, tmp_path / "lora")
    for place in ("table.md", "demo.png", "demo.json", "lora", "full"):
        assert str(tmp_path / place) in said


def test_the_demo_compares_what_can_be_compared() -> None:
    nothing = replace(report("full").scores, bleu=0.0)  # type: ignore[type-var]
    assert "BLEU" not in demonstration.relative(report("lora"), report("full", scores=nothing))
    ratios = demonstration.relative(report("lora", trained_parameters=5, seconds=30.0), report("full"))
    assert ratios["trained parameters"] == pytest.approx(5)
    assert ratios["seconds"] == pytest.approx(50)
    assert ratios["BLEU"] == pytest.approx(100)


def _die(run: Run) -> Report:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_training_process_that_is_killed_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstration, "finetune", _die)
    with pytest.raises(ChildProcessError, match="a training process was killed, perhaps because memory ran out"):
        demonstration.in_fresh_processes([None])  # type: ignore[list-item]
