"""Set-up for all tests: one thread (the runner already uses every core), no progress bars of other libraries."""

import os
import re
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from lora_from_scratch.cli import main
from lora_from_scratch.gpt2.checkpoint import save_gpt2
from lora_from_scratch.grading.building.build import build
from tests.checkpoints import TOKENIZER
from tests.helpers import tiny_model
from tests.tiny_course import enter_course, make_course
from tests.tiny_runs import SHORT, make_model, run_in, shorten_evaluation, write_data

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that the tests start; for this one, see below
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine takes its time
hypothesis.settings.load_profile("tests")

LONGEST = (
    "test_bank_seeds",
    "test_attacks",
    "test_bank",
    "test_notebooks",
    "test_units_on_gpt2",
    "test_alternatives",
    "test_sandbox",
)

# What files import that test what needs Linux: grading and its sandbox, a browser, POSIX itself.
NEEDS_LINUX = re.compile(
    r"^\s*(?:from|import) (?:lora_from_scratch\.(?:grading|cli\.grade)|tests\.(?!helpers|cli_calls|checkpoints|conftest"
    r"|tiny_runs|any_models|served_adapters|method_outside|finetune_script|training_script|rooms|turns)"
    r"|benchmarks\.answer_mutants|resource\b|fcntl\b|pwd\b)",
    re.MULTILINE,
)


def needs_linux(path: Path) -> bool:
    """Whether a file of tests cannot be imported, or makes no sense, on other systems than Linux."""
    return bool(NEEDS_LINUX.search(path.read_text(encoding="utf-8")))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    elsewhere = sys.platform != "linux" and collection_path.name.startswith("test_")
    return True if elsewhere and needs_linux(collection_path) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: with `--dist loadfile` a file runs in one process, from top to bottom.

    So what the tests of a file share is made once. (pytest-xdist 3.8 does not see `xdist_group` under pytest 9.2.)
    """
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An intact checkpoint, for tests that damage it."""
    save_gpt2(tiny_model(vocab_size=300), TOKENIZER, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def short_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_evaluation(monkeypatch)


@pytest.fixture(scope="session")
def built_course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny course, built: to be copied by whoever changes it."""
    root = make_course(tmp_path_factory.mktemp("built_course"))
    with pytest.MonkeyPatch.context() as patch:
        assert build(enter_course(root, patch), root).why == ["there is no solved notebook yet"]
    return root


@pytest.fixture(scope="session")
def library_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sandbox's copies of the library are kept: made once, and read-only inside the sandbox."""
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="session")
def cli_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model`, `data.csv`, and `adapter`, the output of a short LoRA run."""
    directory = tmp_path_factory.mktemp("cli")
    model, data = make_model(directory / "model"), write_data(directory / "data.csv")
    with pytest.MonkeyPatch.context() as patch:
        shorten_evaluation(patch)
        run = ["finetune", "--model", str(model), "--data", str(data), "--output", str(directory / "adapter")]
        assert main([*run, *SHORT, "--steps", "8", "--learning-rate", "0.05"]) == 0
    return directory


@pytest.fixture(scope="session")
def quiet_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model`, `data.csv`, and `quiet`, the output of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("finetune")
    make_model(directory / "model")
    write_data(directory / "data.csv")
    with pytest.MonkeyPatch.context() as patch:
        shorten_evaluation(patch)
        assert main(run_in(directory, directory / "quiet")) == 0
    return directory
