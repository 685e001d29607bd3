"""LoRA and its files against the real peft, on transformers' GPT-2."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_from_scratch.gpt2.model import GPT2, GPT2Config, next_token_loss
from lora_from_scratch.methods.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lora_from_scratch.methods.lora import LoRA, lora_state_dict
from lora_from_scratch.methods.method import adaptation_of
from lora_from_scratch.methods.registry import load_adapter
from tests.test_lora import randomise
from tests.test_method import assert_same, snapshot, some_tokens, tiny_gpt2

SMALL = GPT2Config(n_positions=32, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)

METHODS = {
    "all matrices": LoRA(rank=4, alpha=8),
    "rsLoRA": LoRA(rank=4, alpha=8, targets=("c_attn", "mlp.c_proj"), rslora=True),
    "patterns": LoRA(
        rank=4,
        alpha=8,
        targets=("c_attn", "c_fc"),
        rank_pattern={"h.0.attn.c_attn": 2, r"h\.1\..*": 3},
        alpha_pattern={"c_fc": 5},
    ),
    "a regular expression": LoRA(rank=3, alpha=7, targets=r".*\.h\.1\..*c_(attn|proj)", dropout=0.3),
}
every_lora = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def hugging_face(model: GPT2) -> Any:
    """transformers' GPT-2 with the same weights."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):  # no time for first values that are overwritten
        theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**model.config.to_json_dict()))
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    theirs.load_state_dict({**copies, "lm_head.weight": copies["transformer.wte.weight"]}, assign=True)
    theirs.tie_weights()
    assert not any(tensor.is_meta for tensor in [*theirs.parameters(), *theirs.buffers()])
    return theirs.eval()


def with_peft(model: GPT2, method: LoRA) -> Any:
    """peft's LoRA with the same hyperparameters, on the same weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=method.targets if isinstance(method.targets, str) else list(method.targets),
        lora_dropout=method.dropout,
        use_rslora=method.rslora,
        rank_pattern=dict(method.rank_pattern),
        alpha_pattern=dict(method.alpha_pattern),
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(hugging_face(model), config).eval()


def read_by_peft(model: GPT2, directory: Path) -> Any:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)  # "found missing adapter keys" and the like
        return peft.PeftModel.from_pretrained(hugging_face(model), str(directory), is_trainable=True).eval()


def gradients_by_our_names(peft_model: Any) -> dict[str, Tensor]:
    prefix, middle = "base_model.model.", ".default.weight"
    return {
        name.removeprefix(prefix).removesuffix(middle): p.grad
        for name, p in peft_model.named_parameters()
        if p.requires_grad
    }


def adapted(method: LoRA, seed: int = 5) -> GPT2:
    """A tiny GPT-2 with random A and B."""
    model = tiny_gpt2()
    method.adapt(model)
    torch.manual_seed(seed)
    randomise(model)
    return model


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def compare_logits_and_gradients(model: GPT2, method: LoRA, theirs: Any, tokens: Tensor) -> None:
    assert_close(model(tokens), theirs(tokens).logits)
    next_token_loss(model(tokens), tokens).backward()
    theirs(tokens, labels=tokens).loss.backward()
    expected = gradients_by_our_names(theirs)
    parameters = method.trainable(model)
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert parameter.grad.any()
        assert_close(parameter.grad, expected[name])


# --- With the real peft --------------------------------------------------------------------------------


@every_lora
def test_logits_and_gradients_equal_pefts_and_adapters_travel_both_ways(method: LoRA, tmp_path: Path) -> None:
    model, tokens = adapted(method), some_tokens()
    method.save(model, tmp_path / "ours")
    theirs = read_by_peft(tiny_gpt2(), tmp_path / "ours")
    compare_logits_and_gradients(model, method, theirs, tokens)

    theirs = with_peft(tiny_gpt2(), method)
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    back = tiny_gpt2()
    read = load_adapter(back, tmp_path / "theirs")
    assert isinstance(read, LoRA)
    assert read.rank == method.rank
    assert read.rslora == method.rslora
    assert read.dropout == method.dropout
    assert not torch.allclose(back(tokens), model(tokens), atol=1e-3)
    compare_logits_and_gradients(back, read, theirs, tokens)


def test_on_a_random_gpt2_small_logits_and_gradients_equal_pefts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        base = GPT2(SMALL).eval()
    base.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.uniform_(-0.03, 0.03).add_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0)
    tokens = torch.randint(0, SMALL.vocab_size, (2, 8))
    theirs_base = hugging_face(base)
    method = LoRA(rank=4, alpha=8)
    method.adapt(base)
    randomise(base, scale=0.02)
    method.save(base, tmp_path)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(theirs_base, str(tmp_path), is_trainable=True).eval()
    compare_logits_and_gradients(base, method, theirs, tokens)


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_on_q_and_v_is_read_by_peft_as_an_equal_lora_on_c_attn(rslora: bool, tmp_path: Path) -> None:
    method = LoRA(rank=3, alpha=7, targets=("c_attn.q", "c_attn.v", "c_fc"), rslora=rslora, alpha_pattern={"c_fc": 2})
    model, tokens = adapted(method), some_tokens()
    method.save(model, tmp_path)
    assert_close(read_by_peft(tiny_gpt2(), tmp_path)(tokens).logits, model(tokens))
    back = tiny_gpt2()
    load_adapter(back, tmp_path)
    assert_close(back(tokens), model(tokens))
    B = lora_state_dict(back)["transformer.h.0.attn.c_attn.lora_B"]
    assert B.shape == (96, 6)
    assert not B[32:64].any()
    assert not B[:32, 3:].any()
    assert not B[64:, :3].any()


@pytest.mark.parametrize("layers", [1, [1]])
def test_an_adapter_of_peft_that_is_limited_to_some_layers_is_read(layers: int | list[int], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], layers_to_transform=layers, fan_in_fan_out=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(hugging_face(tiny_gpt2()), config).eval()
    theirs.save_pretrained(str(tmp_path))
    model = tiny_gpt2()
    load_adapter(model, tmp_path)
    assert list(lora_state_dict(model)) == [f"transformer.h.1.attn.c_attn.lora_{letter}" for letter in "AB"]
    assert_close(model(some_tokens()), theirs(some_tokens()).logits)


def test_every_field_of_pefts_own_configuration_is_known_and_refused_when_it_would_matter(tmp_path: Path) -> None:
    """Whatever peft writes by default is read; its features that change the arithmetic are not."""
    peft = pytest.importorskip("peft")
    peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True).save_pretrained(str(tmp_path))
    tensors = adapted(LoRA(rank=2, targets=("c_attn",)))
    LoRA(rank=2, targets=("c_attn",)).save(tensors, tmp_path / "own")
    save_file(load_file(tmp_path / "own" / WEIGHTS_FILE), tmp_path / WEIGHTS_FILE)
    load_adapter(tiny_gpt2(), tmp_path)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    for name, value in [
        ("bias", "some"),
        ("init_lora_weights", "corda"),
        ("target_parameters", ["w"]),
        ("ensure_weight_tying", True),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"a": 1}),
        ("use_bdlora", {"a": 1}),
        ("arrow_config", {"a": 1}),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [3]),
        ("task_type", "SEQ_CLS"),
    ]:
        assert name in written
        (tmp_path / CONFIG_FILE).write_text(json.dumps({**written, name: value}))
        with pytest.raises(ValueError, match=f"{name}=.*not supported"):
            load_adapter(tiny_gpt2(), tmp_path)


# --- The files -----------------------------------------------------------------------------------------


def test_only_what_differs_from_pefts_defaults_is_written(tmp_path: Path) -> None:
    method = LoRA(rank=4, alpha=8, targets=("c_attn",))
    method.save(adapted(method), tmp_path, base_model="gpt2")
    assert json.loads((tmp_path / CONFIG_FILE).read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
        "base_model_name_or_path": "gpt2",
    }
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / WEIGHTS_FILE).items()}
    assert shapes == {
        f"base_model.model.transformer.h.{i}.attn.c_attn.{name}.weight": shape
        for i in range(2)
        for name, shape in (("lora_A", (4, 32)), ("lora_B", (96, 4)))
    }


@every_lora
def test_what_is_saved_and_read_is_the_same_method_with_the_same_bits(method: LoRA, tmp_path: Path) -> None:
    model, back = adapted(method), tiny_gpt2()
    method.save(model, tmp_path / "one")
    read = load_adapter(back, tmp_path / "one")
    assert read == method
    assert_same(read.state_dict(back), method.state_dict(model))
    assert torch.equal(back(some_tokens()), model(some_tokens()))
    read.save(back, tmp_path / "two")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]  # nothing temporary is left


def test_a_merged_model_saves_the_same_adapter(tmp_path: Path) -> None:
    method = LoRA(rank=4)
    model = adapted(method)
    method.save(model, tmp_path / "before")
    method.merge(model)
    method.save(model, tmp_path / "merged")
    assert (tmp_path / "before" / WEIGHTS_FILE).read_bytes() == (tmp_path / "merged" / WEIGHTS_FILE).read_bytes()


def damage(directory: Path, what: str) -> None:
    """Write a good adapter, then spoil it."""
    method = LoRA(rank=4, alpha=8, targets=("c_attn",))
    method.save(adapted(method), directory)
    config = json.loads((directory / CONFIG_FILE).read_text())
    tensors = load_file(directory / WEIGHTS_FILE)
    first = next(iter(tensors))
    weights, raw = directory / WEIGHTS_FILE, (directory / WEIGHTS_FILE).read_bytes()
    spoil: dict[str, Callable[[], object]] = {
        "cut": lambda: weights.write_bytes(raw[:-100]),
        "empty": lambda: weights.write_bytes(b""),
        "noise": lambda: weights.write_bytes(bytes(range(256)) * 8),
        "one tensor less": lambda: save_file({n: t for n, t in tensors.items() if n != first}, weights),
        "a tensor of something else": lambda: save_file(
            {**tensors, "base_model.model.x.lora_E": torch.ones(1)}, weights
        ),
        "another width": lambda: save_file({n: torch.cat([t, t]) for n, t in tensors.items()}, weights),
        "another model's layers": lambda: save_file(
            {**tensors, **{n.replace("h.1.", "h.7."): t.clone() for n, t in tensors.items()}}, weights
        ),
    }
    change: dict[str, dict[str, Any]] = {
        "an unknown field": {"frobnicate": 3},
        "rank 0": {"r": 0},
        "another rank": {"r": 5},
        "a rank too large": {"r": 64},
        "text for a number": {"lora_alpha": "eight"},
        "a target of another model": {"target_modules": ["q_proj"]},
        "no target": {"target_modules": None},
        "another method": {"peft_type": "LOHA"},
        "no method": {"peft_type": None},
    }
    if what in spoil:
        spoil[what]()
    elif what in change:
        (directory / CONFIG_FILE).write_text(json.dumps({**config, **change[what]}))
    else:
        (directory / CONFIG_FILE).write_text({"not JSON": "{", "not an object": "[]"}[what])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cut", "adapter_model.safetensors is damaged"),
        ("empty", "adapter_model.safetensors is damaged"),
        ("noise", "adapter_model.safetensors is damaged"),
        ("one tensor less", "do not fit this model.*1 missing"),
        ("a tensor of something else", "base_model.model.x.lora_E"),
        ("another width", r"4 of another shape .*\(8, 32\) instead of \(4, 32\)"),
        ("another model's layers", "2 unexpected .transformer.h.7.attn.c_attn"),
        ("an unknown field", "frobnicate=3.*not supported.*lora_alpha"),
        ("rank 0", "rank must be a whole number of at least 1, got 0"),
        ("another rank", r"\(4, 32\) instead of \(5, 32\)"),
        ("a rank too large", "rank must be between 1 and 32"),
        ("text for a number", "alpha must be a positive number, got 'eight'"),
        ("a target of another model", "'q_proj' matches nothing"),
        ("no target", "target_modules must be names or a regular expression, got None"),
        ("another method", "peft_type 'LOHA' is not supported; supported are LORA"),
        ("no method", "peft_type None is not supported"),
        ("not JSON", "adapter_config.json is not a readable JSON file"),
        ("not an object", "must hold one JSON object, got a list"),
    ],
)
def test_a_bad_adapter_is_refused_in_one_line_and_the_model_stays_as_it_was(
    what: str, message: str, tmp_path: Path
) -> None:
    damage(tmp_path, what)
    model = tiny_gpt2()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert_same(snapshot(model), before)
    assert adaptation_of(model) is None
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_a_larger_gpt2_is_refused(tmp_path: Path) -> None:
    larger = GPT2(GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=3, n_head=4))
    method = LoRA(rank=4)
    method.adapt(larger)
    method.save(larger, tmp_path)
    with pytest.raises(ValueError, match=r"were they made for another one.*8 unexpected.*16 of another shape"):
        load_adapter(tiny_gpt2(), tmp_path)


def test_a_place_without_an_adapter_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no adapter directory"):
        load_adapter(tiny_gpt2(), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json is not in it"):
        load_adapter(tiny_gpt2(), tmp_path)
    method = LoRA(rank=4)
    method.save(adapted(method), tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is not in it"):
        load_adapter(tiny_gpt2(), tmp_path)


def test_a_save_that_fails_leaves_the_adapter_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = LoRA(rank=4)
    method.save(adapted(method), tmp_path / "adapter")
    before = (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_from_scratch.methods.adapter_files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        method.save(adapted(method, seed=9), tmp_path / "adapter")
    assert (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
