"""Translations: every text has one, nothing but prose differs, and the grade is the same in every language."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("babel", reason="Babel is not installed: pip install -e '.[course]'")

from benchmarks import translations
from benchmarks.translation_rules import wrong
from lora_from_scratch.checks import display
from lora_from_scratch.checks.bank import wrong_answers
from lora_from_scratch.checks.diagnosis import observations_of
from lora_from_scratch.checks.exercise import Exercise
from lora_from_scratch.checks.judge import judge
from lora_from_scratch.checks.observation import observe
from lora_from_scratch.checks.units import find, units
from lora_from_scratch.cli import build_parser
from lora_from_scratch.cli.help_texts import parsers_in, translate_help
from lora_from_scratch.cli.lab import copy_notebooks
from lora_from_scratch.support import translation
from lora_from_scratch.support.translated_notebook import blocks, checksum, translated, wrapped
from lora_from_scratch.support.translation import FOLDER, translate
from tests.bank_on_seeds import drawn_once
from tests.helpers import REPOSITORY
from tests.sandboxes import needs_bubblewrap

LANGUAGES = sorted(set(translation.LANGUAGES) - {translation.ENGLISH})
CATALOGUES = [(language, file.stem) for language in LANGUAGES for file in sorted((FOLDER / language).glob("*.po"))]
ENGLISH_WORDS = translation.re.compile(r"(?:\b[a-z]{2,}\b[ ,]+){5,}")


@pytest.fixture(autouse=True)
def english_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(translation.VARIABLE, raising=False)
    yield
    translation.set_language("en")
    translation.translated_line.cache_clear()


@pytest.fixture(scope="module")
def collected() -> dict[str, translations.Texts]:
    return translations.collect()


def notebook(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "notebooks" / name / f"{name}.ipynb").read_bytes())


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_lacks_a_translation_or_is_left_over(language: str, collected: dict[str, translations.Texts]) -> None:
    found = translations.problems(language, collected)
    assert not found, "run make translations, then translate what is new:\n" + "\n".join(found[:20])


@pytest.mark.parametrize(("language", "name"), CATALOGUES)
def test_translations_keep_code_formulas_structure_and_terms(language: str, name: str) -> None:
    entries = translation.read_entries(FOLDER / language / f"{name}.po")
    found = {text: problems for text, done in entries if done and (problems := wrong(text, done, language))}
    assert not found


def test_a_missing_and_a_stale_text_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translations, "FOLDER", tmp_path)
    translations.update("zh", {"checks": {"A rank.": "", "A bias.": ""}}, begin=["checks"])
    written = (tmp_path / "zh/checks.po").read_text(encoding="utf-8")
    assert len(translations.problems("zh", {"checks": {"A rank.": "", "A bias.": ""}})) == 2
    written = written.replace('"A rank."\nmsgstr ""', '"A rank."\nmsgstr "秩。"')
    (tmp_path / "zh/checks.po").write_text(written, encoding="utf-8")
    found = translations.problems("zh", {"checks": {"A rank.": "", "A bias.": ""}})
    assert found == ["checks: not translated: A bias."]
    found = translations.problems("zh", {"checks": {"A\nrank.": ""}})
    assert found == ["checks: no longer in the sources: A bias."]
    translations.update("zh", {"checks": {"A\nrank.": ""}})
    assert translations.problems("zh", {"checks": {"A rank.": ""}}) == []


@pytest.mark.parametrize(
    ("text", "done", "problem"),
    [
        ("The `A` matrix.", "`B` 矩阵。", "code"),
        ("It is $r$.", "它是 $k$。", "formulas"),
        ("{0} of {1}", "共 {1}", "places"),
        ("See [unit](a.md).", "见[单元](b.md)。", "links"),
        ("- one\n- two", "- 一，二", "lines begin"),
        ("The gradient is wrong.", "斜率不对。", "'gradient' should be 梯度"),
        ("Everything is right.", "一切 all of this is still here in English 正确。", "English is left"),
        ("Everything is right.", "一切正确.", "punctuation"),
    ],
)
def test_the_rules_notice(text: str, done: str, problem: str) -> None:
    assert problem in " ".join(wrong(text, done))


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("unit", units(), ids=lambda unit: unit.number)
def test_a_translated_notebook_differs_in_prose_only(language: str, unit: Any) -> None:
    name = f"unit_{unit.number}"
    if name not in translation.translated_units(language):
        pytest.skip(f"{name} is in English only")
    ours = notebook(name)
    theirs = translated(ours, language)
    place = next(place for place, cell in enumerate(theirs["cells"]) if cell.get("id") == "language")
    chosen = theirs["cells"].pop(place)
    assert f'set_language("{language}")' in "".join(chosen["source"])
    for one, other in zip(ours["cells"], theirs["cells"], strict=True):
        if one["cell_type"] == "code":
            assert code_of(one) == code_of(other)
        else:
            assert one["source"] == other["source"] or len(blocks_of(one)) == len(blocks_of(other))
        assert {**one, "source": 0, "metadata": 0} == {**other, "source": 0, "metadata": 0}


def test_long_lines_of_a_docstring_are_wrapped() -> None:
    line = "    x: " + "一段很长的说明，" * 12 + "其中的 `code_that_is_not(divided)` 保持完整。"
    lines = wrapped(line, 60).split("\n")
    assert len(lines) > 3
    assert "".join(one.strip() for one in lines).replace(" ", "") == line.replace(" ", "")
    assert all(one.startswith("        ") for one in lines[1:])
    assert all(len(one.encode("gbk")) <= 62 for one in lines)  # two bytes a Chinese character
    assert any("`code_that_is_not(divided)`" in one for one in lines)
    assert not any(one.strip().startswith("，") for one in lines)
    assert wrapped("x: short", 60) == "x: short"


def test_checksums_are_those_of_nbgrader() -> None:
    nbformat = pytest.importorskip("nbformat")
    utils = pytest.importorskip("nbgrader.utils")
    cells = translated(notebook("unit_06"), "zh")["cells"]
    graded = [cell for cell in cells if "nbgrader" in cell["metadata"]]
    assert len(graded) > 10
    for cell in graded:
        node = nbformat.from_dict({**cell, "source": "".join(cell["source"])})
        assert cell["metadata"]["nbgrader"].get("checksum", checksum(cell)) == utils.compute_checksum(node)


def code_of(cell: dict[str, Any]) -> str:
    """The code without docstrings."""
    text = "".join(cell["source"])
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return text
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return ast.unparse(tree)


def blocks_of(cell: dict[str, Any]) -> list[str]:
    return blocks("".join(cell["source"]))


# --- What is displayed ---------------------------------------------------------------------------------


def test_english_is_the_default_and_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert translation.language() == "en"
    translation.set_language("zh")
    assert translation.language() == "zh"
    monkeypatch.setenv(translation.VARIABLE, "en")
    assert translation.language() == "en"
    monkeypatch.setenv(translation.VARIABLE, "zh_CN.UTF-8")
    assert translation.language() == "zh"
    monkeypatch.setenv(translation.VARIABLE, "xx")
    assert translation.language() == "zh"  # the notebook's
    with pytest.raises(ValueError, match=r"there is no language 'fr'; there are \"en\" \(English\), \"zh\""):
        translation.set_language("fr")


def test_a_shape_is_not_divided_between_places(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"It is {0}, {1}; not {2}.": "{0}：{1}，而不是 {2}。", "It is {0}; not {1}.": "是 {0}，不是 {1}。"}
    forms = tuple(translation.form_of(*item) for item in texts.items())
    monkeypatch.setattr(translation, "catalogue", lambda code: translation.Catalogue(texts, {}, forms))
    translation.translated_line.cache_clear()
    assert translate("It is (2, 3); not (3, 2).", "zh") == "是 (2, 3)，不是 (3, 2)。"


def test_what_is_inserted_into_a_message_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"There should be {0} pairs, but you return {1}.": "应有 {0} 对，你返回 {1} 对。", "no pair": "没有"}
    forms = tuple(translation.form_of(*item) for item in texts.items() if "{" in item[0])
    made = translation.Catalogue(texts, {}, forms)
    monkeypatch.setattr(translation, "catalogue", lambda code: made)
    translation.translated_line.cache_clear()
    assert translate("There should be 3 pairs, but you return no pair.", "zh") == "应有 3 对，你返回没有对。"
    assert translate("There should be 3\npairs, but you return 2. Why?", "zh") == "应有 3 对，你返回 2 对。Why?"
    assert translate("Something else.", "zh") == "Something else."
    assert translate("There should be (2, 3) pairs, but you return 1.", "zh") == "应有 (2, 3) 对，你返回 1 对。"
    assert translate("There should be 3 pairs, but you return no pair.", "en").endswith("no pair.")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["rank", "prefix_attention", "split_prefix", "LoRALinear", "quantize_nf4"])
def test_every_message_of_an_exercise_is_translated(language: str, name: str) -> None:
    untranslated_messages(language, name)


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("unit", units(), ids=lambda unit: unit.number)
def test_every_message_of_a_unit_is_translated(language: str, unit: Any) -> None:
    if f"unit_{unit.number}" not in translation.translated_units(language):
        pytest.skip("in English only")
    for exercise in unit.exercises:
        untranslated_messages(language, exercise.name)


def untranslated_messages(language: str, name: str) -> None:
    """Show the verdict on every wrong answer of the bank in another language, and look for English sentences."""
    exercise = find(name)[1]
    assert isinstance(exercise, Exercise)
    translation.set_language(language)
    once = drawn_once(exercise)
    for answer in wrong_answers(name):
        if answer.hangs:
            continue
        verdict = judge(once, 0, list(observations_of(answer, once, 0)))
        assert verdict.failure is not None
        if verdict.misconception in ("raises", "another error"):
            continue  # the message quotes that of the error, which stays in English
        shown = " ".join([translate(verdict.message), translate(verdict.failure.case)])
        assert not ENGLISH_WORDS.search(translation.QUOTED.sub("", shown)), shown
        assert translate(verdict.message) in display.as_text(verdict).replace("\n", "") or "`" in verdict.message


@pytest.mark.parametrize("language", LANGUAGES)
def test_verdict_and_points_do_not_depend_on_the_language(language: str) -> None:
    exercise = find("rank")[1]
    assert isinstance(exercise, Exercise)
    inputs = [case.inputs for case in exercise.inputs(0)]
    verdicts = []
    for code in ("en", language):
        translation.set_language(code)
        for answer in wrong_answers("rank")[:2]:
            verdicts.append(judge(exercise, 0, observe(exercise.probe, answer.object, inputs, exercise.seconds, 0)))
    assert verdicts[:2] == verdicts[2:]
    assert display.as_text(verdicts[0]) != verdicts[0].message


# --- Notebooks and commands ----------------------------------------------------------------------------


def test_the_learner_gets_the_notebooks_in_the_language_and_keeps_what_was_written(tmp_path: Path) -> None:
    copied = copy_notebooks(tmp_path, "zh")
    assert "unit_00/unit_00.ipynb" in copied.new
    first = json.loads((tmp_path / "unit_00/unit_00.ipynb").read_bytes())["cells"][0]
    assert "单元 00" in "".join(first["source"])
    assert copy_notebooks(tmp_path, "zh") == ([], [], [])
    (tmp_path / "unit_00/unit_00.ipynb").write_text("mine", encoding="utf-8")
    back = copy_notebooks(tmp_path, "en")
    assert "unit_01/unit_01.ipynb" in back.updated
    assert back.kept == ["unit_00/unit_00.ipynb"]
    assert (tmp_path / "unit_00/unit_00.ipynb").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("isolation", ["none", pytest.param("bubblewrap", marks=needs_bubblewrap)])
def test_a_translated_submission_gets_the_same_marks(language: str, isolation: Any, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    from lora_from_scratch.grading.marking import Settings, mark
    from lora_from_scratch.grading.submissions.matching import match
    from tests.damages import released, submission

    english, unit = submission("00"), find("count_parameters")[0]
    other = nbformat.reads(json.dumps(translated(json.loads(nbformat.writes(english)), language)), as_version=4)
    settings = Settings(tmp_path, isolation=isolation)
    graded = [
        mark(match(one, released("00")), released("00"), unit, "ada", "secret", settings) for one in (english, other)
    ]
    assert graded[0].verdicts == graded[1].verdicts
    assert graded[0].findings == graded[1].findings
    assert all(verdict.points for verdict in graded[0].verdicts.values())


def test_the_help_of_a_command_is_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(translation.VARIABLE, "zh")
    parser = build_parser(["lab"])
    translate_help(parser)
    shown = "\n".join(one.format_help() for one in parsers_in(parser))
    assert "笔记本" in shown
    assert "--language" in shown
    assert "open JupyterLab" not in shown
