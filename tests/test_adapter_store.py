"""The store: what it finds, reads, keeps and evicts; and which adapters it refuses, in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_from_scratch.methods.bitfit import BitFit
from lora_from_scratch.methods.ia3 import IA3
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.nola import NOLA
from lora_from_scratch.methods.randlora import RandLoRA
from lora_from_scratch.methods.tied_lora import TiedLoRA
from lora_from_scratch.methods.vera import VeRA
from lora_from_scratch.serving.adapter_reading import AdapterReader
from lora_from_scratch.serving.adapter_store import READ_AHEAD, AdapterStore, UnknownAdapter
from lora_from_scratch.serving.page_pool import OutOfPages, PageLayout, PagePool
from tests.helpers import tiny_config, tiny_model, transformers_twin
from tests.served_adapters import METHODS, write_adapters

LAYOUT = PageLayout.for_model(tiny_config())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_adapters(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "adapters")


@pytest.fixture
def store(folder: Path) -> Iterator[AdapterStore]:
    made = AdapterStore(tiny_model(), PagePool(LAYOUT, 8), folder)
    yield made
    made.close()


# --- Finding ---------------------------------------------------------------------------------------------


def test_names_are_those_of_the_directories(store: AdapterStore, folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / ".hidden").mkdir()
    (folder / "file").write_text("no adapter")
    assert store.names() == sorted(METHODS)


@pytest.mark.parametrize(
    "name", ["lion", "", "../adapters/king", "./king", "king/", "/etc", ".", "king\n", "a\0b", "empty"]
)
def test_what_is_not_there_is_not_found(store: AdapterStore, folder: Path, name: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(UnknownAdapter, match="there is no adapter"):
        store.find(name)


def test_an_adapter_may_be_in_a_folder_of_the_directory(store: AdapterStore, folder: Path) -> None:
    shutil.copytree(folder / "king", folder / "team" / "king")
    assert store.find("team/king").directory == folder / "team" / "king"


def test_nothing_is_read_at_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: AdapterReader, directory: Path) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(AdapterReader, "read", refuse)
    store = AdapterStore(tiny_model(), PagePool(LAYOUT, 8), folder)
    store.find("king")
    assert not store.resident
    assert not store.staged


def test_a_directory_that_changes_is_another_version(store: AdapterStore, folder: Path) -> None:
    old = store.acquire(store.find("king"))
    tensors = load_file(folder / "king" / "adapter_model.safetensors")
    save_file({name: 2 * t for name, t in tensors.items()}, folder / "new")
    (folder / "new").replace(folder / "king" / "adapter_model.safetensors")
    new = store.acquire(store.find("king"))
    assert new.version != old.version
    A_old, A_new = (store.pool.rows(24)[r.rows["transformer.h.0.attn.c_attn"].A] for r in (old, new))
    assert torch.equal(A_new, 2 * A_old)


def test_adapters_are_added_and_removed(store: AdapterStore, folder: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder / "king", tmp_path / "elsewhere")
    store.add("emperor", place)
    assert "emperor" in store.names()
    assert store.find("emperor").directory == place
    for name in ("emperor", "fox"):
        store.remove(name)
        assert name not in store.names()
        with pytest.raises(UnknownAdapter):
            store.find(name)
        with pytest.raises(UnknownAdapter):
            store.remove(name)
    store.add("fox", folder / "fox")
    assert store.find("fox").name == "fox"
    with pytest.raises(ValueError, match="letters, digits"):
        store.add("../x", place)


# --- Keeping ---------------------------------------------------------------------------------------------


def test_the_adapter_used_longest_ago_is_evicted_first(store: AdapterStore) -> None:
    for name in ("king", "fox", "dove"):
        store.release(store.acquire(store.find(name)))
    store.release(store.acquire(store.find("king")))
    held = store.acquire(store.find("dove"))
    store.make_room(len(store.pool.free) + 1)
    assert [version.name for version in store.resident] == ["king", "dove"]
    store.make_room(len(store.pool))
    assert [version.name for version in store.resident] == ["dove"]
    assert store.evictions == 2
    store.release(held)
    store.make_room(len(store.pool))
    assert sorted(store.pool.free) == list(range(8))


def test_adapters_in_use_are_not_evicted(folder: Path) -> None:
    store = AdapterStore(tiny_model(), PagePool(LAYOUT, 1), folder)
    king = store.acquire(store.find("king"))
    with pytest.raises(OutOfPages):
        store.acquire(store.find("fox"))
    assert list(store.resident) == [king.version]
    store.release(king)
    assert store.acquire(store.find("fox")).users == 1
    assert len(store.resident) == 1
    store.close()


def test_reading_ahead_is_bounded_and_forgets_requests_that_have_gone(store: AdapterStore, folder: Path) -> None:
    for number in range(3 * READ_AHEAD):
        shutil.copytree(folder / "king", folder / f"copy{number}")
    versions = [store.find(f"copy{number}") for number in range(3 * READ_AHEAD)]
    store.read_ahead(versions)
    assert list(store.staged) == versions[:READ_AHEAD]
    assert all(store.is_ready(version, patience=60) for version in versions[:READ_AHEAD])
    store.read_ahead(versions[-3:])
    assert list(store.staged) == versions[-3:]
    store.acquire(versions[-1])
    assert list(store.staged) == versions[-3:-1]


# --- Reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [TiedLoRA(rank=2, targets=("c_attn",)), NOLA(rank=2, targets=("c_attn",))])
def test_methods_whose_layers_make_a_and_b_are_served(folder: Path, method: Method) -> None:
    base = tiny_model()
    method.adapt(base)
    for parameter in method.trainable(base).values():
        torch.nn.init.normal_(parameter)
    method.save(base, folder / "other")
    merged = method.merged_copy(base)
    factors = AdapterReader(tiny_model()).read(folder / "other")
    assert len(factors) == 2
    for name, (A, B, gain) in factors.items():
        change = merged.get_parameter(f"{name}.weight") - tiny_model().get_parameter(f"{name}.weight")  # (in, out)
        torch.testing.assert_close(A.T @ B, change, atol=1e-5, rtol=1e-5)
        assert gain is None


def test_an_adapter_that_peft_has_written_is_served(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_rslora=True)
    theirs = peft.get_peft_model(transformers_twin(tiny_model()), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(folder / "theirs")
    merged = theirs.merge_and_unload()
    factors = AdapterReader(tiny_model()).read(folder / "theirs")
    assert len(factors) == 4
    for name, (A, B, _) in factors.items():
        change = merged.get_parameter(f"{name}.weight") - tiny_model().get_parameter(f"{name}.weight")
        torch.testing.assert_close(A.T @ B, change, atol=1e-5, rtol=1e-5)


def test_a_negative_alpha_is_not_remembered_for_another_adapter(folder: Path) -> None:
    """Ours does not have it: the sign goes into B, which is another B for each adapter."""
    for number, name in enumerate(("one", "two")):
        shutil.copytree(folder / "king", folder / name)
        config = json.loads((folder / name / "adapter_config.json").read_text())
        (folder / name / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": -4}))
        tensors = load_file(folder / "king" / "adapter_model.safetensors")
        save_file({n: (number + 1) * t for n, t in tensors.items()}, folder / name / "adapter_model.safetensors")
    reader = AdapterReader(tiny_model())
    king, one, two = (reader.read(folder / name) for name in ("king", "one", "two"))
    for layer in king:
        assert torch.equal(one[layer].B, -king[layer].B)
        assert torch.equal(two[layer].B, -2 * king[layer].B)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRA(rank=2, bias="lora_only"), "bias='lora_only'"),
        (LoRA(rank=2, modules_to_save=("ln_f",)), "modules_to_save"),
        (BitFit(), "bitfit"),
        (IA3(), "ia3"),
        (VeRA(rank=2, targets=("c_attn",)), "vera"),
        (RandLoRA(rank=2, targets=("c_attn",)), "randlora"),
    ],
)
def test_what_is_not_a_change_of_low_rank_is_refused(folder: Path, method: Method, message: str) -> None:
    base = tiny_model()
    method.adapt(base)
    method.save(base, folder / "other")
    with pytest.raises(ValueError, match=message) as error:
        AdapterReader(tiny_model()).read(folder / "other")
    assert "\n" not in str(error.value)


def test_damaged_directories_are_refused_and_leave_nothing_behind(store: AdapterStore, folder: Path) -> None:
    weights = "adapter_model.safetensors"
    (folder / "king" / weights).write_bytes(b"not tensors")
    (folder / "fox" / "adapter_config.json").write_text("{")
    tensors = load_file(folder / "dove" / weights)
    tensors.popitem()
    save_file(tensors, folder / "dove" / weights)
    nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(folder / "owl" / weights).items()}
    save_file(nan, folder / "owl" / weights)
    other = tiny_model(n_embd=12)
    LoRA(rank=1).adapt(other)
    LoRA(rank=1).save(other, folder / "narrow")
    messages = {"king": "damaged", "fox": "JSON", "dove": "missing", "owl": "not all finite", "narrow": "another one"}
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            store.acquire(store.find(name))
        with pytest.raises(ValueError, match=message):
            store.add("again", folder / name)
    assert len(store.pool.free) == 8
    assert not store.resident
    assert not store.staged
    assert "again" not in store.names()
