"""Biases, groups of layers and surgical learning rates, against the papers' definitions and their laws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.methods.spafit import SPAFIT, stratify
from lora_from_scratch.methods.surgical import auto_rgn_weights, relative_gradient_norms, surgical_parameter_groups
from torch import Tensor, nn

from lora_from_scratch.finetune.training import Batch, Trainer, TrainingSettings
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.generation import generate
from lora_from_scratch.gpt2.model import GPT2, Conv1D
from lora_from_scratch.methods.bitfit import BitFit, QueryBias, select_biases
from lora_from_scratch.methods.lora import lora_layers
from lora_from_scratch.methods.method import Method, adaptation_of
from tests.helpers import tiny_model
from tests.test_method import assert_same, snapshot

ALL, TWO = BitFit(), BitFit(variant="two")
STRATA = SPAFIT(frozen_layers=1, bias_layers=1, rank=2)
PARTS = SPAFIT(frozen_layers=0, bias_layers=1, rank=2, targets=("c_attn.q", "c_fc"))
every_method = pytest.mark.parametrize("method", [ALL, TWO, STRATA, PARTS], ids=["all", "two", "spafit", "spafit on q"])


def four_layers() -> GPT2:
    return tiny_model(n_layer=4)


def tokens(rows: int = 3, length: int = 10) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(5))


def train(model: GPT2, method: Method, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW(method.trainable(model).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        model(tokens()).log_softmax(-1)[..., 7].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(method: Method) -> GPT2:
    model = four_layers()
    method.adapt(model)
    train(model, method)
    return model


# --- Which biases ----------------------------------------------------------------------------------------


def test_all_biases_are_those_of_every_linear_layer_and_norm() -> None:
    names = [
        "ln_1.bias",
        "attn.c_attn.bias",
        "attn.c_proj.bias",
        "ln_2.bias",
        "mlp.c_fc.bias",
        "mlp.c_proj.bias",
    ]
    expected = [f"transformer.h.{i}.{name}" for i in range(2) for name in names] + ["transformer.ln_f.bias"]
    assert list(select_biases(tiny_model())) == expected
    linear = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, bias=False))
    assert {name: p.shape for name, p in select_biases(linear).items()} == {"0.bias": (4,)}


@pytest.mark.parametrize(("method", "count", "percent"), [(ALL, 133 * 768, 0.08), (TWO, 60 * 768, 0.04)])
def test_on_gpt2_small_bitfit_trains_the_papers_share_of_the_weights(
    method: BitFit, count: int, percent: float
) -> None:
    """Of a block 11 d biases (3 + 1 + 4 + 1 of the layers, 2 of the norms), or d + 4 d of them; and d of ln_f."""
    with torch.device("meta"):
        model = GPT2(GPT2Config())
    total = sum(p.numel() for p in model.parameters())
    method.adapt(model)
    trained_count = sum(p.numel() for p in method.trainable(model).values())
    assert trained_count == count
    assert round(100 * trained_count / total, 2) == percent


def test_the_two_biases_are_the_queries_and_the_middle_of_the_mlp() -> None:
    model = tiny_model()
    TWO.adapt(model)
    assert {name: tuple(p.shape) for name, p in TWO.trainable(model).items()} == {
        f"transformer.h.{i}.{name}": shape
        for i in range(2)
        for name, shape in (("attn.c_attn.bias_q", (24,)), ("mlp.c_fc.bias", (96,)))
    }


def test_of_the_fused_bias_the_queries_third_moves_and_keys_and_values_not_by_one_bit() -> None:
    model, base = four_layers(), four_layers()
    TWO.adapt(model)
    train(model, TWO, steps=20)
    plain = TWO.merged_copy(model)
    for new, old in zip(plain.transformer.h, base.transformer.h, strict=True):
        now, before = new.attn.c_attn.bias, old.attn.c_attn.bias  # type: ignore[union-attr]
        assert (now[:24] != before[:24]).all()  # type: ignore[index]
        assert torch.equal(now[24:], before[24:])  # type: ignore[index]
    x = torch.randn(5, 24)
    layer, old_layer = model.transformer.h[1].attn.c_attn, base.transformer.h[1].attn.c_attn  # type: ignore[union-attr]
    assert torch.equal(layer(x)[:, 24:], old_layer(x)[:, 24:])  # type: ignore[operator]


def test_the_gradient_of_the_learned_part_is_that_part_of_the_gradient_of_the_whole_bias() -> None:
    torch.manual_seed(0)
    plain, base = Conv1D(6, 18), Conv1D(6, 18)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    base.load_state_dict(plain.state_dict())
    layer, x, weighting = QueryBias(base), torch.randn(4, 6), torch.randn(4, 18)
    base.requires_grad_(False)
    assert torch.equal(layer(x), plain(x))
    for module in (layer, plain):
        (module(x).sin() * weighting).sum().backward()
    assert plain.bias.grad is not None
    assert torch.equal(layer.bias_q.grad, plain.bias.grad[:6])  # type: ignore[arg-type]
    assert base.bias.grad is None


# --- The protocol ----------------------------------------------------------------------------------------


@every_method
def test_at_the_start_not_one_bit_of_the_logits_changes(method: Method) -> None:
    model = four_layers()
    before = model(tokens())
    method.adapt(model)
    assert torch.equal(model(tokens()), before)


@every_method
def test_training_moves_what_is_trainable_and_not_one_bit_of_the_rest(method: Method) -> None:
    model = four_layers()
    method.adapt(model)
    before, names = snapshot(model), set(method.trainable(model))
    train(model, method, steps=20)
    assert {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])} == names
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if n not in names)


@every_method
def test_undo_gives_back_the_same_objects_and_bits_merged_or_not(method: Method) -> None:
    for merged in (False, True):
        model = four_layers().train()
        before, modules = snapshot(model), [(name, id(module)) for name, module in model.named_modules()]
        parameters = [(name, id(p)) for name, p in model.named_parameters()]
        method.adapt(model)
        assert all(module.training for module in model.modules())
        train(model, method)
        if merged:
            method.merge(model)
        method.undo(model)
        assert_same(snapshot(model), before)
        assert [(name, id(module)) for name, module in model.named_modules()] == modules
        assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


@every_method
def test_merging_keeps_the_logits_and_unmerging_every_bit(method: Method) -> None:
    model = trained(method)
    before, logits = snapshot(model), model(tokens())
    for _ in range(2):
        method.merge(model)
        method.merge(model)
        torch.testing.assert_close(model(tokens()), logits, atol=1e-4, rtol=1e-4)
        plain = method.merged_copy(model)
        assert plain.state_dict().keys() == four_layers().state_dict().keys()
        torch.testing.assert_close(plain(tokens()), logits, atol=1e-4, rtol=1e-4)
        if isinstance(method, BitFit):  # a bias is a bias wherever it stands
            assert torch.equal(model(tokens()), logits)
            assert torch.equal(plain(tokens()), logits)
        method.unmerge(model)
        assert_same(snapshot(model), before)
        assert torch.equal(model(tokens()), logits)


@every_method
def test_what_is_saved_and_loaded_gives_the_same_logits_bit_for_bit(method: Method, tmp_path: Path) -> None:
    model, twin = trained(method), four_layers()
    method.save(model, tmp_path / "saved")
    assert load_adapter(twin, tmp_path / "saved") == method
    assert torch.equal(twin(tokens()), model(tokens()))
    method.undo(twin)
    assert_same(snapshot(twin), snapshot(four_layers()))


@every_method
def test_a_state_loaded_into_a_merged_model_switches_the_task(method: Method) -> None:
    model = trained(method)
    state, logits = method.state_dict(model), model(tokens())
    train(model, method)
    method.merge(model)
    method.load_state_dict(model, state)
    torch.testing.assert_close(model(tokens()), logits, atol=1e-4, rtol=1e-4)
    method.unmerge(model)
    assert torch.equal(model(tokens()), logits)


@every_method
def test_an_adapted_model_generates_with_a_cache_as_without(method: Method) -> None:
    model, prompts = trained(method), [[1, 2, 3], [4, 5, 6, 7, 8]]
    assert generate(model, prompts, max_new_tokens=8) == generate(model, prompts, max_new_tokens=8, use_cache=False)


# --- SPAFIT ----------------------------------------------------------------------------------------------


def test_strata_are_cut_from_the_input_on() -> None:
    assert stratify(24, 4, 5) == (range(4), range(4, 9), range(9, 24))  # the paper's SPAFIT-4-9 of BERT large
    assert stratify(2, 0, 0) == (range(0), range(0), range(2))


def test_spafit_freezes_the_first_layers_then_trains_biases_then_biases_and_loras() -> None:
    model = four_layers()
    STRATA.adapt(model)
    by_layer: dict[str, set[str]] = {str(i): set() for i in range(4)}
    for name in STRATA.trainable(model):
        assert name.startswith("transformer.h.")  # not the embeddings, not ln_f
        by_layer[name.split(".")[2]].add(name.split(".", 3)[3])
    biases = {"ln_1.bias", "attn.c_attn.bias", "attn.c_proj.bias", "ln_2.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"}
    wrapped = {"attn.c_attn", "attn.c_proj"}
    last = {f"{name[:-5]}.base.bias" if name[:-5] in wrapped else name for name in biases}
    last |= {f"{name}.{factor}" for name in wrapped for factor in ("lora_A", "lora_B")}
    assert by_layer == {"0": set(), "1": biases, "2": last, "3": last}
    PARTS.adapt(other := four_layers())
    assert [(name, layer.parts) for name, layer in lora_layers(other).items() if name.endswith("c_attn")] == [
        (f"transformer.h.{i}.attn.c_attn", ("q",)) for i in (1, 2, 3)
    ]


# --- Surgical fine-tuning --------------------------------------------------------------------------------


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, 61, (2, 8), generator=generator) for _ in range(count)]
    return [Batch(ids, ids, torch.ones_like(ids)) for ids in drawn]


def test_relative_gradient_norms_are_the_mean_over_batches_of_gradient_norm_over_norm() -> None:
    model, two = tiny_model(), batches(2)
    model.transformer.wpe.weight.requires_grad_(False)
    before = snapshot(model)
    norms = relative_gradient_norms(model, two)
    assert all(p.grad is None for p in model.parameters())
    assert_same(snapshot(model), before)
    expected = {name: 0.0 for name, p in model.named_parameters() if p.requires_grad}
    for ids, _, _ in two:
        logits = model(ids).log_softmax(-1)
        model.zero_grad()
        (-logits[:, :-1].gather(-1, ids[:, 1:, None]).mean()).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                expected[name] += float((p.grad.square().sum() / p.detach().square().sum()).sqrt()) / len(two)
    assert norms.keys() == expected.keys()
    assert norms == pytest.approx(expected, rel=1e-4)


def test_the_relative_norm_of_a_tensor_twice_as_large_with_half_the_gradient_is_a_quarter() -> None:
    """W and c W with the input divided by c: the same function, norm times c, gradient divided by c."""

    class Scaled(nn.Module):
        def __init__(self, c: float) -> None:
            super().__init__()
            self.c = c
            self.weight = nn.Parameter(c * torch.linspace(-1, 1, 61 * 61).view(61, 61))

        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.weight[ids] / self.c

    one, two = (relative_gradient_norms(Scaled(c), batches(1))["weight"] for c in (1.0, 2.0))
    assert two == pytest.approx(one / 4, rel=1e-5)


def test_auto_rgn_gives_the_largest_norm_the_whole_learning_rate_and_the_others_their_share() -> None:
    assert auto_rgn_weights({"a": 0.5, "b": 2.0, "c": 0.0}) == {"a": 0.25, "b": 1.0, "c": 0.0}


def test_surgical_groups_train_each_tensor_at_its_own_rate_and_leave_out_the_unnamed() -> None:
    model = tiny_model()
    names = ["transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.bias", "transformer.wpe.weight"]
    groups = surgical_parameter_groups(model, dict(zip(names, (1.0, 0.25, 0.0), strict=True)), 0.01, weight_decay=0.1)
    assert [group["lr"] for group in groups] == [0.01, 0.0025, 0.0]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1]
    before = snapshot(model)
    model(tokens()).log_softmax(-1)[..., 7].mean().neg().backward()
    torch.optim.Adam([{**group, "weight_decay": 0.0} for group in groups]).step()  # the first step of Adam is lr
    moved = {n: float((t - before[n]).abs().max()) for n, t in model.state_dict().items() if not t.equal(before[n])}
    assert moved == pytest.approx({names[0]: 0.01, names[1]: 0.0025}, rel=1e-3)


def test_the_training_loop_takes_surgical_groups() -> None:
    model, data = tiny_model(), batches(1)
    weights = auto_rgn_weights(relative_gradient_norms(model, data))
    optimizer = torch.optim.AdamW(surgical_parameter_groups(model, weights, 1e-2))
    run_settings = TrainingSettings(steps=8, learning_rate=1e-2, precision="fp32")
    trainer = Trainer(model, lambda step: data[0], run_settings, optimizers=[optimizer], progress=False)
    losses = trainer.run().losses
    assert losses[-1] < losses[0]


# --- What is refused -------------------------------------------------------------------------------------


def test_bad_hyperparameters_are_refused_with_the_value_and_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="variant must be one of all, two, got 'three'"):
        BitFit(variant="three")
    for options, message in [
        ({"frozen_layers": -1}, "frozen_layers must be a whole number of at least 0, got -1"),
        ({"bias_layers": -2}, "bias_layers must be a whole number of at least 0, got -2"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"targets": ()}, "targets must name at least one layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            SPAFIT(**options)  # type: ignore[arg-type]
    for method, message in [
        (SPAFIT(frozen_layers=2, bias_layers=2), r"together must be at most 3 \(the model has 4 layers.* got 2 \+ 2"),
        (SPAFIT(targets=("h.0.attn.c_attn",)), "is in the layers 2 to 3, which get LoRAs"),
        (SPAFIT(targets=("q_proj",)), "'q_proj' matches nothing"),
        (SPAFIT(rank=25), "rank must be between 1 and 24"),
    ]:
        model = four_layers()
        before = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=message):
            method.adapt(model)
        assert [name for name, _ in model.named_modules()] == before
        assert all(p.requires_grad for p in model.parameters())
        assert adaptation_of(model) is None


def test_what_cannot_be_measured_or_weighed_is_said_by_name() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="no batch to measure on"):
        relative_gradient_norms(model, [])
    with torch.no_grad():
        model.transformer.ln_f.bias.zero_()
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.bias is all zeros.*requires_grad"):
        relative_gradient_norms(model, batches(1))
    with pytest.raises(ValueError, match="nothing to measure"):
        relative_gradient_norms(model.requires_grad_(False), batches(1))
    for norms, shown in (({}, "none"), ({"a": 0.0}, "a: 0.0"), ({"a": 1.0, "b": float("nan")}, "b: nan")):
        with pytest.raises(ValueError, match=f"one above 0, got {shown}"):
            auto_rgn_weights(norms)
    with pytest.raises(ValueError, match=r"no parameter 'head'; it has names like 'transformer\.wte\.weight'"):
        surgical_parameter_groups(model, {"head": 1.0}, 1e-3)
