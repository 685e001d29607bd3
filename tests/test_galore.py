"""GaLore: equal to algorithm 2 of the paper, step by step, and what a new projection does.

Compared outside this repository with the optimiser of jiaweizzhao/GaLore (commit 2cc66f8), on the models and settings
of `test_each_step_is_that_of_algorithm_2` with `rest=True`: after each of 12 steps no weight differs by more than 7e-5
for alpha 4, and 5e-6 for smaller ones (their epsilon is added before the bias correction). That is with the signs of
our singular vectors; with the other signs that an SVD of the transposed gradient gives, the weights differ by a step's
length after the first new projection, because the moments are kept.
"""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_from_scratch.finetune.accounting import predicted_memory
from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings, learning_rate_at
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.galore import GaLore, GaLoreLinear, projection, projections
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.support.linear_layers import weight_of
from tests.helpers import tiny_model
from tests.test_method import assert_same, snapshot

STEPS = 12
RATE = 1e-2


def batch_at(step: int) -> Batch:
    ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(step))
    return Batch(ids, ids)


def training(steps: int = STEPS, **changes: Any) -> TrainingSettings:
    plain: dict[str, Any] = {"weight_decay": 0.0, "clip_norm": 0.0, "precision": "fp32"}
    return TrainingSettings(steps=steps, learning_rate=RATE, **plain | changes)


def adapted(method: Method, seed: int = 0) -> GPT2:
    model = tiny_model(seed)
    method.adapt(model)
    return model


def trained(method: Method, steps: int = STEPS, **changes: Any) -> GPT2:
    model = adapted(method)
    Trainer(model, batch_at, training(steps, **changes), method=method, progress=False).run()
    return model.eval()


def sum_of(layer: GaLoreLinear) -> Tensor:
    """W + P R (out, in), in float64, from the tensors themselves."""
    product = layer.lora_B.double() @ layer.lora_A.double()
    return (weight_of(layer.base).double() + product).detach()


# --- Algorithm 2 -------------------------------------------------------------------------------------------


class Algorithm2:
    """Adam with GaLore for one weight, written from the paper: the full gradient is projected, W itself is changed."""

    def __init__(self, rank: int, alpha: float, every: int) -> None:
        self.rank, self.alpha, self.every = rank, alpha, every
        self.t = 0
        self.P = self.M = self.V = np.zeros(())

    def change(self, G: np.ndarray, rate: float, signs: np.ndarray) -> np.ndarray:
        """What a step adds to W (m, n), from its gradient. Of `signs` (m, r) only the sign of each column counts: that
        of a singular vector is arbitrary, and since the moments are kept, the steps depend on it."""
        b1, b2 = 0.9, 0.999
        if G.shape[0] > G.shape[1]:  # projected from the right: as the transposed matrix from the left
            return self.change(G.T, rate, signs.T).T
        if self.t % self.every == 0:
            values, vectors = np.linalg.eigh(G @ G.T)  # U S^2 U^T, the largest last
            P = vectors[:, np.argsort(-values)[: self.rank]]
            self.P = P * np.sign((P * signs).sum(axis=0))
        R = self.P.T @ G
        self.M = b1 * self.M + (1 - b1) * R
        self.V = b2 * self.V + (1 - b2) * R**2
        self.t += 1
        N = self.M / (1 - b1**self.t) / (np.sqrt(self.V / (1 - b2**self.t)) + 1e-8)
        return np.asarray(-rate * self.alpha * self.P @ N)


class Watched(GaLore):
    """Notes W + P R and P of each layer after each step, before P changes."""

    seen: list[dict[str, tuple[Tensor, Tensor]]]

    def after_step(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer) -> None:
        layers = self.layers(model).items()
        self.seen.append({name: (sum_of(layer), layer.P.detach().double().clone()) for name, layer in layers})
        super().after_step(model, step, optimizer)


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize(("rank", "alpha", "every"), [(1, 1.0, 1), (3, 0.25, 4), (5, 4.0, 5), (2, 0.25, 200)])
def test_each_step_is_that_of_algorithm_2(rank: int, alpha: float, every: int, rest: bool) -> None:
    """On all linear layers of a random GPT-2: (72, 24), (24, 24), (96, 24) and (24, 96)."""
    method = Watched(rank=rank, alpha=alpha, refresh_every=every, rest=rest)
    object.__setattr__(method, "seen", [])
    settings = training(schedule="cosine", warmup_steps=2)
    Trainer(adapted(method), batch_at, settings, method=method, progress=False).run()
    assert len(method.seen) == STEPS

    model = tiny_model().double()
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in method.seen[0]}
    galore = {name: Algorithm2(rank, alpha, every) for name in weights}
    projected = {id(weight) for weight in weights.values()}
    adam = torch.optim.Adam([p for p in model.parameters() if rest and id(p) not in projected] or [torch.zeros(1)])
    for step, seen in enumerate(method.seen):
        model.zero_grad()
        next_token_loss(model(batch_at(step).input_ids), batch_at(step).labels).backward()
        rate = adam.param_groups[0]["lr"] = RATE * learning_rate_at(step, settings)
        adam.step()
        for name, weight in weights.items():
            expected, P = seen[name]
            change = galore[name].change(weight.grad.T.numpy(), rate, P.numpy())
            weight.data += torch.from_numpy(change).T
            difference = float((expected - weight.data.T).abs().max())
            assert difference < 2e-5, (step, name)  # float32 against float64; W moves by about 1e-2 in each step


def test_the_projection_has_the_singular_vectors_of_the_smaller_side() -> None:
    for outputs, inputs in ((5, 9), (6, 6), (9, 5)):
        G = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs))
        P = projection(G, 3)
        assert P.shape == ((outputs, 3) if outputs <= inputs else (3, inputs))
        columns = P if outputs <= inputs else P.T
        torch.testing.assert_close(columns.T @ columns, torch.eye(3))
        kept = P @ (P.T @ G) if outputs <= inputs else (G @ P.T) @ P
        lost = torch.linalg.svdvals(G)[3:].square().sum()  # Eckart and Young: no other projection loses less
        torch.testing.assert_close((G - kept).square().sum(), lost)


# --- A new projection --------------------------------------------------------------------------------------


def before_a_refresh(method: GaLore, steps: int = STEPS) -> tuple[GPT2, torch.optim.Optimizer]:
    """A model after three steps of training by hand."""
    model = adapted(method)
    method.before_training(model, (batch_at(step) for step in range(steps)), steps)
    optimizer = torch.optim.Adam(method.trainable(model).values(), lr=RATE)
    for step in range(3):
        optimizer.zero_grad()
        next_token_loss(model(batch_at(step).input_ids), batch_at(step).labels).backward()
        optimizer.step()
    return model, optimizer


def test_a_new_projection_comes_from_the_gradient_of_the_next_step_and_keeps_the_weights_and_moments() -> None:
    method = GaLore(rank=2, refresh_every=3)
    model, optimizer = before_a_refresh(method)
    layers = method.layers(model)
    sums = {name: sum_of(layer) for name, layer in layers.items()}
    moments = {name: copy.deepcopy(optimizer.state[layer.R]) for name, layer in layers.items()}
    old = {name: layer.P.detach().clone() for name, layer in layers.items()}
    method.after_step(model, 2, optimizer)
    assert all(torch.equal(layer.P, old[name]) for name, layer in layers.items())  # not yet

    plain = method.merged_copy(model)
    plain.requires_grad_(True)
    next_token_loss(plain(batch_at(3).input_ids), batch_at(3).labels).backward()
    method.after_step(model, 3, optimizer)
    for name, layer in layers.items():
        assert not layer.R.any()
        assert float((sum_of(layer) - sums[name]).abs().max()) < 1e-6
        weight: Any = plain.get_submodule(name).weight
        expected = projection(weight.grad.T, 2)
        dots = (expected * layer.P).sum(dim=0 if layer.is_left else 1)
        torch.testing.assert_close(dots.detach(), torch.ones(2), atol=1e-4, rtol=0)
        assert_same(optimizer.state[layer.R], moments[name])
        assert not layer.P.requires_grad
        assert layer.base.weight.grad is None
        assert not layer.base.weight.requires_grad
    assert model.training is plain.training


@pytest.mark.parametrize(("every", "subspaces"), [(12, 1), (6, 2), (4, 3)])
def test_the_total_change_has_the_rank_of_all_subspaces_together(every: int, subspaces: int) -> None:
    method = GaLore(rank=2, refresh_every=every)
    plain, base = method.merged_copy(trained(method)), tiny_model()
    for name in method.layers(adapted(method)):
        change = weight_of(plain.get_submodule(name)).double() - weight_of(base.get_submodule(name)).double()
        assert int((torch.linalg.svdvals(change) > 1e-5).sum()) == 2 * subspaces


def test_there_is_no_new_projection_after_the_last_step() -> None:
    model = trained(GaLore(rank=2, refresh_every=STEPS))
    assert all(layer.R.any() for layer in GaLore(rank=2, refresh_every=STEPS).layers(model).values())


def test_a_gradient_that_is_not_finite_gives_no_projection() -> None:
    method = GaLore(rank=2)
    model = adapted(method)
    assert set(projections(model, method.layers(model), batch_at(0))) == set(method.layers(model))
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    assert projections(model, method.layers(model), batch_at(0)) == {}


def test_the_projections_do_not_depend_on_dropout_and_no_gradient_is_left() -> None:
    method = GaLore(rank=2, rest=True)
    model = tiny_model(attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2).train()
    method.adapt(model)
    first, second = (projections(model, method.layers(model), batch_at(0)) for _ in range(2))
    assert_same(first, second)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("place", [3, 4, 5, 8, 11])
def test_a_run_that_is_interrupted_before_at_or_after_a_new_projection_ends_the_same(
    place: int, tmp_path: Path
) -> None:
    method = GaLore(rank=2, refresh_every=4)
    quiet = trained(method, weight_decay=0.1, clip_norm=1.0)

    def trainer(model: GPT2, stop: int) -> Trainer:
        def interrupted(step: int) -> Batch:
            if step == stop:
                raise KeyboardInterrupt
            return batch_at(step)

        options: dict[str, Any] = {"checkpoint": tmp_path / "checkpoint.pt", "checkpoint_every": 1, "progress": False}
        return Trainer(model, interrupted, training(weight_decay=0.1, clip_norm=1.0), method=method, **options)

    with pytest.raises(KeyboardInterrupt):
        trainer(adapted(method), place).run()
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] >= place - 1
    resumed = adapted(method)
    trainer(resumed, -1).run()
    assert_same(method.state_dict(resumed), method.state_dict(quiet))
    method.undo(resumed)
    assert_same(snapshot(resumed), snapshot(tiny_model()))


# --- What it costs -----------------------------------------------------------------------------------------


def test_the_optimiser_has_two_moments_of_the_projected_gradients_and_no_more() -> None:
    method = GaLore(rank=3)
    model = adapted(method)
    d, blocks = 24, 2
    projected = blocks * 3 * (3 * d + d + 4 * d + 4 * d)  # r times the larger side of each weight
    assert sum(p.numel() for p in method.trainable(model).values()) == projected
    budget = predicted_memory(model.config, method, 2, 9, precision="fp32")
    assert budget.gradients == 4 * projected
    assert budget.optimizer == 2 * 4 * projected + 4 * 4 * blocks  # and the number of steps of each tensor


@pytest.mark.parametrize(("outputs", "inputs", "kept"), [(24, 6, 2), (6, 24, 24), (9, 9, 9)])
def test_a_layer_with_more_outputs_than_inputs_keeps_only_r_numbers_of_each_token(
    outputs: int, inputs: int, kept: int
) -> None:
    layer = GaLoreLinear(nn.Linear(inputs, outputs).requires_grad_(False), rank=2)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(50, inputs))
    assert sum(tensor.numel() for tensor in saved) == 50 * kept


def test_it_keeps_fewer_activations_than_a_lora_of_the_same_rank() -> None:
    config = tiny_model().config
    ours, loras = (predicted_memory(config, method, 2, 9) for method in (GaLore(rank=2), LoRA(rank=2)))
    assert ours.activations < loras.activations
    assert ours.optimizer < loras.optimizer


# --- What is trained, kept and refused ---------------------------------------------------------------------


def test_only_the_projected_weights_are_scaled_by_alpha() -> None:
    method = GaLore(rank=2, alpha=0.5, rest=True)
    model = adapted(method)
    projected, others = method.parameter_groups(model)
    assert projected["lr_scale"] == 0.5
    assert {id(p) for p in projected["params"]} == {id(layer.R) for layer in method.layers(model).values()}
    assert "lr_scale" not in others
    base = tiny_model()
    weights = sum(p.numel() for name, p in base.named_parameters() if ".h." in name and p.ndim == 2)
    assert sum(p.numel() for p in others["params"]) == sum(p.numel() for p in base.parameters()) - weights


def test_a_model_can_be_copied_and_written_in_the_middle_of_a_run() -> None:
    method = GaLore(rank=2, refresh_every=3)
    model, _ = before_a_refresh(method)
    model.eval()
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    logits = model(batch_at(0).input_ids)
    assert torch.equal(twin(batch_at(0).input_ids), logits)
    plain = method.merged_copy(model)
    torch.testing.assert_close(plain(batch_at(0).input_ids), logits, atol=1e-4, rtol=1e-4)
    method.undo(twin)
    assert_same(snapshot(twin), snapshot(tiny_model()))


def test_without_a_copy_of_the_base_less_is_kept_and_undo_is_refused() -> None:
    light, kept = GaLore(rank=2, keep_base=False), GaLore(rank=2)
    model, twin = trained(light), trained(kept)
    assert torch.equal(model(batch_at(0).input_ids), twin(batch_at(0).input_ids))
    assert sum(b.numel() for b in model.buffers()) == 0
    assert sum(b.numel() for b in twin.buffers()) == 2 * 12 * 24**2
    with pytest.raises(ValueError, match="keep_base=False kept no copy of the base model"):
        light.undo(model)


def test_a_state_taken_in_the_middle_of_a_run_switches_back_to_it() -> None:
    method = GaLore(rank=2, refresh_every=4)
    early, late = trained(method, steps=6), trained(method)
    expected = early(batch_at(0).input_ids)
    method.load_state_dict(late, method.state_dict(early))
    assert torch.equal(late(batch_at(0).input_ids), expected)
    method.merge(late)
    state = method.state_dict(late)  # P R is not in W twice
    method.unmerge(late)
    assert_same(state, method.state_dict(early))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"refresh_every": 0}, "refresh_every must be a whole number of at least 1, got 0"),
        ({"refresh_every": 1.5}, "refresh_every must be a whole number of at least 1, got 1.5"),
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"targets": ()}, "targets must name at least one layer"),
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        GaLore(**fields)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_refused_and_the_model_stays_as_it_was() -> None:
    from lora_from_scratch.methods.qlora import quantize_model

    quantised = tiny_model()
    quantize_model(quantised)
    for method, model, message in (
        (GaLore(rank=2), quantised, "not made of floating-point numbers"),
        (GaLore(rank=25), tiny_model(), "rank must be between 1 and 24"),
        (GaLore(targets=("c_attn.q",)), tiny_model(), "adapts whole layers"),
    ):
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ValueError, match=message):
            method.adapt(model)
        assert {name: type(module) for name, module in model.named_modules()} == before
