"""The shootout: every core method through the same door; runs side by side, each in a process, none of them twice."""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lora_from_scratch.compare import shootout, side_by_side
from lora_from_scratch.compare.side_by_side import FINISHED, run_in_processes, run_or_reload, tuned_run
from lora_from_scratch.finetune.evaluation import Scores
from lora_from_scratch.finetune.run import Report, Run, finetune
from lora_from_scratch.methods.bitfit import BitFit
from lora_from_scratch.methods.registry import method_classes
from lora_from_scratch.support.files import write_json
from tests.cli_calls import call, complaint
from tests.tiny_runs import make_model, shorten_evaluation, write_data

Done = Callable[[int, Report], object]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shootout")
    make_model(directory / "model", n_layer=3)  # SPAFIT's three groups
    write_data(directory / "data.csv")
    return directory


@pytest.fixture
def carried_out(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are carried out in this process, on less; here are their names."""
    shorten_evaluation(monkeypatch)
    names: list[str] = []

    def in_this_process(runs: list[Run], jobs: int | None, done: Done) -> None:
        for place, run in enumerate(runs):
            names.append(run.output.name)
            done(place, finetune(replace(run, data=str(here / "data.csv"), batch_size=2), progress=False))

    monkeypatch.setattr(side_by_side, "run_in_processes", in_this_process)
    monkeypatch.setattr(side_by_side, "load_dataset", lambda name: name)  # all cards take a second
    return names


def shoot(here: Path, output: Path, *more: str) -> tuple[int, str, str]:
    return call("shootout", "--model", here / "model", "--output", output, "--steps", "2", "--cards", "1", *more)


def report(name: str, bleu: float = 40.0, trained: int = 100) -> Report:
    scores = Scores(bleu=bleu, slot_errors=0.1, perplexity=3.0, tale_perplexity=50.0, divergence=0.25)
    return Report(
        method=name,
        trained_parameters=trained,
        total_parameters=1000,
        learning_rate=1e-3,
        seconds=60.0,
        peak_memory_bytes=500_000_000,
        saved_bytes=2_000_000,
        final_loss=1.0,
        output="out",
        scores=scores,
    )


# --- The command ------------------------------------------------------------------------------------


def test_the_shootout_runs_every_core_method_and_writes_table_numbers_and_figure(
    here: Path, tmp_path: Path, carried_out: list[str]
) -> None:
    code, said, err = shoot(here, tmp_path)
    assert code == 0, err
    assert carried_out == list(shootout.default_contestants())
    page = (tmp_path / "table.md").read_text()
    table, figure = page.strip().split("\n\n")
    assert table in said
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == list(shootout.default_contestants())
    assert table.splitlines()[0].split("|")[-2].strip() == "divergence"
    numbers = json.loads((tmp_path / "shootout.json").read_text())
    assert [each["method"] for each in numbers] == list(shootout.default_contestants())
    assert len({each["total_parameters"] for each in numbers}) == 1
    assert (tmp_path / "shootout.png").read_bytes().startswith(b"\x89PNG")
    assert figure.endswith("](shootout.png)")
    assert all(f"{name} " in figure for name in shootout.default_contestants())


CORE = {"full", "lora", "qlora", "adapter", "prefix", "prompt", "llama-adapter", "bitfit", "spafit"}


def test_every_method_can_take_part_and_the_core_methods_and_two_kinds_of_adapter_do() -> None:
    methods = shootout.contestants(seed=5)
    assert {method.name for method in methods.values()} == set(method_classes())
    assert {methods[name].name for name in shootout.default_contestants()} == CORE
    assert {"adapter-houlsby", "adapter-parallel"} <= set(shootout.default_contestants())
    assert all(getattr(method, "seed", 5) == 5 for method in methods.values())


def test_methods_are_chosen_by_name(here: Path, tmp_path: Path, carried_out: list[str]) -> None:
    assert shoot(here, tmp_path, "--methods", "bitfit", "adapter-pfeiffer", "bitfit")[0] == 0
    assert carried_out == ["bitfit", "adapter-pfeiffer"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--methods", "lora", "lara"],
            "unknown method 'lara'; the methods of the shootout are full, lora, lora-plus, ",
        ),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--cards", "0"], "cards must be at least 1, got 0"),
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--model", "no/such/model"], "no directory 'no/such/model'"),
        (["--output", __file__], "cannot write to"),
    ],
)
def test_bad_input_ends_in_one_line_before_anything_is_trained(
    here: Path, tmp_path: Path, carried_out: list[str], flags: list[str], said: str
) -> None:
    assert said in complaint("shootout", "--model", here / "model", "--output", tmp_path / "out", *flags)
    assert carried_out == []
    assert list(tmp_path.iterdir()) == []


def test_the_figure_in_words_names_the_best_first() -> None:
    said = shootout.alternative_text([report("bitfit", 33.6, 17_000), report("full", 81.1, 5_853_184)])
    assert said.endswith(": full 81.1 with 5,853,184; bitfit 33.6 with 17,000.")


# --- None twice -------------------------------------------------------------------------------------


def test_a_finished_method_is_not_run_again_unless_something_changed(
    here: Path, tmp_path: Path, carried_out: list[str]
) -> None:
    model = make_model(tmp_path / "model", n_layer=3)
    there, output = tmp_path, tmp_path / "out"
    assert shoot(there, output, "--methods", "bitfit")[0] == 0
    first = (output / "table.md").read_text()
    code, _, err = shoot(there, output, "--methods", "bitfit", "lora")
    assert (code, carried_out) == (0, ["bitfit", "lora"])
    assert "Already finished with the same settings: bitfit" in err
    assert shoot(there, output, "--methods", "bitfit")[0] == 0
    assert (output / "table.md").read_text() == first
    assert len(carried_out) == 2
    changes: list[Callable[[], object]] = [
        lambda: shoot(there, output, "--methods", "bitfit", "--steps", "3"),
        lambda: shoot(there, output, "--methods", "bitfit", "--seed", "1"),
        lambda: (output / "bitfit" / "report.json").write_text("{"),
        lambda: (output / "bitfit" / FINISHED).unlink(),
        lambda: make_model(model, n_layer=3, n_embd=48),
    ]
    for number, change in enumerate(changes):
        change()
        before = len(carried_out)
        assert shoot(there, output, "--methods", "bitfit")[0] == 0
        assert len(carried_out) == before + 1, number


def test_a_report_is_not_taken_for_another_s_after_a_stop_between_two_files(
    here: Path, tmp_path: Path, carried_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(steps: int) -> Run:
        return tuned_run(BitFit(), tmp_path / "bitfit", rate=1e-3, model=str(here / "model"), steps=steps, cards=1)

    run_or_reload([run(2)])
    with monkeypatch.context() as patch:  # the other run writes its report, and then the lights go out
        patch.setattr(side_by_side, "write_json", lambda *_: pytest.fail("dark"))
        with pytest.raises(pytest.fail.Exception):
            run_or_reload([run(3)])
    (again,) = run_or_reload([run(2)])
    assert len(again.losses) == 2


def test_a_report_is_read_as_it_was_written_and_what_is_infinite_too(tmp_path: Path) -> None:
    written = replace(report("lora"), losses=[2.0], samples=[{"mr": "a", "before": "b", "after": "c"}])
    assert written.scores
    written.scores = replace(written.scores, tale_perplexity=float("inf"))
    written.tale_perplexity_before = 30.0
    write_json(tmp_path / "report.json", {"report": asdict(written), "run": {}})
    assert side_by_side.read_report(tmp_path / "report.json") == written
    for damaged in ("[]", "{}", '{"report": {}}', '{"report": null}'):
        (tmp_path / "report.json").write_text(damaged)
        with pytest.raises(ValueError, match="not the report of a run"):
            side_by_side.read_report(tmp_path / "report.json")


# --- Processes --------------------------------------------------------------------------------------


def small_run(here: Path, output: Path, rate: float) -> Run:
    run = tuned_run(BitFit(), output, rate=rate, model=str(here / "model"), steps=3, split="")
    return replace(run, data=str(here / "data.csv"), batch_size=2)


def test_two_processes_at_once_give_what_one_gives_and_a_run_that_diverges_is_told_apart(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [small_run(here, tmp_path / f"run-{rate:g}", rate) for rate in (1e-3, 1e38, 1e-2)]
    finished: list[int] = []
    lost: list[tuple[int, str]] = []
    reports = run_in_processes(
        runs, 2, lambda place, _: finished.append(place), lambda place, error: lost.append((place, str(error)))
    )
    assert sorted(finished) == [0, 2]
    assert [place for place, _ in lost] == [1]
    assert "stopped at step" in lost[0][1]
    alone = finetune(replace(runs[2], output=tmp_path / "alone"), progress=False)
    assert reports[1].losses == pytest.approx(alone.losses, rel=1e-6)
    err = capsys.readouterr().err
    assert "run-0.001: done, " in err
    assert "run-1e+38: failed, " in err
    assert "3 of 3\n" in err


def test_an_error_in_a_process_names_its_run_and_ends_the_others(here: Path, tmp_path: Path) -> None:
    endless = small_run(here, tmp_path / "endless", 1e-3)
    endless = replace(endless, settings=replace(endless.settings, steps=10**6))
    with pytest.raises(ValueError, match=r"^wild: stopped at step"):
        run_in_processes([endless, small_run(here, tmp_path / "wild", 1e38)], 2)
    assert multiprocessing.active_children() == []


def test_jobs_are_two_where_there_are_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, jobs in ((1, 1), (2, 2), (64, 2)):
        monkeypatch.setattr(side_by_side, "cores", lambda cores=cores: cores)
        assert side_by_side.jobs_at_once() == jobs
    assert side_by_side.jobs_at_once(5) == 5
    assert run_in_processes([]) == []


def test_on_a_terminal_each_process_under_way_has_a_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    display = side_by_side._Display([small_run(tmp_path, tmp_path / name, 1.0) for name in ("full", "lora")])
    display.show(0, "3 of 9 examples are skipped")
    display.show(0, "\rfull:  60%|######    | 300/500 [00:45<00:30]")
    display.show(1, "\rlora:  10%|#         | 50/500 [00:07<01:10]")
    display.show(0, "\n")
    display.show(0, report("full"))
    display.close()
    said = screen.getvalue()
    for line in ("full: 3 of 9 examples are skipped", "full   60%|######    | 300/500", "lora   10%|"):
        assert line in said
    assert said.index("full  trained, evaluating") < said.index("full: done, 1 of 2, about ")
