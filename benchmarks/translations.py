"""Collect what is translated, and bring the catalogues up to date.

    python -m benchmarks.translations [--language zh] [--begin unit_15 ...] [--check]

`make translations` runs it. Each unit has a catalogue, `translations/LANGUAGE/unit_NN.po`, with the prose of its
notebook, its exercises' statements and hints, the names of its cases, and the messages of its checks; `checks.po`
contains what the checks of all units have in common, and `commands.po` the help of the commands. Translations of texts
that are still there are kept, those of others are removed. With `--check` nothing is written: it lists what is missing
or stale in a language, and fails if anything is. `--begin` starts a catalogue; the tests refuse an incomplete one.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import inspect
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import lora_from_scratch
from lora_from_scratch.checks.bank import wrong_answers
from lora_from_scratch.checks.exercise import Exercise, Prediction
from lora_from_scratch.checks.units import Unit, unit_files, units
from lora_from_scratch.cli import build_parser, lab
from lora_from_scratch.cli.help_texts import help_texts, parsers_in
from lora_from_scratch.support.course_files import course_files
from lora_from_scratch.support.files import write_atomically
from lora_from_scratch.support.translated_notebook import blocks, has_prose, texts_of
from lora_from_scratch.support.translation import ENGLISH, FOLDER, LANGUAGES, form_of, is_form, one_line, read_entries

PACKAGE = Path(lora_from_scratch.__file__).resolve().parent
HEADINGS = "grading/building/assemble.py"  # has what the build adds to the cells of every unit
COMMON = (
    "checks/cells.py",
    "checks/diagnosis.py",
    "checks/display.py",
    "checks/explaining.py",
    "checks/in_room.py",
    "checks/judge.py",
    "checks/new_tensor.py",
    "checks/notebook.py",
    "checks/progress_file.py",
    "checks/progress_report.py",
    "checks/relation.py",
    "checks/trial.py",
    "checks/units.py",
    "checks/verdict.py",
    HEADINGS,
)
MESSAGES = ("explanations*.py", "probes*.py")  # of a unit, beside its exercises and answers
SEEDS = range(3)  # of the cases whose names are collected
WRITTEN = datetime.datetime(2026, 11, 29, tzinfo=datetime.UTC)  # the header is the same every time
PROJECT = "lora-from-scratch"
SITE = PACKAGE.parent / "site"
# The alternative text of the figure on the first page, whose numbers change.
PICTURE = (
    "![A row of dots for each method, with its BLEU, slot errors, trained parameters, bytes kept on disk, peak memory, "
    "work of a training step and perplexity of the tales. By BLEU: {0}](docs/atlas.png)"
)

NO_MESSAGE = re.compile(
    r"</|<\w+ |--jp-|margin:|padding:|text-align:|\(\?:|^from __|^# |^lora_from_scratch|ipykernel| = None|find_spec"
    r"|^the cell for"
)
COMPOSED = Path(__file__).with_name("translated_forms.txt")  # what messages are composed to, or insert: one per line
Texts = dict[str, str]  # each text with a note for the translator


def collect() -> dict[str, Texts]:
    """What is translated, by catalogue ("unit_06", "checks", "commands")."""
    common = _messages([PACKAGE / name for name in COMMON]) | dict.fromkeys(composed(), "composed")
    forms = [form_of(text) for text in _messages([PACKAGE / HEADINGS]) if is_form(text)]
    found = {"checks": common, "commands": _commands(), "site": _site()}
    for unit in units():
        texts = {text: note for text, note in _of_unit(unit).items() if text not in common}
        found[f"unit_{unit.number}"] = {
            text: note
            for text, note in texts.items()
            if not any(form.pattern.fullmatch(one_line(text)) for form in forms)
        }
    return found


def update(language: str, catalogues: Mapping[str, Texts], begin: Iterable[str] = ()) -> None:
    """Write the catalogues of a language that exist or are to begin, keeping the translations that there are."""
    known = translations(language)
    for name in sorted({*released(language), *begin} & set(catalogues)):
        texts, file = catalogues[name], FOLDER / language / f"{name}.po"
        text = as_po(language, [(text, known.get(one_line(text), ""), note) for text, note in texts.items()])
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.read_bytes() != text:
            write_atomically(file, lambda place, text=text: place.write_bytes(text))  # type: ignore[misc]


def translations(language: str) -> dict[str, str]:
    """All translations of a language, by the text on one line."""
    entries = (entry for file in sorted((FOLDER / language).glob("*.po")) for entry in read_entries(file))
    return {one_line(text): translation for text, translation in entries if translation}


def as_po(language: str, entries: Iterable[tuple[str, str, str]]) -> bytes:
    """A catalogue as a .po file: texts, translations, and notes for the translator."""
    from babel.messages.catalog import Catalog
    from babel.messages.pofile import write_po

    catalog = Catalog(language, project=PROJECT, version="1", creation_date=WRITTEN, revision_date=WRITTEN, fuzzy=False)
    catalog.header_comment = f"# {LANGUAGES[language]}. The texts are collected by `make translations`."
    for text, translation, note in entries:
        catalog.add(text, translation, auto_comments=[note] if note else [])
    file = io.BytesIO()
    write_po(file, catalog, width=0, omit_header=False)
    return file.getvalue()


def released(language: str) -> set[str]:
    """The names of the catalogues of a language; each has to be complete."""
    return {file.stem for file in (FOLDER / language).glob("*.po")}


def problems(language: str, catalogues: Mapping[str, Texts]) -> list[str]:
    """What is missing in the catalogues of the units that are released in a language, and in the common ones."""
    known = translations(language)
    found = []
    for name in sorted(released(language) & set(catalogues)):
        file = FOLDER / language / f"{name}.po"
        texts = {one_line(text) for text in catalogues[name]}
        missing = [text for text in texts if not known.get(text)]
        stale = [text for text, _ in read_entries(file) if one_line(text) not in texts] if file.is_file() else []
        found += [f"{name}: not translated: {text}" for text in sorted(missing)]
        found += [f"{name}: no longer in the sources: {text}" for text in stale]
    return found


# --- Where the texts are -------------------------------------------------------------------------------


def composed() -> list[str]:
    """Forms of messages that cannot be read off the source, and single words that messages insert."""
    return [line for line in COMPOSED.read_text(encoding="utf-8").splitlines() if line]


def _of_unit(unit: Unit) -> Texts:
    notebook = course_files() / "notebooks" / f"unit_{unit.number}" / f"unit_{unit.number}.ipynb"
    texts: Texts = {}
    _add(texts, texts_of(json.loads(notebook.read_bytes())), "notebook")
    _add(texts, [unit.title], "title")
    for item in unit.checked:
        _add(texts, [item.idea], "idea")
        _add(texts, _of_prediction(item) if isinstance(item, Prediction) else _of_exercise(item, unit), item.name)
    found = {one_line(text) for text in texts}
    files = [file for pattern in MESSAGES for file in unit_files(pattern, f"unit_{unit.number}")]
    messages = _messages(files)
    for file in unit_files("exercises.py", f"unit_{unit.number}"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        said = {
            text
            for node in tree.body
            for part in _explaining(node)
            for text, _ in _strings(ast.Tuple([part]) if isinstance(part, ast.expr) else part)
        }
        messages |= {text: note for text, note in _messages([file]).items() if text in said or is_form(text)}
    return texts | {text: note for text, note in messages.items() if one_line(text) not in found}


def _of_prediction(prediction: Prediction) -> Iterator[str]:
    yield from blocks(prediction.question)
    yield from prediction.replies.values()
    yield prediction.explanation
    if prediction.measured:
        yield prediction.measured


def _of_exercise(exercise: Exercise, unit: Unit) -> Iterator[str]:
    yield from exercise.hints
    names = [{(case.name, case.part) for case in exercise.inputs(seed)} for seed in SEEDS]
    always = set.intersection(*names)
    for case in exercise.inputs(0):
        if (case.name, case.part) in always:
            yield case.name
        yield case.part
    yield from (answer.message for answer in wrong_answers(exercise.name) if answer.message)


def _messages(files: Iterable[Path]) -> Texts:
    """The strings of at least two words in the functions of these files, with numbered places for what is inserted."""
    texts: Texts = {}
    for file in files:
        for text, values in _strings(ast.parse(file.read_text(encoding="utf-8"))):
            note = "; ".join(f"{{{number}}} is {value}" for number, value in enumerate(values))
            for block in blocks(text):
                if _is_message(block) and (is_form(block) or not values):
                    texts.setdefault(block, f"{file.parent.name}/{file.name} {note}".strip())
    return texts


def _explaining(node: ast.stmt) -> list[ast.stmt | ast.expr]:
    """The parts of `exercises.py` with messages: functions that yield no cases, and the values of tables."""
    if isinstance(node, ast.FunctionDef):
        return [] if any(isinstance(inner, ast.Yield | ast.YieldFrom) for inner in ast.walk(node)) else [node]
    value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    return list(value.values) if isinstance(value, ast.Dict) else []


def _is_message(text: str) -> bool:
    return has_prose(text) and len(text.split()) > 1 and not NO_MESSAGE.search(text)


def _strings(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """String literals outside docstrings, each with the expressions that an f-string inserts."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.JoinedStr):
            values = [ast.unparse(part.value) for part in node.values if isinstance(part, ast.FormattedValue)]
            places = iter(range(len(values)))
            parts = [p.value if isinstance(p, ast.Constant) else f"{{{next(places)}}}" for p in node.values]
            yield "".join(map(str, parts)), values
            for part in node.values:
                yield from _strings(part)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, []
        elif isinstance(node, ast.Tuple) and len(node.elts) == 2 and _is_name(node.elts[0]):
            yield from _strings(ast.Tuple(node.elts[1:]))  # a misconception's name, which is recorded, and the message
        else:
            yield from _strings(node)


def _is_name(node: ast.AST) -> bool:
    """Whether it is a misconception's name rather than a sentence."""
    if not isinstance(node, ast.Constant | ast.JoinedStr):
        return False
    words = [str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return bool(words) and not words[-1].endswith((".", "?", ":"))


def _commands() -> Texts:
    """The help of all commands, and what `lab` says to learners."""
    texts: Texts = {}
    for parser in parsers_in(build_parser()):
        _add(texts, help_texts(parser), parser.prog)
    said = _strings(ast.parse(inspect.getsource(lab.report)))
    _add(texts, (text for text, _ in said if _is_message(text)), "lora-from-scratch lab")
    return texts


def _site() -> Texts:
    """The website's own pages, its note on each unit, and the rows of the table of units."""
    sys.path.insert(0, str(SITE))
    import conf
    from sources import IN_THE_CLOUD, NOTE, TRANSLATED, documents
    from translated_pages import texts_in

    texts: Texts = {}
    for name, page in documents():
        if name in TRANSLATED:
            _add(texts, (text for text in texts_in(page) if not text.startswith("![")), name)
    _add(texts, [NOTE, IN_THE_CLOUD, PICTURE], "site/sources.py")
    _add(texts, [conf.nb_code_prompt_show, conf.nb_code_prompt_hide], "site/conf.py")
    return texts


def _add(texts: Texts, found: Iterable[str], note: str) -> None:
    seen = {one_line(text) for text in texts}
    for text in found:
        if text.strip() and has_prose(text) and one_line(text) not in seen:
            texts[text] = note
            seen.add(one_line(text))


# --- The command ---------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", choices=sorted(set(LANGUAGES) - {ENGLISH}), default="zh")
    parser.add_argument("--begin", nargs="+", default=[], metavar="NAME", help="catalogues to start: unit_15")
    parser.add_argument("--check", action="store_true", help="write nothing; list what is missing or stale")
    options = parser.parse_args()
    catalogues = collect()
    if options.check:
        found = problems(options.language, catalogues)
        print("\n".join(found) or "Everything is translated.")
        return 1 if found else 0
    update(options.language, catalogues, options.begin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
