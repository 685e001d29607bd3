"""Predictions: the first counts, every answer has a reply, and a verdict says whose run it is from."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from lora_from_scratch.checks import cells, check, progress_file
from lora_from_scratch.checks.exercise import Prediction
from lora_from_scratch.checks.judge import judge_prediction
from lora_from_scratch.checks.notebook import verdict_on
from lora_from_scratch.checks.units import Unit, units
from lora_from_scratch.grading.building.execution import execute
from lora_from_scratch.grading.building.source import read_source
from lora_from_scratch.support import learner_folder
from tests.tiny_course import ROOT

PREDICTIONS = [pytest.param(unit, item, id=item.name) for unit in units() for item in unit.predictions]
CHOICE = Prediction(
    "guess",
    "Which?",
    "b",
    "Because.",
    "an idea",
    {"a": "one", "b": "two", "c": "three"},
    replies={"a": "One is too few.", "c": "Three are too many."},
    measured="60 steps",
)
NUMBER = Prediction(
    "guess", "How many?", 100, "Because.", "an idea", within=2, replies={"below": "More.", "above": "Fewer."}
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(learner_folder.HOME, str(tmp_path / "home"))
    monkeypatch.delenv(learner_folder.SWITCH, raising=False)
    monkeypatch.setattr(progress_file, "_pending", [])
    monkeypatch.setattr(progress_file, "_unsaved", [])
    return tmp_path / "home"


# --- The first prediction counts ---------------------------------------------------------------------------


def test_the_first_prediction_counts_and_a_later_one_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("where_is_the_key", namespace={"where_is_the_key": "a"}) == 0
    assert "You first said" not in capsys.readouterr().out
    assert check("where_is_the_key", namespace={"where_is_the_key": "b"}) == 0
    said = capsys.readouterr().out
    assert 'You first said "a"; the first prediction counts.' in said
    assert 'You took "a"' in said


def test_a_right_first_prediction_keeps_its_point_whatever_is_written_later() -> None:
    assert check("tokens_saved", namespace={"tokens_saved": 40}) == 1
    assert check("tokens_saved", namespace={"tokens_saved": 3}) == 1


def test_what_is_no_prediction_is_not_kept() -> None:
    value: Any
    for value in (None, "e", 3, 10**400):
        check("where_is_the_key", namespace={"where_is_the_key": value})
    for value in (None, "many", True, 10**400, float("nan"), float("inf")):
        check("tokens_saved", namespace={"tokens_saved": value})
    assert check("where_is_the_key", namespace={"where_is_the_key": " B"}) == 1
    assert check("tokens_saved", namespace={"tokens_saved": 38}) == 1


def test_a_fresh_notebook_is_told_what_was_said_on_this_computer() -> None:
    check("where_is_the_key", namespace={"where_is_the_key": "a"})
    verdict = verdict_on("where_is_the_key", None, {"where_is_the_key": None})
    assert verdict.status == "not started"
    assert verdict.notes == ('You first said "a".',)


def test_a_prediction_in_the_file_that_is_none_of_the_choices_does_not_count(home: Path) -> None:
    progress_file.keep_guess("where_is_the_key", "z")
    assert check("where_is_the_key", namespace={"where_is_the_key": "b"}) == 1


def test_a_progress_file_from_before_predictions_were_kept_is_read(home: Path) -> None:
    home.mkdir()
    (home / "progress.json").write_text('{"version": 1, "exercises": {"rank": {"attempts": 2, "points": 1.0}}}')
    progress = progress_file.load()
    assert progress.notes == []
    assert progress.entries["rank"].attempts == 2


def test_a_cell_that_sets_a_prediction_keeps_it_before_the_experiment_runs(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(text)
            for text in (
                "from lora_from_scratch.checks import check",
                'where_is_the_key = "q"',
                'where_is_the_key = "a"  # a guess',
                'where_is_the_key = "b"  # after the experiment',
                'check("where_is_the_key")',
                "def row_echelon(matrix, tolerance=None):\n    raise NotImplementedError",
                "def row_echelon(matrix, tolerance=None)\n    return matrix",
                'check("row_echelon")',
                "def row_echelon(matrix, tolerance=None):\n    raise NotImplementedError",
                'check("row_echelon")',
            )
        ]
    )
    execute(notebook, building=False, allow_errors=True)
    said = [" ".join(" ".join(map(_text, cell.outputs)).split()) for cell in notebook.cells]
    assert "it must be one of" in said[1]
    assert 'Your prediction: "a"' in said[2]
    assert 'You first said "a"; the first prediction counts.' in said[3]
    assert 'You took "a"' in said[4]
    assert "SyntaxError in line 1 of the cell: expected ':'" in said[7]
    assert "Not started yet" in said[9]


def _text(output: Any) -> str:
    return str(output.get("text") or output.get("data", {}).get("text/plain", ""))


def test_a_cell_that_is_no_python_is_remembered_until_the_name_is_defined() -> None:
    broken = SimpleNamespace(info=SimpleNamespace(raw_cell="class  Layer(:\n    pass"))
    for error, said in ((SyntaxError("invalid syntax"), "SyntaxError: invalid syntax"), (None, "")):
        broken.error_before_exec = error
        cells.after_cell(broken)
        assert cells.not_python("Layer") == said


# --- Every answer has a reply ------------------------------------------------------------------------------


def answers(prediction: Prediction) -> list[Any]:
    """The choices; or a number below, at and above the answer."""
    answer = prediction.answer
    return list(prediction.choices) or [float(answer) / 1000, float(answer), float(answer) * 1000]


@pytest.mark.parametrize(("unit", "prediction"), PREDICTIONS)
def test_every_answer_has_a_reply_of_its_own(unit: Unit, prediction: Prediction) -> None:
    assert set(prediction.replies) == set(prediction.wrong_ways)
    messages = [judge_prediction(prediction, given).message for given in answers(prediction)]
    assert len(set(messages)) == len(messages)
    for reply in prediction.replies.values():
        assert sum(reply in message for message in messages) == 1
        assert reply not in prediction.explanation


@pytest.mark.parametrize(
    ("prediction", "given", "words"),
    [
        (CHOICE, "a", 'You took "a": One is too few. Because.'),
        (CHOICE, "b", 'You took "b". Because.'),
        (NUMBER, 3, "You said 3; the answer is 100. More. Because."),
        (NUMBER, -3, "You said -3; the answer is 100. More. Because."),
        (NUMBER, 120, "You said 120; the answer is 100. Because."),
        (NUMBER, 999.5, "You said 999.5; the answer is 100. Fewer. Because."),
    ],
)
def test_the_verdict_replies_to_what_was_said(prediction: Prediction, given: str | float, words: str) -> None:
    assert judge_prediction(prediction, given).message.startswith(words)


def test_a_reply_to_no_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no other answer b to reply to"):
        Prediction("guess", "Which?", "b", "Because.", "an idea", {"a": "1", "b": "2"}, replies={"b": "No."})


# --- Whose run a verdict is from ---------------------------------------------------------------------------


# Answers that hold in every run: they are calculated or proved, or are another's measurement and say whose.
CALCULATED = {
    *("size_of_the_change", "rank_of_counting", "noise_energy", "where_is_the_key", "tokens_saved"),
    *("first_adam_step", "typed_or_learned", "zero_prefix", "who_learns_first", "time_of_adapters"),
    *("share_of_biases", "a_bias_without_gradient", "both_at_zero", "rank_four_twice", "random_overlap"),
    *("after_an_outlier", "thousand_customers", "two_points_ahead"),
    *("one_adapter_more", "thirty_two_adapters", "left_of_the_bytes"),
}


def test_an_answer_is_calculated_or_says_where_it_was_measured() -> None:
    assert {item.name for unit in units() for item in unit.predictions if not item.measured} == CALCULATED


@pytest.mark.parametrize(("unit", "prediction"), PREDICTIONS)
def test_the_settings_that_a_verdict_names_are_the_units(unit: Unit, prediction: Prediction) -> None:
    text = "\n".join(cell.text for cell in read_source(ROOT / "course" / "units" / f"unit_{unit.number}.py"))
    steps = {int(n) for n in re.findall(r'STEPS(?: = |", ?)(\d+)', text)}
    steps |= {n // 2 for n in steps if "SHORT = max(1, STEPS // 2)" in text}
    assert {int(n) for n in re.findall(r"(\d+) steps", prediction.measured)} <= steps


def test_a_verdict_says_that_another_run_may_differ() -> None:
    message = judge_prediction(CHOICE, "a").message
    assert message.endswith("Measured at the committed settings: 60 steps. Your own run may differ.")
    assert "Measured" not in judge_prediction(NUMBER, 3).message


@pytest.mark.parametrize(("unit", "prediction"), PREDICTIONS)
def test_no_verdict_calls_a_number_of_the_course_the_learners_own(unit: Unit, prediction: Prediction) -> None:
    for text in (prediction.explanation, *prediction.replies.values()):
        for sentence in re.split(r"(?<=[.:;]) ", text):
            assert not (
                re.search(r"\byours?\b|\byou (measured|see|saw|got)\b", sentence) and re.search(r"\d", sentence)
            )
