"""QLoRA: LoftQ against plain quantising, the method against its laws, loading layer by layer."""

from __future__ import annotations

import gc
import itertools
import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.checkpoint import load_model, save_gpt2
from lora_from_scratch.gpt2.model import GPT2, Conv1D, next_token_loss
from lora_from_scratch.methods import qlora
from lora_from_scratch.methods.adapter_files import read_adapter
from lora_from_scratch.methods.loftq import LoftQ, begin_with_loftq, best_factors, loftq_init
from lora_from_scratch.methods.lora import LoRA, LoRALinear, inject_lora, lora_layers
from lora_from_scratch.methods.method import adaptation_of
from lora_from_scratch.methods.qlora import QLoRA, load_quantized, quantize_model
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.quantization.nf4_linear import NF4Linear, nf4_layers
from lora_from_scratch.quantization.quantized_tensor import quantize_4bit
from lora_from_scratch.support.linear_layers import weight_of
from tests.helpers import real_checkpoint, tiny_model, transformers_twin
from tests.test_method import assert_same, snapshot, some_tokens, tiny_gpt2, train


def quantized_gpt2(**options: Any) -> GPT2:
    model = tiny_gpt2()
    quantize_model(model, **options)
    return model


# --- LoftQ ---------------------------------------------------------------------------------------------


def bundled_layers() -> list[Tensor]:
    model = load_model(real_checkpoint())
    return [
        weight_of(model.get_submodule(f"transformer.h.{name}")).detach() for name in ("0.attn.c_attn", "3.attn.c_proj")
    ]


def test_loftq_begins_nearer_to_w_than_quantising_and_every_iteration_brings_it_nearer() -> None:
    for W in bundled_layers():
        plain = (W - quantize_4bit(W).dequantize()).norm()
        errors = [plain]
        for iterations in (1, 2, 4):
            Q, A, B = loftq_init(W, 16, iterations)
            assert (A.shape, B.shape) == ((16, W.shape[1]), (W.shape[0], 16))
            errors.append((W - Q.dequantize() - B @ A).norm())
        assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
        assert errors[-1] < 0.95 * plain


def test_the_first_iteration_is_quantising_and_the_best_low_rank_matrix_for_its_error() -> None:
    torch.manual_seed(0)
    W = torch.randn(40, 24)
    Q, A, B = loftq_init(W, 5, 1)
    assert torch.equal(Q.packed, quantize_4bit(W).packed)
    error = W - Q.dequantize()
    left_out = torch.linalg.svdvals(error)[5:]  # Eckart and Young
    torch.testing.assert_close((error - B @ A).norm(), left_out.norm(), atol=1e-5, rtol=1e-5)
    A, B = best_factors(B @ A, 24)
    torch.testing.assert_close(A @ A.T, B.T @ B, atol=1e-5, rtol=1e-5)  # each has its half of S


def test_the_quantiser_is_the_callers_and_bad_arguments_are_refused() -> None:
    W = torch.randn(12, 10)
    Q, _, _ = loftq_init(W, 2, 2, lambda matrix: quantize_4bit(matrix, "fp4", 32, True))
    assert (Q.quant_type, Q.blocksize, Q.nested) == ("fp4", 32, True)
    for arguments, message in [
        ((W, 11), "rank must be between 1 and 10 .* got 11"),
        ((W, 2, 0), "iterations must be at least 1, got 0"),
        ((W[0], 1), r"matrix \(out, in\), got shape \(10,\)"),
        ((W / 0, 1), "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            loftq_init(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [4.0, 1.0, 40.0])
def test_a_layer_that_begins_with_loftq_computes_q_and_b_a_whatever_its_alpha(alpha: float) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(40, 24)
    layer = LoRALinear(NF4Linear.from_layer(dense), rank=4, alpha=alpha)
    parameters = [layer.lora_A, layer.lora_B]
    begin_with_loftq(layer, dense.weight, 3)
    Q, A, B = loftq_init(dense.weight, 4, 3)
    x = torch.randn(5, 40)
    torch.testing.assert_close(layer(x), x @ (Q.dequantize() + B @ A).T + dense.bias, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad and p is q for p, q in zip(parameters, [layer.lora_A, layer.lora_B], strict=True))
    before = layer(x)
    for other, W in [(LoRALinear(dense, 4), dense.weight), (layer, dense.weight.T), (layer, dense.weight / 0)]:
        with pytest.raises(ValueError, match=r"on a 4-bit layer|not finite"):
            begin_with_loftq(other, W)
    assert torch.equal(layer(x), before)


def test_loftq_starts_nearer_to_the_base_models_logits_than_plain_qlora() -> None:
    model = load_model(real_checkpoint())
    tokens = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    distances = []
    with torch.no_grad():
        base = model(tokens)
        for cls in (QLoRA, LoftQ):
            method = cls(rank=16, alpha=4, targets="all-linear")
            method.adapt(model)
            distances.append((model(tokens) - base).norm().item())
            method.undo(model)
    assert distances[1] < 0.95 * distances[0]


# --- The method ----------------------------------------------------------------------------------------

METHODS_TRIED = [
    QLoRA(rank=3, dropout=0.1),
    QLoRA(rank=2, targets=("c_attn.q", "c_attn.v"), quant_type="fp4", blocksize=32, double_quantization=False),
    LoftQ(rank=4, alpha=3, targets=("c_fc",), iterations=2),
]
every_method = pytest.mark.parametrize("method", METHODS_TRIED, ids=["all", "q and v in fp4", "loftq"])


def base_of(method: QLoRA) -> GPT2:
    return quantized_gpt2(
        quant_type=method.quant_type, blocksize=method.blocksize, double_quantization=method.double_quantization
    )


@pytest.mark.parametrize("method", METHODS_TRIED[:2])
def test_nothing_changes_at_the_start_but_that_the_base_is_quantised(method: QLoRA) -> None:
    model, tokens = tiny_gpt2(), some_tokens()
    full = model(tokens)
    method.adapt(model)
    assert torch.equal(model(tokens), base_of(method)(tokens))
    assert not torch.equal(model(tokens), full)
    lora, plain = LoRA(**{name: getattr(method, name) for name in ("rank", "alpha", "targets", "dropout")}), tiny_gpt2()
    lora.adapt(plain)
    assert_same(method.state_dict(model), lora.state_dict(plain))  # the same A from the same seed


@every_method
def test_training_moves_a_and_b_and_not_one_bit_of_the_rest(method: QLoRA) -> None:
    model = tiny_gpt2()
    method.adapt(model)
    before, learned = snapshot(model), set(method.trainable(model))
    assert learned
    assert all(name.endswith(("lora_A", "lora_B")) for name in learned)
    train(model, method, steps=20)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == learned
    assert all(p.grad is None for name, p in model.named_parameters() if name not in learned)


@every_method
def test_undo_gives_the_full_base_back_bit_for_bit_with_the_same_objects(method: QLoRA) -> None:
    model = tiny_gpt2()
    before, objects = snapshot(model), [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    modules = [id(module) for module in model.modules()]
    for merged in (False, True):
        method.adapt(model)
        assert nf4_layers(model)
        train(model, method, steps=2)
        if merged:
            method.merge(model)
        method.undo(model)
        assert_same(snapshot(model), before)
        assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == objects
        assert [id(module) for module in model.modules()] == modules
        assert adaptation_of(model) is None


@every_method
def test_merging_dequantises_and_computes_the_same_and_unmerging_gives_every_bit_back(
    method: QLoRA, tmp_path: Path
) -> None:
    model, tokens = tiny_gpt2(), some_tokens()
    method.adapt(model)
    train(model, method)
    logits, state = model(tokens), snapshot(model)
    for _ in range(2):
        method.merge(model)
        assert not nf4_layers(model)
        torch.testing.assert_close(model(tokens), logits, atol=1e-5, rtol=1e-5)
        method.unmerge(model)
        assert torch.equal(model(tokens), logits)
        assert_same(snapshot(model), state)
    plain = method.merged_copy(model)
    assert torch.equal(model(tokens), logits)
    save_gpt2(plain, None, tmp_path)  # refuses anything but a plain GPT-2
    torch.testing.assert_close(load_model(tmp_path)(tokens), logits, atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in plain.parameters())


@every_method
def test_what_was_learned_makes_another_copy_of_the_base_equal_bit_for_bit(method: QLoRA, tmp_path: Path) -> None:
    model, tokens = tiny_gpt2(), some_tokens()
    method.adapt(model)
    train(model, method)
    by_state, by_file = tiny_gpt2(), tiny_gpt2()
    method.adapt(by_state)
    method.load_state_dict(by_state, method.state_dict(model))
    assert torch.equal(by_state(tokens), model(tokens))
    method.save(model, tmp_path)
    loaded = load_adapter(by_file, tmp_path)
    assert type(loaded) is type(method)
    for name in ("quant_type", "blocksize", "iterations"):
        assert getattr(loaded, name, 0) == getattr(method, name, 0)
    torch.testing.assert_close(by_file(tokens), model(tokens), atol=1e-6, rtol=1e-6)  # parts are fused in the file
    if method is METHODS_TRIED[0]:
        assert torch.equal(by_file(tokens), model(tokens))


def test_the_directory_is_a_loras_that_fits_on_a_quantised_base_and_a_loftq_one_is_refused(tmp_path: Path) -> None:
    model, base, tokens = tiny_gpt2(), quantized_gpt2(), some_tokens()
    method = QLoRA(rank=3)
    method.adapt(model)
    train(model, method)
    method.save(model, tmp_path / "plain")
    lora, state = LoRA.from_adapter(*read_adapter(tmp_path / "plain"), base)
    lora.adapt(base)
    lora.load_state_dict(base, state)
    assert torch.equal(base(tokens), model(tokens))
    method.undo(model)
    method = LoftQ(rank=3)
    method.adapt(model)
    method.save(model, tmp_path / "loftq")
    with pytest.raises(ValueError, match="init_lora_weights='loftq'"):
        LoRA.from_adapter(*read_adapter(tmp_path / "loftq"), tiny_gpt2())
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    config["loftq_config"]["loftq_bits"] = 2
    with pytest.raises(ValueError, match=r"'loftq_bits': 2.*must have loftq_bits 4"):
        QLoRA.from_adapter(config, {}, model)


def test_peft_reads_the_directory(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    model, tokens = tiny_gpt2(), some_tokens()
    method = QLoRA(rank=3)
    dense = {name: layer.dense() for name, layer in nf4_layers(base_of(method)).items()}
    base = tiny_gpt2()
    inject_lora(base, dense)
    method.adapt(model)
    train(model, method)
    method.save(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(transformers_twin(base), tmp_path)
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), atol=1e-5, rtol=1e-5)


def test_without_keep_base_the_full_weights_are_gone_and_undo_says_so() -> None:
    model = tiny_gpt2()
    weights = [weakref.ref(layer.weight) for layer in model.modules() if isinstance(layer, Conv1D)]
    method = QLoRA(rank=2, keep_base=False)
    method.adapt(model)
    gc.collect()
    assert [weight() for weight in weights] == [None] * len(weights)
    with pytest.raises(ValueError, match="keep_base=False"):
        method.undo(model)
    train(model, method)
    assert lora_layers(method.merged_copy(model)) == {}


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, method, tokens = tiny_gpt2(), QLoRA(rank=2), some_tokens()
        method.adapt(model)
        model.gradient_checkpointing = checkpointing
        next_token_loss(model.train()(tokens), tokens).backward()
        gradients.append({name: p.grad for name, p in method.trainable(model).items()})
    assert_same(*gradients)  # type: ignore[arg-type]


# --- Whole models, and what is refused --------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loading_layer_by_layer_equals_loading_and_quantising(prefix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_gpt2(tiny_gpt2(), None, tmp_path, dtype=dtype)
    tensors = {prefix + n.removeprefix("transformer."): t for n, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, whole = load_quantized(tmp_path), load_model(tmp_path)
    quantize_model(whole)
    assert_same(model.state_dict(), whole.state_dict())
    assert not model.training
    method = QLoRA(rank=2, keep_base=False)
    method.adapt(model)  # there is no full base to lose, so there is a way back
    method.undo(model)
    assert_same(model.state_dict(), whole.state_dict())
    torch.save({"transformer.wte.weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="missing"):
        load_quantized(tmp_path)


def test_loading_layer_by_layer_never_holds_two_full_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_gpt2(tiny_model(n_embd=30), None, tmp_path)  # a width that no other test has
    read, held = qlora._read_tensor, []

    def spy(*place: Any) -> Tensor:
        shapes = [o.shape for o in gc.get_objects() if type(o) is nn.Parameter and not o.is_meta]
        held.append(sum(shape in [(30, 90), (30, 30), (30, 120), (120, 30)] for shape in shapes))
        return read(*place)

    monkeypatch.setattr(qlora, "_read_tensor", spy)
    load_quantized(tmp_path)
    assert max(held) == 1  # while its bias is read


def test_a_quantised_model_can_be_put_back_and_is_not_quantised_twice() -> None:
    model = tiny_gpt2()
    before = snapshot(model)
    dense = quantize_model(model)
    assert set(dense) == set(nf4_layers(model))
    assert len(dense) == 4 * model.config.n_layer
    assert quantize_model(model) == {}
    inject_lora(model, dense)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "nf3"}, "quant_type must be one of nf4, fp4, got 'nf3'"),
        ({"blocksize": 48}, "blocksize must be one of 32, 64, .*, got 48"),
        ({"double_quantization": "yes"}, "double_quantization must be true or false, got 'yes'"),
        ({"rank": 0}, "rank must be .* got 0"),
    ],
)
def test_a_bad_hyperparameter_is_refused_when_the_method_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QLoRA(**options)


@pytest.mark.parametrize("iterations", [0, True, 1.5])
def test_loftq_needs_at_least_one_iteration(iterations: Any) -> None:
    with pytest.raises(ValueError, match="iterations must be a whole number of at least 1, got"):
        LoftQ(iterations=iterations)


def test_what_does_not_fit_the_model_is_refused_and_the_model_stays_as_it_was() -> None:
    bad = tiny_gpt2()
    with torch.no_grad():
        bad.get_parameter("transformer.h.1.mlp.c_fc.weight")[3, 2] = float("nan")
    adapted = tiny_gpt2()
    LoRA(rank=1).adapt(adapted)
    cases: list[tuple[GPT2, QLoRA, str]] = [
        (bad, QLoRA(), r"h\.1\.mlp\.c_fc: .*not finite.* nan at position"),
        (adapted, QLoRA(), "already adapted"),
        (tiny_gpt2(), QLoRA(rank=33), "c_attn: rank must be between 1 and 32 .* got 33"),
        (tiny_gpt2(), QLoRA(targets=("nothing",)), "'nothing' matches nothing"),
        (tiny_gpt2(), LoftQ(targets=("c_attn.q",)), r"LoftQ adapts whole layers, got a part of .*c_attn;"),
        (quantized_gpt2(), QLoRA(quant_type="fp4"), "quantised already, with quant_type=nf4"),
        (quantized_gpt2(), LoftQ(), "LoftQ needs the weights before .*h.0.attn.c_attn is in four bits already"),
    ]
    for model, method, message in cases:
        before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            method.adapt(model)
        now = snapshot(model)
        assert now.keys() == before.keys()
        assert all(torch.equal(now[n].nan_to_num(7), t.nan_to_num(7)) for n, t in before.items())
        assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(ValueError, match="already adapted"):
        quantize_model(adapted)
