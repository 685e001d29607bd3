"""Writing: whole or not at all."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lora_from_scratch.support.files import (
    check_writable,
    remove_leftovers,
    write_atomically,
    write_directory_atomically,
    write_json,
)
from tests.tiny_runs import files_in

FAILURES = [
    OSError(28, "No space left on device"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nand more"),
    SafetensorError("Error while serializing: I/O error"),
    KeyboardInterrupt(),
]


def half_written(error: BaseException, *names: str) -> object:
    """A writer that fails in the middle: of a file, or (given names) of the last file of a directory."""

    def write(path: Path) -> None:
        for name in names or ("",):
            (path / name if name else path).write_text("half")
        raise error

    return write


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_a_file_that_could_not_be_written_is_as_it_was(tmp_path: Path, error: BaseException) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("before")
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    for path in (kept, tmp_path / "new" / "deeper" / "file.txt"):
        with pytest.raises(expected) as raised:
            write_atomically(path, half_written(error))  # type: ignore[arg-type]
        if not isinstance(error, OSError | KeyboardInterrupt):
            assert str(raised.value).startswith(f"could not write {path}: the disk or your quota may be full (")
            assert str(error) not in str(raised.value)  # no PyTorch or Rust in it
    assert files_in(tmp_path) == {"kept.txt": b"before"}
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_a_directory_that_could_not_be_written_is_as_it_was(tmp_path: Path, error: BaseException) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "a").write_text("before")
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    for directory in (kept, tmp_path / "new" / "deeper"):
        with pytest.raises(expected):
            write_directory_atomically(directory, half_written(error, "a", "b"))  # type: ignore[arg-type]
    assert files_in(tmp_path) == {"kept/a": b"before"}
    assert not (tmp_path / "new").exists()


def test_a_directory_made_for_the_file_stays_if_somebody_else_has_used_it_meanwhile(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        (path.parent / "mine.txt").write_text("x")
        raise OSError("no more room")

    with pytest.raises(OSError, match="no more room"):
        write_atomically(tmp_path / "a" / "b" / "c.txt", write)
    assert files_in(tmp_path) == {"a/b/mine.txt": b"x"}


def test_what_was_there_before_is_replaced_and_what_is_beside_it_stays(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("before")
    write_atomically(tmp_path / "a", lambda path: path.write_text("after"))
    write_directory_atomically(tmp_path, lambda folder: (folder / "c").write_text("after"))
    assert files_in(tmp_path) == {"a": b"after", "b": b"before", "c": b"after"}


def test_nobody_sees_the_new_file_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write(temporary: Path) -> None:
        temporary.write_text("aft")
        assert path.read_text() == "before"
        temporary.write_text("after")

    write_atomically(path, write)
    assert path.read_text() == "after"


def test_files_are_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "one", lambda path: path.write_text("x"))
        write_directory_atomically(tmp_path, lambda folder: (folder / "two").write_text("x"))
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("one", "two")] == [0o640, 0o640]


def test_saving_into_a_file_as_if_it_were_a_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="is a file, not a directory"):
        write_directory_atomically(file, lambda folder: None)
    with pytest.raises((NotADirectoryError, FileExistsError)):
        write_directory_atomically(file / "below", lambda folder: None)
    with pytest.raises((NotADirectoryError, FileExistsError)):
        write_atomically(file / "below", lambda path: None)
    assert files_in(tmp_path) == {"file": b"mine"}


def test_a_directory_is_written_where_only_it_and_not_its_parent_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container into which one directory is mounted."""
    import tempfile

    whole = tempfile.mkdtemp

    def mkdtemp(dir: Path, **keywords: str) -> str:
        assert Path(dir) == tmp_path / "mounted"
        return whole(dir=dir, **keywords)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    (tmp_path / "mounted").mkdir()
    write_directory_atomically(tmp_path / "mounted", lambda folder: (folder / "a").write_text("x"))
    assert files_in(tmp_path) == {"mounted/a": b"x"}


def test_whether_a_place_can_be_written_is_found_out_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "deeper")
    for place in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(NotADirectoryError, match=f"{tmp_path / 'file'} is not a directory"):
            check_writable(place)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "dangling")
    assert files_in(tmp_path) == {"file": b"mine"}


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    def killed(path: Path) -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:  # a kill runs no `finally`
        patch.setattr(Path, "unlink", lambda *args, **keywords: None)
        patch.setattr("shutil.rmtree", lambda *args, **keywords: None)
        with pytest.raises(KilledError):
            write_atomically(tmp_path / "checkpoint.pt", killed)
        with pytest.raises(KilledError):
            write_directory_atomically(tmp_path, killed)
    assert len(list(tmp_path.iterdir())) == 2
    for name in (".hidden.part", "film.part", ".my.longername9.part"):
        (tmp_path / name).write_text("mine")
    remove_leftovers(tmp_path)
    assert set(files_in(tmp_path)) == {".hidden.part", "film.part", ".my.longername9.part"}
    assert len(list(tmp_path.iterdir())) == 3


def test_json_has_null_where_there_is_no_number(tmp_path: Path) -> None:
    document = {"a": [math.nan, 1.5, (math.inf, -math.inf)], "path": Path("x"), "b": {"c": 0.1}}
    write_json(tmp_path / "x.json", document)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert read == {"a": [None, 1.5, [None, None]], "path": "x", "b": {"c": 0.1}}
