"""Meaning representations, and the E2E data set's CSV files: what is read, what is refused and where."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_from_scratch.finetune.data import Example, format_mr, parse_mr, references_by_mr
from lora_from_scratch.finetune.e2e import e2e_lexicon, meaning_key, read_e2e, read_e2e_csv, split_by_meaning
from lora_from_scratch.finetune.metrics import MentionFinder, slot_error_rate
from lora_from_scratch.finetune.tasks import load_dataset

DEVSET = Path(__file__).parents[1] / ".." / "shared" / "data" / "e2e" / "devset.csv"

names = st.text("abcXYZ ", min_size=1).map(str.strip).filter(bool)
values = st.text("abc£é ',\"-", min_size=1).map(str.strip).filter(bool)
meanings = st.dictionaries(names, values, min_size=1, max_size=4)
refs = st.text('abc ,"\n£é', min_size=1).filter(str.strip)
examples = st.lists(st.builds(Example, meanings.map(format_mr), refs), min_size=1, max_size=6)
line_ends = st.sampled_from(["\n", "\r\n"])


def as_csv(rows: list[Example], line_end: str = "\n") -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator=line_end)
    writer.writerows([("mr", "ref"), *((row.mr, row.ref) for row in rows)])
    return out.getvalue()


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("e2e") / "data.csv"


# --- Meaning representations -----------------------------------------------------------------------


@given(meanings)
def test_a_meaning_survives_being_written_and_parsed(meaning: dict[str, str]) -> None:
    parsed = parse_mr(format_mr(meaning))
    assert list(parsed.items()) == list(meaning.items())


@pytest.mark.parametrize(
    ("mr", "complaint"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("name[The Eagle", "bracket of slot 'name' is not closed"),
        ("name[The Eagle, food[English]", "bracket of slot 'name' is not closed"),
        ("name[The Eagle], English", "expected slot[value]"),
        ("the best name[The Eagle] food[English]", "expected ', slot[value]' after the best name[The Eagle]"),
        ("hello, name[The Eagle]", "text outside the brackets"),
        ("name[The Eagle] by the river", "expected ', slot[value]'"),
        ("name[The Eagle],", "expected ', slot[value]'"),
        ("name[The Eagle]]", "expected ', slot[value]'"),
        ("[The Eagle]", "must be a slot's name"),
        ("name]The Eagle[", "expected slot[value]"),
        ("name[]", "slot 'name' has no value"),
        ("name[a], food[b], name[c]", "slot 'name' occurs twice"),
    ],
)
def test_a_malformed_meaning_is_refused_with_the_reason(mr: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        parse_mr(mr)


@given(st.text("ab[], ", max_size=12))
def test_any_text_parses_to_a_meaning_that_is_all_of_it_or_is_refused(text: str) -> None:
    try:
        parsed = parse_mr(text)
    except ValueError:
        return
    assert re.sub(r"\s", "", format_mr(parsed)) == re.sub(r"\s", "", text)


def test_references_are_grouped_by_meaning_in_their_order() -> None:
    pairs = [Example("b[1]", "x"), Example("a[1]", "y"), Example("b[1]", "z")]
    assert list(references_by_mr(pairs).items()) == [("b[1]", ["x", "z"]), ("a[1]", ["y"])]


# --- Reading ---------------------------------------------------------------------------------------


@given(examples, line_ends, st.booleans())
@settings(max_examples=50, deadline=None)
def test_what_the_csv_module_writes_is_read_back(file: Path, rows: list[Example], line_end: str, bom: bool) -> None:
    file.write_bytes(as_csv(rows, line_end).encode("utf-8-sig" if bom else "utf-8"))
    assert read_e2e_csv(file) == rows


BAD_RECORDS = {
    '"name[x","fine"': "not closed",
    '"name[x]",""': "reference is empty",
    '"name[x]"," "': "reference is empty",
    '"name[x]"': "1 field, but the header has 2 fields",
    "name[x], food[y],fine": "3 fields, but the header has 2 fields",
    '"","fine"': "meaning representation is empty",
    '"name[x]"y,"fine"': "not a CSV record",
    '"name[x]","never closed': "not a CSV record",
    "name[x],\0": "NUL",
}


@given(examples, line_ends, st.sampled_from(sorted(BAD_RECORDS)))
@settings(max_examples=60, deadline=None)
def test_a_bad_record_is_reported_with_the_line_of_the_file(
    file: Path, rows: list[Example], line_end: str, bad: str
) -> None:
    before = as_csv(rows, line_end).encode()
    file.write_bytes(before + bad.encode() + line_end.encode())
    line = before.count(b"\n") + 1
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:{line}: .*{BAD_RECORDS[bad]}") as caught:
        read_e2e_csv(file)
    assert "\n" not in str(caught.value)


@given(examples, line_ends)
@settings(max_examples=30, deadline=None)
def test_a_byte_that_is_not_utf8_is_reported_with_its_line(file: Path, rows: list[Example], line_end: str) -> None:
    before = as_csv(rows, line_end).encode()
    file.write_bytes(before + "name[Caf\xe9],fine".encode("latin-1"))
    line = before.count(b"\n") + 1
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:{line}: byte 0xe9 is not UTF-8"):
        read_e2e_csv(file)


@given(st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_bytes_give_examples_or_a_value_error_that_names_file_and_line(file: Path, data: bytes) -> None:
    file.write_bytes(b"mr,ref\n" + data)
    try:
        assert read_e2e_csv(file)
    except ValueError as error:
        assert re.match(rf"{re.escape(str(file))}:\d+: ", str(error))  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", ":1: the header must name the column 'mr' exactly once, the file is empty"),
        ("mr,text\nname[x],fine\n", ":1: the header must name the column 'ref' exactly once, found mr, text"),
        ("mr,mr,ref\na,b,c\n", ":1: the header must name the column 'mr' exactly once"),
        ("\n\nfoo\n", ":3: the header must name the column 'mr' exactly once, found foo"),
        ("mr,ref\n", ":1: there are no records after"),
    ],
)
def test_a_bad_header_is_refused(file: Path, text: str, complaint: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        read_e2e_csv(file)


def test_other_columns_and_empty_lines_are_left_out(file: Path) -> None:
    file.write_text("id,ref,mr\n1,fine,name[x]\n\n2,good,name[y]\n\n")
    assert read_e2e_csv(file) == [Example("name[x]", "fine"), Example("name[y]", "good")]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.csv"):
        read_e2e_csv(tmp_path / "nothing.csv")
    with pytest.raises(FileNotFoundError, match="give story-cards, an E2E CSV file, or a directory"):
        load_dataset(str(tmp_path / "nothing.csv"))


# --- Splits ----------------------------------------------------------------------------------------


@given(st.integers(3, 60), st.integers(0, 3), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_a_split_keeps_every_pair_and_shares_no_meaning(meanings: int, more: int, seed: int) -> None:
    pairs = [Example(f"a[{m}], b[1]", str(i)) for i in range(1 + more) for m in range(meanings)]
    pairs += [Example("b[1], a[0]", "the same meaning in another order")]
    data = split_by_meaning("test", pairs, seed)
    parts = (data.train, data.validation, data.test)
    assert sorted(map(repr, chain(*parts))) == sorted(map(repr, pairs))
    keys = [{meaning_key(e.mr) for e in part} for part in parts]
    assert sum(map(len, keys)) == len(set().union(*keys)) == meanings
    assert len(keys[1]) == len(keys[2]) == max(1, round(meanings / 10))


def test_a_split_needs_three_meanings() -> None:
    with pytest.raises(ValueError, match="needs at least 3"):
        split_by_meaning("test", [Example("a[1]", "x"), Example("a[2]", "x")])


def test_the_split_is_the_same_in_every_process_and_another_one_for_another_seed() -> None:
    code = (
        "from lora_from_scratch.finetune.data import Example; from lora_from_scratch.finetune.e2e import *; "
        "p = [Example(f'a[{i}]', 'x') for i in range(40)]; "
        "print([[e.mr for e in split_by_meaning('', p, seed).test] for seed in (0, 0, 1)])"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": s},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for s in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    first, again, other = eval(outputs[0])
    assert first == again != other


def test_a_directory_is_read_as_the_official_split(tmp_path: Path) -> None:
    for number, name in enumerate(["trainset", "devset", "testset_w_refs"]):
        (tmp_path / f"{name}.csv").write_text(f"mr,ref\nname[{number}],text {number}\n")
    (tmp_path / "testset.csv").write_text("MR\nname[2]\n")  # the official one has no references
    data = load_dataset(str(tmp_path))
    assert [data.train, data.validation, data.test] == [[Example(f"name[{n}]", f"text {n}")] for n in range(3)]


def test_a_directory_whose_files_share_a_meaning_is_refused(tmp_path: Path) -> None:
    for name, mr in [("trainset", '"a[1], b[2]"'), ("devset", "a[2]"), ("testset", '"b[2], a[1]"')]:
        (tmp_path / f"{name}.csv").write_text(f"mr,ref\n{mr},text\n")
    with pytest.raises(ValueError, match=r"testset.csv and .*trainset.csv share the meaning"):
        read_e2e(tmp_path)


def test_a_directory_without_one_of_the_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trainset.csv").write_text("mr,ref\na[1],x\n")
    with pytest.raises(FileNotFoundError, match=r"no devset.csv in"):
        read_e2e(tmp_path)


# --- Slots -----------------------------------------------------------------------------------------

E2E_MR = (
    "name[The Eagle], eatType[coffee shop], food[English], priceRange[less than £20], customer rating[low], "
    "area[riverside], familyFriendly[no], near[Café Sicilia]"
)


@pytest.mark.parametrize(
    ("text", "missing", "invented"),
    [
        (
            "The Eagle is a cheap, low rated coffee shop by the river near Cafe Sicilia. It serves English food and is "
            "not family-friendly.",
            set(),
            set(),
        ),
        (
            "Eagle is a family friendly coffee shop with Chinese food for under £20, near Café Sicilia by the river.",
            {"food", "customer rating", "familyFriendly"},
            {("food", "Chinese"), ("familyFriendly", "yes")},
        ),
        ("A high price is paid by a lowly man.", set(parse_mr(E2E_MR)), {("priceRange", "high")}),
    ],
)
def test_slots_are_found_in_e2e_texts(text: str, missing: set[str], invented: set[tuple[str, str]]) -> None:
    lexicon = e2e_lexicon([E2E_MR, "food[Chinese], familyFriendly[yes], priceRange[high], customer rating[high]"])
    assert MentionFinder(lexicon).slot_errors(text, E2E_MR) == (missing, invented)


# --- The real file ---------------------------------------------------------------------------------


@pytest.mark.skipif(not DEVSET.exists(), reason="the real development set is not here")
def test_the_real_development_set_is_read_whole_and_split_by_meaning() -> None:
    with DEVSET.open(encoding="utf-8", newline="") as stream:
        rows = [Example(row["mr"], row["ref"]) for row in csv.DictReader(stream)]
    assert len(rows) == 4672
    assert read_e2e_csv(DEVSET) == rows
    data = load_dataset(str(DEVSET))
    parts = [{e.mr for e in part} for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [437, 55, 55]
    assert sum(len(p) for p in (data.train, data.validation, data.test)) == len(rows)
    assert len(set().union(*parts)) == 547


@pytest.mark.skipif(not DEVSET.exists(), reason="the real development set is not here")
def test_people_s_own_references_have_few_slot_errors_and_shuffled_ones_many() -> None:
    rows = read_e2e_csv(DEVSET)
    lexicon = e2e_lexicon(row.mr for row in rows)
    mrs, texts = [row.mr for row in rows], [row.ref for row in rows]
    assert slot_error_rate(texts, mrs, lexicon) < 0.13
    assert slot_error_rate(texts[1000:] + texts[:1000], mrs, lexicon) > 0.7
