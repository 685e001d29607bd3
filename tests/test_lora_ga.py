"""LoRA-GA: the theorem behind its start, what it leaves unchanged, its directories, and how peft's differs."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods import lora_ga
from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.lora_ga import LoRAGA, LoRAGALinear, gradient_factors, lora_ga_layers
from lora_from_scratch.methods.method import adaptation_of
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.serving.adapter_reading import AdapterReader
from lora_from_scratch.support.linear_layers import is_conv1d, weight_of
from tests.any_models import logits_of, model_of
from tests.helpers import tiny_model
from tests.test_any_model import NAMED, assert_equal, read_by_peft
from tests.test_method import assert_same, snapshot


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_batch(seed: int = 0, rows: int = 3) -> Batch:
    tokens = torch.randint(1, 48, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens, tokens)


def begun(method: LoRAGA, **shape: Any) -> GPT2:
    """A tiny GPT-2 of ours that is ready for the first step."""
    model = tiny_model(**shape)
    method.adapt(model)
    method.before_training(model, iter([some_batch()]), steps=5)
    return model


def moved(method: LoRAGA, model: Any) -> Any:
    """After some training: A and B are near where they began."""
    with torch.no_grad():
        for name, parameter in method.trainable(model).items():
            parameter.add_(numbers(*parameter.shape, seed=len(name)).float(), alpha=0.1)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(some_batch(seed=1).input_ids)
        return found


def gradients_of(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Of the weights of an unadapted model, (out, in), by full backpropagation."""
    batch = some_batch()
    weights = [model.get_submodule(name).weight for name in names]
    model.requires_grad_(True)
    loss = next_token_loss(model(batch.input_ids), batch.labels)
    found = torch.autograd.grad(loss, weights)  # type: ignore[arg-type]
    model.requires_grad_(False)
    return {n: g.T if is_conv1d(model.get_submodule(n)) else g for n, g in zip(names, found, strict=True)}


# --- The theorem -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(9, 7, 2), (6, 11, 3), (8, 8, 1)])
def test_the_first_step_of_gradient_descent_is_the_best_of_rank_2r(outputs: int, inputs: int, rank: int) -> None:
    gamma, rate, scaling = 4.0, 1e-7, 3.0
    W, x, y = numbers(outputs, inputs), numbers(20, inputs, seed=1), numbers(20, outputs, seed=2)

    def loss(weight: Tensor) -> Tensor:
        return (F.linear(x, weight) - y).square().mean()

    G = torch.autograd.functional.jacobian(loss, W)
    A0, B0 = (factor.double() for factor in gradient_factors(G, rank, gamma))
    A, B = A0.clone().requires_grad_(), B0.clone().requires_grad_()
    rest = W - scaling * B0 @ A0
    of_A, of_B = torch.autograd.grad(loss(rest + scaling * B @ A), (A, B))
    change = scaling * ((B - rate * of_B) @ (A - rate * of_A) - B0 @ A0)

    U, S, V = torch.svd(G)  # Eckart and Young: nothing of rank 2r is nearer to G
    k = 2 * rank
    best = U[:, :k] * S[:k] @ V[:, :k].T
    factor = rate * scaling**2 * math.sqrt(outputs) / gamma  # of full fine-tuning's rate
    torch.testing.assert_close(change / -factor, best, atol=1e-5, rtol=1e-5)
    full = change / -factor - G
    torch.testing.assert_close(full.norm(), S[k:].square().sum().sqrt(), atol=1e-5, rtol=1e-5)


def test_the_start_has_the_directions_and_the_size_of_the_paper() -> None:
    G = numbers(9, 7)
    A, B = gradient_factors(1000 * G, 2, gamma=16)  # whose size does not count
    assert (A.shape, B.shape) == ((2, 7), (9, 2))
    size = 9**0.25 / 4
    for vectors in (A, B.T):
        torch.testing.assert_close(vectors @ vectors.T, size**2 * torch.eye(2))
    U, _, V = torch.svd(G.float())
    torch.testing.assert_close((A @ V[:, :2]).abs(), size * torch.eye(2), atol=1e-5, rtol=0)
    torch.testing.assert_close((B.T @ U[:, 2:4]).abs(), size * torch.eye(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", ["all-linear", ("c_attn", "mlp.c_proj")])
def test_a_run_begins_with_the_gradients_of_its_first_batch(targets: Any) -> None:
    method = LoRAGA(rank=2, targets=targets, gamma=9)
    layers = lora_ga_layers(begun(method))
    for name, G in gradients_of(tiny_model(), list(layers)).items():
        A, B = gradient_factors(G, 2, 9)
        torch.testing.assert_close(B @ A, layers[name].lora_B @ layers[name].lora_A, atol=1e-4, rtol=1e-3)


def test_one_gradient_at_a_time_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, present = tiny_model(), []

    def counted(G: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
        present.append(sum(p.grad is not None for p in model.parameters()))
        return gradient_factors(G, rank, gamma)

    monkeypatch.setattr(lora_ga, "gradient_factors", counted)
    method = LoRAGA(rank=2, bias="all")
    method.adapt(model)
    method.before_training(model, [some_batch()], steps=5)
    assert present == [1] * 8
    trained = set(method.trainable(model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_start() -> None:
    method, plain = LoRAGA(rank=2), begun(LoRAGA(rank=2))
    model = tiny_model()
    model.gradient_checkpointing = True
    method.adapt(model)
    method.before_training(model, [some_batch()], steps=5)
    for name, layer in lora_ga_layers(plain).items():
        other = lora_ga_layers(model)[name]
        torch.testing.assert_close(other.lora_B @ other.lora_A, layer.lora_B @ layer.lora_A)


# --- What does not change ----------------------------------------------------------------------------------


def test_at_the_start_the_model_is_the_base_up_to_rounding_and_undone_bit_for_bit() -> None:
    method, base = LoRAGA(rank=2, gamma=1), tiny_model()
    model = begun(method)
    torch.testing.assert_close(logits(model), logits(base), atol=1e-4, rtol=1e-4)
    for name, layer in lora_ga_layers(model).items():
        W = weight_of(base.get_submodule(name))
        rest, start = weight_of(layer.base), layer.scaling * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(rest + start, W, atol=1e-5, rtol=1e-5)
        assert (rest - W).norm() > 0.5 * start.norm()
    method.undo(model)
    assert_same(snapshot(model), snapshot(base))


def test_with_a_learning_rate_that_is_almost_zero_a_run_changes_nothing() -> None:
    method, model = LoRAGA(rank=2), tiny_model()
    method.adapt(model)
    settings = TrainingSettings(steps=3, learning_rate=1e-30, precision="fp32")
    Trainer(model, lambda step: some_batch(), settings, method=method, progress=False).run()
    for layer in lora_ga_layers(model).values():
        assert torch.equal(layer.lora_A, layer.start_A)
        assert torch.equal(layer.lora_B, layer.start_B)
    torch.testing.assert_close(logits(model.eval()), logits(tiny_model()), atol=1e-4, rtol=1e-4)


def test_merged_and_unmerged_it_computes_the_same_and_gets_every_bit_back() -> None:
    method = LoRAGA(rank=2)
    model = moved(method, begun(method))
    before, found = snapshot(model), logits(model)
    method.merge(model)
    torch.testing.assert_close(logits(model), found, atol=1e-4, rtol=1e-4)
    method.unmerge(model)
    assert_same(snapshot(model), before)


def test_an_adapter_that_was_loaded_keeps_its_start_when_it_is_trained_further(tmp_path: Path) -> None:
    method = LoRAGA(rank=2)
    model = moved(method, begun(method))
    method.save(model, tmp_path)
    back = tiny_model()
    read = load_adapter(back, tmp_path)
    before = snapshot(back)
    read.before_training(back, [some_batch(seed=2)], steps=5)
    assert_same(snapshot(back), before)


@pytest.mark.parametrize("merged", [False, True])
def test_another_state_brings_its_own_start(merged: bool) -> None:
    method = LoRAGA(rank=2)
    model = moved(method, begun(method))
    state, found = method.state_dict(model), logits(model)
    other = tiny_model()
    method.adapt(other)
    method.before_training(other, [some_batch(seed=5)], steps=5)
    if merged:
        method.merge(other)
    method.load_state_dict(other, state)
    record = adaptation_of(other)
    assert record is not None
    assert record.merged == merged
    torch.testing.assert_close(logits(other), found, atol=1e-4, rtol=1e-4)
    method.unmerge(other)
    assert torch.equal(logits(other), found)


def test_a_run_resumed_where_singular_vectors_have_other_signs_goes_on_with_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    method = LoRAGA(rank=2)

    def trainer(model: GPT2, stop: int = 0, **options: Any) -> Trainer:
        def batch_at(step: int) -> Batch:
            if stop and step == stop:
                raise KeyboardInterrupt
            return some_batch(seed=step)

        settings = TrainingSettings(steps=4, learning_rate=1e-2, precision="fp32")
        return Trainer(model, batch_at, settings, method=method, progress=False, **options)

    models = [tiny_model() for _ in range(3)]
    for model in models:
        method.adapt(model)
    quiet, troubled, resumed = models
    losses = trainer(quiet).run().losses
    options: dict[str, Any] = {"checkpoint": tmp_path / "checkpoint.pt", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        trainer(troubled, stop=2, **options).run()

    def other_signs(G: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
        A, B = gradient_factors(G, rank, gamma)
        return -A, B

    monkeypatch.setattr(lora_ga, "gradient_factors", other_signs)
    assert trainer(resumed, **options).run().losses == losses
    assert_same(snapshot(resumed), snapshot(quiet))


# --- Directories, and peft ---------------------------------------------------------------------------------


def begun_by_hand(kind: str, method: LoRAGA) -> Any:
    """A model of any kind that begins with gradients of random numbers, and was trained a little."""
    model = model_of(kind)
    method.adapt(model)
    for name, layer in lora_ga_layers(model).items():
        G = numbers(*weight_of(layer.base).shape, seed=len(name)).float()
        layer.begin(*gradient_factors(G, layer.rank, method.gamma))
    return moved(method, model)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "vit", "mlp"])
def test_a_directory_loads_in_peft_as_a_lora_of_twice_the_rank(kind: str, rslora: bool, tmp_path: Path) -> None:
    method = LoRAGA(rank=2, alpha=6, targets=NAMED[kind], rslora=rslora)
    model = begun_by_hand(kind, method)
    method.save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, "lora_ga")
    theirs = read_by_peft(kind, tmp_path)
    torch.testing.assert_close(logits_of(theirs, kind), logits_of(model, kind), atol=1e-4, rtol=1e-4)
    back = model_of(kind)
    assert load_adapter(back, tmp_path) == method
    assert torch.equal(logits_of(back, kind), logits_of(model, kind))


def test_ranks_and_strengths_of_single_layers_are_saved_and_read(tmp_path: Path) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"c_proj": 3}, "alpha_pattern": {"h.0.mlp.c_proj": 5.3}}
    method = LoRAGA(rank=2, targets=("c_attn", "mlp.c_proj"), bias="lora_only", **patterns)
    model = moved(method, begun(method))
    method.save(model, tmp_path)
    back = tiny_model()
    assert load_adapter(back, tmp_path) == method
    assert torch.equal(logits(back), logits(model))


def test_the_server_reads_it_as_a_lora_of_twice_the_rank(tmp_path: Path) -> None:
    method, base = LoRAGA(rank=2, targets=("c_attn",)), tiny_model()
    model = moved(method, begun(method))
    method.save(model, tmp_path)
    for name, factors in AdapterReader(base).read(tmp_path).items():
        change = (factors.A.T @ factors.B).T
        layer = lora_ga_layers(model)[name]
        expected = layer.scaling * (layer.lora_B @ layer.lora_A - layer.start_B @ layer.start_A)
        torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)


def in_peft(kind: str, gradients: dict[str, Tensor], scale: str = "unit", direction: str = "ArB2r") -> Any:
    """peft's own LoRA-GA of rank 2, begun with these gradients (out, in)."""
    peft = pytest.importorskip("peft")
    ga = peft.LoraGAConfig(direction=direction, scale=scale)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=list(NAMED[kind]),
        init_lora_weights="lora_ga",
        lora_ga_config=ga,
        fan_in_fan_out=kind.startswith("gpt2"),
    )
    model = model_of(kind)
    for name, G in gradients.items():
        layer = model.get_submodule(name)
        layer._peft_loraga_grad = G.T.contiguous() if is_conv1d(layer) else G
    torch.manual_seed(0)  # its decomposition is a random one
    return peft.get_peft_model(model, config).eval()


def some_gradients(kind: str) -> dict[str, Tensor]:
    """With singular values far apart, so that a random decomposition finds their vectors."""
    method, model, found = LoRAGA(rank=2, targets=NAMED[kind]), model_of(kind), {}
    method.adapt(model)
    for seed, (name, layer) in enumerate(lora_ga_layers(model).items()):
        U, S, V = torch.svd(numbers(*weight_of(layer.base).shape, seed=seed))
        found[name] = (U * 3.0 ** -torch.arange(len(S)) @ V.T).float()
    return found


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mlp"])
def test_the_directions_are_pefts_and_its_b_has_the_singular_values_too(kind: str) -> None:
    gradients = some_gradients(kind)
    theirs = in_peft(kind, gradients)
    for name, G in gradients.items():
        A, B = gradient_factors(G, 2, math.sqrt(len(G)))  # c = 1, peft's "unit"
        other = theirs.base_model.model.get_submodule(name)
        torch.testing.assert_close((A @ other.lora_A["default"].weight.T).abs(), torch.eye(2), atol=1e-4, rtol=0)
        S = torch.linalg.svdvals(G)[2:4]
        B_theirs = other.lora_B["default"].weight
        torch.testing.assert_close((B.T @ B_theirs).abs(), torch.diag(S), atol=1e-5, rtol=1e-3)


def first_step(scaling: float, G: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """What a step of gradient descent adds to W, per rate and to first order in it."""
    return -(scaling**2) * (B @ B.T @ G + G @ A.T @ A)


def test_the_first_step_of_pefts_is_not_a_multiple_of_the_best_one_and_ours_is() -> None:
    gradients = some_gradients("mlp")
    theirs = in_peft("mlp", gradients, scale="stable")
    for name, G in gradients.items():
        U, S, V = torch.svd(G)
        best = -(U[:, :4] * S[:4] @ V[:, :4].T)
        other = theirs.base_model.model.get_submodule(name)
        A, B = other.lora_A["default"].weight.detach(), other.lora_B["default"].weight.detach()
        similar = partial(F.cosine_similarity, best.flatten(), dim=0)
        assert similar(first_step(3.0, G, *gradient_factors(G, 2, 16)).flatten()) > 0.99999
        assert similar(first_step(3.0, G, A, B).flatten()) < 0.999


def test_peft_takes_the_inputs_of_a_conv1d_for_its_outputs() -> None:
    gradients = some_gradients("gpt2")
    unit, stable = in_peft("gpt2", gradients), in_peft("gpt2", gradients, scale="stable")
    name = next(name for name in gradients if name.endswith("c_attn"))  # 16 inputs, 48 outputs
    sizes = [m.base_model.model.get_submodule(name).lora_B["default"].weight.norm() for m in (unit, stable)]
    torch.testing.assert_close(sizes[1] / sizes[0], torch.tensor(16**0.25 / 4))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mlp"])
def test_with_pefts_start_logits_and_gradients_are_pefts(kind: str) -> None:
    theirs = in_peft(kind, some_gradients(kind), scale="stable")
    method, model = LoRAGA(rank=2, alpha=6, rslora=False, targets=NAMED[kind]), model_of(kind)
    method.adapt(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, layer in lora_ga_layers(model).items():
            other = theirs.base_model.model.get_submodule(name)
            A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
            layer.begin(A, B)
            torch.testing.assert_close(layer.base.weight, other.base_layer.weight)
            for mine, given in ((layer.lora_A, A), (layer.lora_B, B)):
                given.add_(0.1 * torch.randn(given.shape, generator=generator))
                mine.copy_(given)
    assert_equal(model, method, theirs, kind)


def test_what_peft_saves_is_read_if_it_was_converted_and_refused_if_not(tmp_path: Path) -> None:
    kind = "gpt2"
    theirs = in_peft(kind, some_gradients(kind), scale="stable")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "lora_ga"
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(numbers(*parameter.shape, seed=len(name)).float(), alpha=0.1)
    theirs.save_pretrained(tmp_path / "plain")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    back = model_of(kind)
    read = load_adapter(back, tmp_path / "converted")
    assert isinstance(read, LoRAGA)
    assert (read.rank, read.alpha, read.rslora, set(read.targets)) == (2, 6, False, set(NAMED[kind]))
    torch.testing.assert_close(logits_of(back, kind), logits_of(theirs, kind), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        load_adapter(model_of(kind), tmp_path / "plain")
    peft = pytest.importorskip("peft")
    again = peft.PeftModel.from_pretrained(model_of(kind), str(tmp_path / "plain")).eval()
    assert not torch.allclose(logits_of(again, kind), logits_of(theirs, kind), atol=0.01)  # peft does not notice


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gamma": 0}, "gamma must be a positive number"),
        ({"dropout": 0.1}, "dropout must be 0"),
        ({"rank": 13}, r"rank must be between 1 and 12 \(half the smaller side of W\)"),
        ({"rank": 2, "targets": ("c_attn.q",)}, "adapts whole layers"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_and_the_model_stays_as_it_was(fields: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        LoRAGA(**fields).adapt(model)
    assert_same(snapshot(model), snapshot(tiny_model()))


def test_a_layer_holds_twice_its_factors_and_trains_them_once() -> None:
    layer = LoRAGALinear(nn.Linear(8, 6), rank=2)
    assert sum(p.numel() for p in layer.parameters() if p is layer.lora_A or p is layer.lora_B) == 2 * (8 + 6)
    assert {name for name, _ in layer.named_buffers()} == {"start_A", "start_B"}


def test_a_directory_with_an_odd_rank_is_refused(tmp_path: Path) -> None:
    method = LoRA(rank=3, targets=("c_attn",))
    model = tiny_model()
    method.adapt(model)
    method.save(model, tmp_path)
    file = tmp_path / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "lora_ga"}))
    with pytest.raises(ValueError, match=r"c_attn must be even, half of it for the start, got 3"):
        load_adapter(tiny_model(), tmp_path)
