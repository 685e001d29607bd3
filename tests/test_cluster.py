"""`grade --cluster`: marking on a Dask cluster, with real schedulers and workers on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[course]'")
pytest.importorskip("distributed", reason="distributed is not installed: pip install -e '.[cluster]'")

from lora_from_scratch.grading.cluster import pool as cluster_pool
from lora_from_scratch.grading.cluster.packing import pack, unpack
from lora_from_scratch.grading.cluster.pool import ClusterError
from tests.cli_calls import complaint
from tests.grading_course import NAME, RIGHT, GradingCourse, template
from tests.stand_in_marker import SLOW
from tests.test_grade import NOT_AGAIN, files


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GradingCourse]:
    with template(tmp_path_factory.mktemp("template") / "course") as made:
        yield made


@pytest.fixture
def course(empty: GradingCourse, tmp_path: Path) -> GradingCourse:
    return empty.copy(tmp_path / "course")


def hand_in(course: GradingCourse, count: int) -> None:
    for number in range(count):
        answers = RIGHT | {"fourfold_root": f"x = {number}" + " half" * (number % 2)}
        folder = course.hand_in(f"learner {number:02}", **answers)
        (folder / "data.csv").write_text(f"{number}")


def test_a_cluster_of_one_worker_gives_the_same_bytes_as_one_machine(course: GradingCourse, tmp_path: Path) -> None:
    """One of the three has a link beside it, so it is marked on this machine."""
    from distributed import LocalCluster

    hand_in(course, 3)
    alone = course.copy(tmp_path / "alone")
    for one in (course, alone):
        (one.root / "submitted" / "learner 02" / NAME / "link.csv").symlink_to("/etc/passwd")
    settings = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "protocol": "tcp://"}
    with LocalCluster(host="127.0.0.1", scheduler_port=0, dashboard_address=None, **settings) as cluster:
        summary = course.grade(cluster=cluster.scheduler_address)
    alone.grade()
    assert (summary.marked, summary.failed, summary.refused) == (3, 0, ())
    assert files(course.root / "graded") == files(alone.root / "graded")
    assert files(course.root / "autograded") == files(alone.root / "autograded")
    assert course.rows() == alone.rows()


def test_only_plain_files_are_packed_and_all_of_them_arrive(tmp_path: Path) -> None:
    folder = tmp_path / "submitted" / "ada" / NAME
    (folder / "data" / "empty").mkdir(parents=True)
    (folder / "data" / "é.csv").write_bytes(b"1")
    (folder / f"{NAME}.ipynb").write_bytes(b"{}")
    content = pack(folder, tmp_path / "submitted")
    assert content is not None
    unpack(content, tmp_path / "there")
    assert files(tmp_path / "there") == files(folder)
    assert (tmp_path / "there" / "data" / "empty").is_dir()
    os.mkfifo(folder / "pipe")
    assert pack(folder, tmp_path / "submitted") is None
    (folder / "pipe").unlink()
    (tmp_path / "submitted" / "bob").symlink_to(folder.parent)
    assert pack(tmp_path / "submitted" / "bob" / NAME, tmp_path / "submitted") is None


def test_bad_addresses_end_in_one_line(course: GradingCourse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_pool, "CONNECTING", 0.5)
    course.hand_in("ada", **RIGHT)
    where = ("--course", course.root)
    assert "there is no scheduler at tcp://127.0.0.1:1" in complaint(
        "grade", "99", "--cluster", "tcp://127.0.0.1:1", *where
    )
    assert "should be a scheduler's address" in complaint("grade", "99", "--cluster", "nowhere://x", *where)
    assert "does not go with --shard" in complaint("grade", "99", "--cluster", "x", "--shard", "1/2", *where)


# --- Processes that are killed -----------------------------------------------------------------------------


class Cluster:
    """A scheduler and workers, each in a process of its own."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self.stack, self.workers = folder, stack, []  # type: ignore[var-annotated]
        options = [
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            str(folder / "scheduler"),
        ]
        self.scheduler = self.start("dask_scheduler", options)
        until = time.monotonic() + 120
        while not (folder / "scheduler").exists() and time.monotonic() < until:
            time.sleep(0.1)
        self.address = json.loads((folder / "scheduler").read_text())["address"]

    def start(self, module: str, options: list[str], **variables: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{module}", *options],
            env=os.environ | variables,
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        self.stack.callback(self.kill, process)
        return process

    def add_worker(self, **variables: str) -> None:
        options = [self.address, "--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        options += ["--local-directory", str(self.folder)]
        self.workers.append(self.start("dask_worker", options, **variables))

    def wait_for(self, count: int) -> None:
        """Wait until this many workers have joined."""
        from distributed import Client

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(count, timeout=120)

    @staticmethod
    def kill(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        (tmp_path / "cluster").mkdir()
        yield Cluster(tmp_path / "cluster", stack)


def when_graded(course: GradingCourse, count: int, act: object, *arguments: object) -> threading.Thread:
    """Do something as soon as there are this many records."""

    def wait() -> None:
        until = time.monotonic() + 300
        while len(list((course.root / "graded").glob(f"*/{NAME}.json"))) < count and time.monotonic() < until:
            time.sleep(0.02)
        act(*arguments)  # type: ignore[operator]

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_workers_that_are_killed_lose_nothing_and_nothing_is_graded_twice(
    course: GradingCourse, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_in(course, 24)
    alone = course.copy(tmp_path / "alone")
    alone.grade()
    monkeypatch.setenv(SLOW, "0.3")
    for _ in range(3):
        cluster.add_worker()
    threads = [
        when_graded(course, count, cluster.kill, worker)
        for count, worker in ((3, cluster.workers[0]), (9, cluster.workers[1]))
    ]
    summary = course.grade(cluster=cluster.address)
    for thread in threads:
        thread.join()
    assert [worker.poll() is None for worker in cluster.workers] == [False, False, True]
    assert (summary.marked, summary.failed, summary.refused) == (24, 0, ())
    assert files(course.root / "graded") == files(alone.root / "graded")
    assert files(course.root / "autograded") == files(alone.root / "autograded")
    assert course.rows() == alone.rows()
    assert course.grade(marker=NOT_AGAIN).marked == 0


@pytest.mark.slow
def test_a_submission_that_kills_what_marks_it_costs_no_worker(course: GradingCourse, cluster: Cluster) -> None:
    hand_in(course, 3)
    course.hand_in("learner 01", fourfold_root="die")
    cluster.add_worker()
    summary = course.grade(cluster=cluster.address)
    assert (summary.marked, summary.failed) == (2, 1)
    assert "exit code 7" in summary.rows[1].trouble[0]
    summary = course.grade(cluster=cluster.address)  # and then a person decides
    assert (summary.marked, summary.failed) == (0, 0)
    assert summary.rows[1].needs_a_human
    assert cluster.workers[0].poll() is None


@pytest.mark.slow
def test_a_scheduler_that_goes_away_ends_the_grading_and_the_next_run_goes_on(
    course: GradingCourse, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hand_in(course, 8)
    alone = course.copy(tmp_path / "alone")
    alone.grade()
    monkeypatch.setenv(SLOW, "0.5")
    cluster.add_worker()
    when_graded(course, 2, cluster.kill, cluster.scheduler)
    with pytest.raises(ClusterError, match="has gone"):
        course.grade(cluster=cluster.address)
    monkeypatch.setenv(SLOW, "0")
    done = len(list((course.root / "graded").glob(f"*/{NAME}.json")))
    assert 2 <= done < 8
    assert course.grade().marked == 8 - done
    assert course.rows() == alone.rows()


@pytest.mark.slow
def test_a_worker_with_another_version_of_the_course_is_not_used(
    course: GradingCourse, cluster: Cluster, tmp_path: Path
) -> None:
    hand_in(course, 6)
    other = tmp_path / "other units"
    (other / "unit_99").mkdir(parents=True)
    for path in Path(os.environ["LORA_FROM_SCRATCH_UNITS"]).glob("unit_99/*.py"):
        (other / "unit_99" / path.name).write_text(path.read_text() + "# a change\n")
    cluster.add_worker(LORA_FROM_SCRATCH_UNITS=str(other))
    with pytest.raises(
        ClusterError, match=r"every worker .* has another version of the course: the checks have changed"
    ):
        course.grade(cluster=cluster.address)
    assert not list((course.root / "graded").glob(f"*/{NAME}.json"))
    cluster.add_worker()
    cluster.wait_for(2)
    summary = course.grade(cluster=cluster.address)
    assert (summary.marked, summary.failed) == (6, 0)
    assert all("the checks have changed" in sentence for sentence in summary.refused)
