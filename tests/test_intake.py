"""Downloads from Canvas, Moodle and Gradescope, taken in as they come."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")

from lora_from_scratch.grading.intake.downloads import safe
from lora_from_scratch.grading.intake.roster import Roster, names_of, read_roster
from tests.cli_calls import call, complaint
from tests.grading_course import NAME, RIGHT, GradingCourse, template

LEARNERS = (
    {"id": "amina", "first_name": "Amina", "last_name": "Diallo", "lms_user_id": "4711", "email": "amina@example.org"},
    {"id": "jose", "first_name": "José", "last_name": "Núñez-Ruiz", "lms_user_id": "4712", "email": "j@example.org"},
    {"id": "li1", "first_name": "Wei", "last_name": "Li", "lms_user_id": "1", "email": "li1@example.org"},
    {"id": "li2", "first_name": "Wei", "last_name": "Li", "lms_user_id": "2", "email": "li2@example.org"},
    {"id": "ola", "first_name": "Ola", "last_name": "Nordmann", "email": "ola@example.org"},
)


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    def enrol(gradebook: Any) -> None:
        for learner in LEARNERS:
            gradebook.add_student(learner["id"], **{key: value for key, value in learner.items() if key != "id"})

    with template(tmp_path_factory.mktemp("template") / "course") as made:
        made.as_a_person(enrol)
        yield made


@pytest.fixture
def course(enrolled: GradingCourse, tmp_path: Path) -> GradingCourse:
    return enrolled.copy(tmp_path / "course")


def notebook(course: GradingCourse, number: int) -> bytes:
    return nbformat.writes(course.notebook(RIGHT | {"guess_number": f"guess_number = {number}"})).encode()


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def intake(course: GradingCourse, *arguments: object) -> tuple[int, str, str]:
    return call("intake", "99", *arguments, "--course", course.root)


def collected(course: GradingCourse) -> dict[str, dict[str, bytes]]:
    """By learner, the files in submitted/."""
    return {
        folder.name: {
            path.relative_to(folder / NAME).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in sorted((course.root / "submitted").iterdir())
    }


def test_a_download_from_canvas(course: GradingCourse, tmp_path: Path) -> None:
    books = [notebook(course, number) for number in range(7)]
    download = zipped(
        tmp_path / "submissions.zip",
        {
            f"dialloamina_LATE_4711_901_{NAME}-1.ipynb": books[1],
            "dialloamina_LATE_4711_902_weights.csv": b"1,2",
            f"liwei_1_903_{NAME} (1).ipynb": books[2],
            f"liwei_2_905_{NAME}.ipynb": books[3],
            f"liwei_2_906_{NAME}-2.ipynb": books[4],
            f"nordmannola_77_907_{NAME.replace('_', ' ')}.ipynb": books[5],  # the gradebook has no number for Ola
            f"liwei_3_908_{NAME}.ipynb": books[6],  # another person of this name
            f"anon_x9Yz1_909_{NAME}.ipynb": books[0],
            "núñezruizjosé_4712_text.html": b"<p>my answer</p>",
            "__MACOSX/._liwei_1_903_unit.ipynb": b"",
        },
    )
    code, said, complaints = intake(course, download)
    assert (code, said) == (1, f"{NAME}: 4 taken in, 0 replaced, 0 unchanged\n")
    assert collected(course) == {
        "amina": {f"{NAME}.ipynb": books[1], "weights.csv": b"1,2", "timestamp.txt": b"late, says Canvas\n"},
        "li1": {f"{NAME}.ipynb": books[2]},
        "li2": {f"{NAME}.ipynb": books[4], f"{NAME} (earlier).ipynb": books[3]},
        "ola": {f"{NAME}.ipynb": books[5]},
    }
    assert complaints.splitlines() == [
        "needs a person: núñezruizjosé_4712_text.html: there is no file that was handed in",
        "needs a person: liwei_3: matches nobody in the roster",
        "needs a person: anon_x9Yz1: matches nobody in the roster",
    ]
    rows = {row.learner: row for row in course.grade().rows}
    assert [name for name, row in rows.items() if row.trouble] == ["amina"]  # a person has to find out the time
    assert "contains no valid time ('late, says Canvas')" in rows["amina"].trouble[0]


def test_a_download_from_moodle_with_its_grading_worksheet(course: GradingCourse, tmp_path: Path) -> None:
    worksheet = tmp_path / "Grades.csv"
    worksheet.write_text(
        "\ufeffIdentifier,Full name,Email address,Status,Grade,Last modified (submission)\n"
        'Participant 31,Amina Diallo,amina@example.org,Submitted,,"Wednesday, 10 June 2026, 2:14 PM"\n'
        "Participant 32,Wei Li,li1@example.org,Submitted,,-\n"
        'Participant 33,Wei Li,li2@example.org,Submitted,,"onsdag 10. juni 2026, 14:14"\n'
        "Participant 35,Eve New,eve@example.org,Submitted,,\n"
    )
    books = [notebook(course, number) for number in range(6)]
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr(f"my work/{NAME}.ipynb", books[2])
    download = zipped(
        tmp_path / "C-Assignment-1.zip",
        {
            f"Amina Diallo_31_assignsubmission_file_/{NAME}.ipynb": books[0],
            "Amina Diallo_31_assignsubmission_onlinetext_/onlinetext.html": b"<p>see file</p>",
            f"Wei Li_32_assignsubmission_file/{NAME}(2).ipynb": books[1],
            "Wei Li_33_assignsubmission_file_work.zip": inner.getvalue(),
            f"Ruiz José, Nunez_34_assignsubmission_file_{NAME}.ipynb": books[3],
            f"Eve New_35_assignsubmission_file_/{NAME}.ipynb": books[4],
            f"Wei Li_36_assignsubmission_file_/{NAME}.ipynb": books[5],
            "Ola Nordmann_37_assignsubmission_onlinetext_/onlinetext.html": b"<p>forgot</p>",
        },
    )
    code, _, complaints = intake(course, download, "--roster", worksheet, "--timezone", "Europe/Oslo")
    assert code == 1
    assert collected(course) == {
        "amina": {f"{NAME}.ipynb": books[0], "timestamp.txt": b"2026-06-10 14:14:00 Europe/Oslo\n"},
        "eve@example.org": {f"{NAME}.ipynb": books[4]},
        "jose": {f"{NAME}.ipynb": books[3]},
        "li1": {f"{NAME}.ipynb": books[1]},
        "li2": {f"my work/{NAME}.ipynb": books[2], "timestamp.txt": b"onsdag 10. juni 2026, 14:14\n"},
    }
    assert complaints.splitlines() == [
        "needs a person: Wei Li_36: matches nobody in the roster",
        "needs a person: Ola Nordmann_37: there is no file that was handed in",
    ]
    course.grade()
    times = {row[1]: row[2] for row in course.rows()["submitted_assignment"]}
    assert str(times["amina"]).startswith("2026-06-10 12:14:00")


METADATA = """\
submission_81:
  :submitters:
  - :name: Amina Diallo
    :sid: '4711'
    :email: AMINA@example.org
  - :name: Wei Li
    :sid: li2
    :email:
  :created_at: 2026-06-10 12:14:00.250000000 Z
  :score: 3.0
  :history: []
submission_82:
  :submitters:
  - :name: Somebody Else
    :email: else@example.org
  :created_at: 2026-06-10 12:14:00 Z
"""


def test_a_download_from_gradescope_with_a_group(course: GradingCourse, tmp_path: Path) -> None:
    root = "assignment_7_export"
    books = [notebook(course, number) for number in range(2)]
    files = {f"{root}/submission_metadata.yml": METADATA.encode(), f"{root}/submission_81/{NAME}.ipynb": books[0]}
    files |= {f"{root}/submission_82/{NAME}.ipynb": books[1]}
    code, _, complaints = intake(course, zipped(tmp_path / "submissions.zip", files))
    assert (code, complaints) == (1, "needs a person: submission_82: matches nobody in the roster\n")
    same = {f"{NAME}.ipynb": books[0], "timestamp.txt": b"2026-06-10 12:14:00.250000+00:00\n"}
    assert collected(course) == {"amina": same, "li2": same}
    course.grade()
    assert {str(row[2]) for row in course.rows()["submitted_assignment"]} == {"2026-06-10 12:14:00.250000"}


def test_work_that_is_there_is_replaced_only_when_asked(course: GradingCourse, tmp_path: Path) -> None:
    name = f"dialloamina_4711_901_{NAME}.ipynb"
    first = zipped(tmp_path / "first.zip", {name: notebook(course, 1)})
    second = zipped(tmp_path / "second.zip", {name: notebook(course, 2)})
    assert intake(course, first)[0] == 0
    assert intake(course, first) == (0, f"{NAME}: 0 taken in, 0 replaced, 1 unchanged\n", "")
    code, _, complaints = intake(course, second)
    assert (code, "amina" in complaints) == (1, True)
    assert collected(course)["amina"][f"{NAME}.ipynb"] == notebook(course, 1)
    assert intake(course, second, "--replace") == (0, f"{NAME}: 0 taken in, 1 replaced, 0 unchanged\n", "")
    assert collected(course)["amina"][f"{NAME}.ipynb"] == notebook(course, 2)
    assert sorted(path.name for path in (course.root / "submitted").iterdir()) == ["amina"]


def test_names_lead_nowhere_and_a_learner_does_not_set_the_time(course: GradingCourse, tmp_path: Path) -> None:
    prefix = "Amina Diallo_31_assignsubmission_file_"
    link = zipfile.ZipInfo(f"{prefix}/link.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    download = tmp_path / "download.zip"
    with zipfile.ZipFile(download, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{prefix}/{NAME}.ipynb", notebook(course, 1))
        archive.writestr(f"{prefix}/../../../escaped.txt", "x")
        archive.writestr(f"{prefix}/..\\..\\windows.txt", "x")
        archive.writestr(f"{prefix}/timestamp.txt", "2020-01-01 00:00:00 UTC")
        archive.writestr(link, "/etc/passwd")
        archive.writestr(f"{prefix}/bomb.bin", bytes(140_000_000))
    code, _, complaints = intake(course, download)
    assert (code, complaints) == (
        1,
        "needs a person: amina: bomb.bin was left out, because there are too many or too large files\n",
    )
    assert sorted(collected(course)["amina"]) == ["escaped.txt", f"{NAME}.ipynb", "windows.txt"]
    assert not list(tmp_path.rglob("escaped.txt"))[1:]


def test_every_name_becomes_a_path_below_or_nothing() -> None:
    for name in ("../x", "/etc/x", "a/../../x", "..", "C:\\x", "a\x00b", "./.", "\u202ex", "a/__MACOSX/b"):
        path = safe(name)
        assert path is None or (not path.is_absolute() and ".." not in path.parts and str(path).isprintable())


def test_a_name_that_two_share_matches_nobody_and_a_row_that_joins_two_people_is_refused() -> None:
    roster = Roster()
    roster.add("a", [("id", "a"), ("email", "a@x"), *names_of("Wei", "Li")])
    roster.add("b", [("id", "b"), ("email", "b@x"), *names_of("Wei", "Li")])
    assert roster.find([("name", "li wei")]) == (None, "matches several learners: a, b")
    learner, _ = roster.find([("email", "B@X"), ("name", "Li Wei")])
    assert learner is roster.learners[1]
    with pytest.raises(ValueError, match="a and b are the same person"):
        roster.add("c", [("id", "a"), ("email", "b@x")])


def packed(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytearray:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return bytearray(target.getvalue())


def damaged(at: bytes, skip: int, form: str, *values: int, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file with these values `skip` bytes behind a mark: the contents, or the list's first entry (PK 1 2)."""
    made = packed({f"{NAME}.ipynb": b"hello, world" * 99}, method)
    struct.pack_into(form, made, made.index(at) + skip, *values)
    return bytes(made)


LIST = b"PK\x01\x02"
ODD = {
    "a wrong checksum": damaged(b"hello", 0, "B", 0),
    "damaged data": damaged(b"ipynb", 5, "<I", 0xFFFFFFFF, method=zipfile.ZIP_DEFLATED),
    "an unknown compression": damaged(LIST, 10, "<H", 99),
    "a size that is not true": damaged(LIST, 20, "<II", 10**6, 10**6),
    "a place that is not true": damaged(LIST, 42, "<I", 7),
    "a list that is not true": damaged(b"PK\x05\x06", 12, "<I", 90_000_000),
    "cut off": bytes(packed({f"{NAME}.ipynb": b"hello" * 99})[:-30]),
    "a long name": bytes(packed({"é" * 150 + "/" + "漢" * 150 + ".ipynb": b"{}"})),
    "many folders": bytes(packed({"/".join(["abcdefghij" * 14] * 60): b"{}"})),
    "a file that is a folder": bytes(packed({"a": b"", "a/b": b"", f"{NAME}.ipynb/x": b""})),
    "nothing": b"",
}


@pytest.mark.parametrize("what", ODD)
def test_a_zip_file_of_one_learner_does_not_end_the_intake_of_the_others(
    what: str, course: GradingCourse, tmp_path: Path
) -> None:
    work = {"diallo_4711_1_work.zip": ODD[what], f"nunez_4712_2_{NAME}.ipynb": notebook(course, 1)}
    code, out, err = intake(course, zipped(tmp_path / "download.zip", work))
    assert f"{NAME}: 2 taken in" in out
    assert collected(course)["jose"] == {f"{NAME}.ipynb": notebook(course, 1)}
    left_out = what.startswith(("a wrong", "damaged", "an unknown", "a size", "a place", "a list", "cut", "nothing"))
    assert (code, "amina: " in err) == ((1, True) if left_out else (0, False))


def test_a_zip_file_with_a_long_list_is_not_read(course: GradingCourse, tmp_path: Path) -> None:
    many = bytes(packed({f"{number:0200}": b"" for number in range(25_000)}))
    work = {"diallo_4711_1_work.zip": many, f"nunez_4712_2_{NAME}.ipynb": notebook(course, 1)}
    assert "amina: work.zip cannot be unpacked" in intake(course, zipped(tmp_path / "download.zip", work))[2]


SUBMITTERS = b"""\
submission_1:
  :submitters:
  - :email: amina@example.org
submission_2:
  :submitters:
  - :email: j@example.org
"""


@pytest.mark.parametrize(
    "names",
    [
        ("Amina Diallo_1_assignsubmission_file_/submission_metadata.yml", "José Núñez-Ruiz_2_assignsubmission_file_/"),
        ("diallo_4711_1_x_7_assignsubmission_file_notes.txt", "nunez_4712_2_"),
        ("assignment_1_export/submission_1/submission_metadata.yml", "assignment_1_export/submission_2/"),
    ],
    ids=["Moodle", "Canvas", "Gradescope"],
)
def test_a_learner_does_not_choose_the_platform_by_the_name_of_a_file(
    names: tuple[str, str], course: GradingCourse, tmp_path: Path
) -> None:
    """Such a file came first, and nobody's work was taken in."""
    work = {
        names[0]: b"e: {':submitters': [{':email': j@example.org}]}",
        f"{names[1]}{NAME}.ipynb": notebook(course, 1),
    }
    if names[0].startswith("assignment"):
        work["assignment_1_export/submission_metadata.yml"] = SUBMITTERS
    intake(course, zipped(tmp_path / "download.zip", work))
    assert collected(course)["jose"][f"{NAME}.ipynb"] == notebook(course, 1)


def test_two_rows_of_a_table_are_two_people(tmp_path: Path) -> None:
    """The second had been joined to the first, with the same address, and handed in for them."""
    table = tmp_path / "table.csv"
    table.write_text("id,email\nben,same@example.org\nchloe,same@example.org\n")
    with pytest.raises(ValueError, match="ben and chloe have the same identifier or e-mail address"):
        read_roster([], [table])
    table.write_text("id,email\nben,ben@example.org\nben,ben@example.org\n")
    assert [one.name for one in read_roster([], [table, table]).learners] == ["ben"]


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", ".evil", "a/b", "x\u202ey"])
def test_a_name_in_a_roster_leads_nowhere(name: str, course: GradingCourse, tmp_path: Path) -> None:
    """On Gradescope, learners write their student ID themselves."""
    table = tmp_path / "table.csv"
    table.write_text(f"SID,Email,Name\n{name},eve@example.org,Eve\n", encoding="utf-8")
    metadata = b"submission_1:\n  :submitters:\n  - :email: eve@example.org\n"
    work = {"submission_metadata.yml": metadata, f"submission_1/{NAME}.ipynb": notebook(course, 1)}
    before = sorted(tmp_path.rglob("*.ipynb"))
    code, _, err = intake(course, zipped(tmp_path / "download.zip", work), "--roster", table)
    assert (code, "cannot be the name of a folder" in err) == (1, True)
    assert sorted(tmp_path.rglob("*.ipynb")) == before


def test_bad_input_ends_in_one_line(course: GradingCourse, tmp_path: Path) -> None:
    other = zipped(tmp_path / "other.zip", {"holiday.jpg": b""})
    text = tmp_path / "text.zip"
    text.write_text("no zip file")
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n")
    broken = zipped(tmp_path / "broken.zip", {"submission_metadata.yml": b"a: [", "submission_1/x.ipynb": b""})
    where = ("--course", course.root)
    assert "not a download of submissions" in complaint("intake", "99", other, *where)
    assert "neither a folder nor a zip file" in complaint("intake", "99", text, *where)
    assert "is no roster" in complaint("intake", "99", other, "--roster", table, *where)
    assert "submission_metadata.yml cannot be read" in complaint("intake", "99", broken, *where)
    assert "--timezone" in complaint("intake", "99", other, "--timezone", "Oslo/Europe", *where)
    assert "there is no" in complaint("intake", "99", tmp_path / "none.zip", *where)
    assert not (course.root / "submitted").exists()
