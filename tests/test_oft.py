"""OFT: the formula of the paper, what a rotation leaves alone, and where peft differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_from_scratch.gpt2.checkpoint import load_model
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, Conv1D, next_token_loss
from lora_from_scratch.methods.adapter_files import CONFIG_FILE
from lora_from_scratch.methods.lora import LoRALinear
from lora_from_scratch.methods.oft import OFT, OFTLinear, cayley, nearest_divisor, rotate, skew_symmetric
from lora_from_scratch.methods.qlora import quantize_model
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.support.linear_layers import linear_layer, weight_of
from tests.any_models import WIDTH, logits_of, model_of
from tests.helpers import real_checkpoint
from tests.test_peft_format import hugging_face

TARGETS = {"gpt2": ("c_attn", "mlp.c_proj"), "llama": ("q_proj", "down_proj")}


def layer_of(inputs: int, outputs: int, b: int, *, share: bool = False, size: float = 0.5, conv1d: bool = False) -> Any:
    """With whatever might have been learned, in float64."""
    generator = torch.Generator().manual_seed(0)
    base: nn.Module = Conv1D(inputs, outputs) if conv1d else nn.Linear(inputs, outputs)
    layer = OFTLinear(base, b, share).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return layer


def trained(kind: str, method: OFT, size: float = 0.3) -> Any:
    model = model_of(kind)
    method.adapt(model)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


# --- The formula -----------------------------------------------------------------------------------------


def rotation_of_the_paper(entries: Tensor, inputs: int, b: int) -> Tensor:
    """R (in, in), entry by entry: for each block Q = -Q^T and (I + Q) (I - Q)^-1."""
    R = torch.zeros(inputs, inputs, dtype=entries.dtype)
    for block in range(inputs // b):
        learned = iter(entries[block % len(entries)].tolist())  # of a shared block there is one row
        Q = torch.zeros(b, b, dtype=entries.dtype)
        for column in range(b):
            for row in range(column + 1, b):
                Q[row, column] = next(learned)
                Q[column, row] = -Q[row, column]
        eye = torch.eye(b, dtype=entries.dtype)
        place = slice(block * b, (block + 1) * b)
        R[place, place] = (eye + Q) @ torch.inverse(eye - Q)
    return R


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(("b", "share"), [(12, False), (4, False), (3, True), (2, False)])
def test_each_neuron_is_rotated_as_the_paper_says(b: int, share: bool, conv1d: bool) -> None:
    layer = layer_of(12, 5, b, share=share, conv1d=conv1d)
    R = rotation_of_the_paper(layer.oft_R.detach(), 12, b)
    W = weight_of(layer.base).detach()
    rotated = torch.stack([R @ neuron for neuron in W])
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    expected = x @ rotated.T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(torch.block_diag(*layer.rotation()), R)
    layer.merge()
    torch.testing.assert_close(weight_of(layer.base), rotated)
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(weight_of(layer.base), W)


def test_in_the_plane_the_learned_number_is_the_tangent_of_half_the_angle() -> None:
    angle = torch.tensor(0.7, dtype=torch.float64)
    R = cayley(skew_symmetric((angle / 2).tan()[None], 2))
    expected = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    torch.testing.assert_close(R, expected.double())


def test_rotating_a_vector_back_gives_it_again() -> None:
    layer = layer_of(12, 5, 4)
    x, R = torch.randn(3, 12, dtype=torch.float64), layer.rotation()
    torch.testing.assert_close(rotate(rotate(x, R), R.mT), x)
    torch.testing.assert_close(rotate(x[0], R), torch.block_diag(*R) @ x[0])


@given(st.integers(2, 12), st.floats(-4, 3), st.integers(0, 999), st.sampled_from([torch.float32, torch.float64]))
def test_r_is_a_rotation_whatever_is_learned(b: int, exponent: float, seed: int, dtype: torch.dtype) -> None:
    entries = 10**exponent * torch.randn(3, b * (b - 1) // 2, generator=torch.Generator().manual_seed(seed))
    R = cayley(skew_symmetric(entries.to(dtype), b))
    eye = torch.eye(b, dtype=dtype).expand(3, b, b)
    rounding = torch.finfo(dtype).eps * (1 + b * 10**exponent)  # grows with Q, as the condition of I - Q does
    torch.testing.assert_close(R.mT @ R, eye, atol=20 * rounding, rtol=0)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(3, dtype=dtype), atol=1e-3, rtol=0)  # no reflection


def test_r_is_orthogonal_to_rounding_after_training() -> None:
    model = trained("gpt2", OFT(block_size=8))
    optimizer = torch.optim.AdamW(OFT(block_size=8).trainable(model).values(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        logits_of(model, "gpt2").logsumexp(-1).mean().backward()
        optimizer.step()
    for layer in OFT(block_size=8).layers(model).values():
        R = layer.rotation().detach()
        assert float((R - torch.eye(8)).abs().max()) > 0.1
        torch.testing.assert_close(R.mT @ R, torch.eye(8).expand_as(R), atol=1e-5, rtol=0)


# --- What it leaves alone --------------------------------------------------------------------------------


def cosines(W: Tensor) -> Tensor:
    """Between all pairs of neurons, the rows of W."""
    directions = nn.functional.normalize(W, dim=1)
    return directions @ directions.T


def hyperspherical_energy(W: Tensor) -> Tensor:
    """The sum over all pairs of neurons of 1 / (their distance on the unit sphere) (Qiu et al. 2023, section 3.2)."""
    return (1 / torch.pdist(nn.functional.normalize(W, dim=1))).sum()


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(("b", "share"), [(12, False), (4, False), (3, True)])
def test_lengths_angles_energy_and_singular_values_of_the_weight_do_not_change(
    b: int, share: bool, conv1d: bool
) -> None:
    layer = layer_of(12, 7, b, share=share, size=1.0, conv1d=conv1d)
    W = weight_of(layer.base).detach().clone()
    layer.merge()
    rotated = weight_of(layer.base).detach()
    assert float((rotated - W).norm() / W.norm()) > 0.5
    torch.testing.assert_close(rotated.norm(dim=1), W.norm(dim=1))
    torch.testing.assert_close(cosines(rotated), cosines(W))
    torch.testing.assert_close(hyperspherical_energy(rotated), hyperspherical_energy(W))
    torch.testing.assert_close(torch.linalg.svdvals(rotated), torch.linalg.svdvals(W))
    for part, before in zip(rotated.split(b, dim=1), W.split(b, dim=1), strict=True):  # and so for each block
        torch.testing.assert_close(part @ part.T, before @ before.T)


def test_lora_changes_the_angles() -> None:
    lora = LoRALinear(nn.Linear(12, 7), 2).double()
    W = weight_of(lora.base).detach().clone()
    with torch.no_grad():
        lora.lora_B.normal_(generator=torch.Generator().manual_seed(0))
    lora.merge()
    assert float((cosines(weight_of(lora.base).detach()) - cosines(W)).abs().max()) > 0.1


# --- Sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("b", [2, 4, 8])
def test_the_number_of_trained_parameters_is_that_of_the_formula(b: int, share: bool) -> None:
    model, method = model_of("gpt2"), OFT(targets=TARGETS["gpt2"], block_size=b, block_share=share)
    method.adapt(model)
    blocks = 2 * 2 if share else 2 * (WIDTH + 4 * WIDTH) // b  # of two layers in each of two transformer blocks
    assert sum(p.numel() for p in method.trainable(model).values()) == blocks * b * (b - 1) // 2


def test_the_bundled_model_has_166_656_of_them() -> None:
    config = GPT2Config.from_json(real_checkpoint() / "config.json")
    model, method = GPT2(config), OFT()
    method.adapt(model)
    of_a_block = 7 * config.n_embd * 31 // 2  # in (b - 1) / 2 for each layer; in is d three times and 4 d once
    count = sum(p.numel() for p in method.trainable(model).values())
    assert count == config.n_layer * of_a_block == 166_656


def test_a_layer_takes_the_divisor_that_is_nearest_but_never_1() -> None:
    sizes = [(12, 4, 4), (12, 5, 4), (12, 9, 6), (12, 10, 12), (12, 99, 12), (7, 3, 7), (30, 8, 6), (24, 7, 6)]
    for inputs, wanted, expected in sizes:
        assert OFTLinear(nn.Linear(inputs, 3), wanted).block_size == expected, (inputs, wanted)
    with pytest.raises(ValueError, match="0: a layer with a single input cannot be rotated"):
        OFT(targets=("0",)).adapt(nn.Sequential(nn.Linear(1, 3)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 1}, "block_size must be a whole number of at least 2, got 1"),
        ({"block_size": 2.0}, "block_size must be a whole number of at least 2, got 2.0"),
        ({"block_size": True}, "block_size must be a whole number"),
        ({"block_share": 1}, "block_share must be True or False, got 1"),
        ({"targets": ()}, "targets must name at least one layer"),
    ],
)
def test_bad_hyperparameters_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OFT(**fields)


def test_at_the_start_q_has_a_gradient_everywhere() -> None:
    layer = OFTLinear(nn.Linear(8, 5), 4)
    layer(torch.randn(6, 8)).square().sum().backward()
    assert layer.oft_R.grad is not None
    assert layer.oft_R.grad.count_nonzero() == layer.oft_R.numel()


def test_it_rotates_the_inputs_of_a_quantised_layer_and_cannot_be_merged_there() -> None:
    model, method = model_of("llama"), OFT(targets=TARGETS["llama"], block_size=4)
    quantize_model(model)
    before = logits_of(model, "llama")
    method.adapt(model)
    torch.testing.assert_close(logits_of(model, "llama"), before, atol=0, rtol=0)
    logits_of(model, "llama").square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in method.trainable(model).values())
    with pytest.raises(ValueError, match="not made of floating-point numbers"):
        method.merge(model)


# --- peft ------------------------------------------------------------------------------------------------


def with_linear_layers(base: GPT2) -> Any:
    """transformers' GPT-2 with an `nn.Linear` for each Conv1D, which peft's OFT accepts."""
    theirs = hugging_face(base)
    for name, module in list(theirs.named_modules()):
        if type(module).__name__ == "Conv1D":
            theirs.set_submodule(name, linear_layer(nn.Linear, module.weight.T.contiguous(), module.bias))
    return theirs.requires_grad_(True).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fields", [{}, {"block_size": 8, "block_share": True}])
def test_on_the_bundled_gpt2_it_is_pefts_on_a_gpt2_of_linear_layers(fields: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load_model(real_checkpoint()).double()
    model, method = copy.deepcopy(base), OFT(**fields)
    method.adapt(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.copy_(0.03 * torch.randn(parameter.shape, generator=generator).double())
    method.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(with_linear_layers(base), str(tmp_path), is_trainable=True).double().eval()
    tokens = torch.randint(0, base.config.vocab_size, (2, 10), generator=generator)
    logits = model(tokens)
    output = theirs(tokens, labels=tokens)
    assert float((logits - base(tokens)).abs().max()) > 0.1
    torch.testing.assert_close(logits, output.logits, atol=1e-5, rtol=0)
    next_token_loss(logits, tokens).backward()
    output.loss.backward()
    expected = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    assert expected.keys() == method.trainable(model).keys()
    for name, parameter in method.trainable(model).items():
        largest = float(expected[name].abs().max())
        assert largest > 0
        torch.testing.assert_close(parameter.grad, expected[name], atol=min(1e-5, 1e-3 * largest), rtol=0)


def test_peft_refuses_the_conv1d_of_gpt2() -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match="Conv1D"):
        peft.get_peft_model(model_of("gpt2"), peft.OFTConfig(target_modules=["c_attn"], oft_block_size=4))
    model = trained("gpt2", OFT(targets=("c_attn",), block_size=4))
    assert not torch.allclose(logits_of(model, "gpt2"), logits_of(model_of("gpt2"), "gpt2"), atol=1e-2)


def test_block_sizes_are_adjusted_as_in_peft() -> None:
    layer = pytest.importorskip("peft.tuners.oft.layer").OFTLayer(nn.Linear(2, 2))
    for number in range(1, 60):
        for wanted in range(1, 70):
            assert nearest_divisor(number, wanted) == layer.adjust_oft_parameters(number, wanted)


def written_by_peft(directory: Path, targets: list[str] | None = None, **fields: Any) -> Any:
    """peft's model, with everything learned at random, and its directory."""
    peft = pytest.importorskip("peft")
    config = peft.OFTConfig(target_modules=targets or ["q_proj", "down_proj"], **fields)
    theirs = peft.get_peft_model(model_of("llama"), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(directory)
    return theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_a_number_of_blocks_is_read_as_the_size_that_it_makes(blocks: int, tmp_path: Path) -> None:
    fields = {"r": blocks, "oft_block_size": 0, "use_cayley_neumann": False}
    theirs = written_by_peft(tmp_path, ["q_proj", "up_proj"], **fields)
    back = model_of("llama")
    method = load_adapter(back, tmp_path)
    assert isinstance(method, OFT)
    assert method.block_size == {1: 16, 3: 8, 4: 4}[blocks]  # peft makes 2 blocks of 3
    torch.testing.assert_close(logits_of(back, "llama"), logits_of(theirs, "llama"), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"oft_block_size": 8}, "use_cayley_neumann=True, with which .* R is not orthogonal; supported: False$"),
        ({"oft_block_size": 8, "use_cayley_neumann": False, "coft": True}, "coft=True, which is not supported"),
        ({"oft_block_size": 8, "use_cayley_neumann": False, "bias": "all"}, "bias='all', which is not supported"),
        ({"r": 4, "oft_block_size": 0, "use_cayley_neumann": False}, "r=4, which makes blocks of 4, 6 in layers"),
        ({"oft_block_size": 8, "use_cayley_neumann": False, "modules_to_save": ["lm_head"]}, "modules_to_save="),
    ],
)
def test_what_is_not_exactly_ours_is_refused_by_name(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    written_by_peft(tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model_of("llama"), tmp_path)
    assert "\n" not in str(error.value)


def test_pefts_default_is_not_orthogonal() -> None:
    module = pytest.importorskip("peft.tuners.oft.layer").OFTRotationModule
    entries = 0.2 * torch.randn(2, 28, generator=torch.Generator().manual_seed(0))
    errors = {}
    for series in (True, False):
        rotation = module(2, 28, 8, 16, use_cayley_neumann=series)
        rotation.weight.data = entries
        R = rotation.get_weight().detach()
        errors[series] = float((R.T @ R - torch.eye(16)).abs().max())
    assert errors[False] < 1e-5
    assert errors[True] > 0.01


@pytest.mark.filterwarnings("ignore")
def test_peft_never_applies_its_dropout_so_that_an_adapter_with_it_is_read(tmp_path: Path) -> None:
    theirs = written_by_peft(tmp_path, oft_block_size=8, use_cayley_neumann=False, module_dropout=0.9)
    back = model_of("llama")
    load_adapter(back, tmp_path)
    torch.testing.assert_close(logits_of(back, "llama"), logits_of(theirs, "llama"), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(back.train(), "llama"), logits_of(theirs.train(), "llama"))


def test_the_directory_says_that_the_inverse_is_exact(tmp_path: Path) -> None:
    method = OFT(targets=TARGETS["gpt2"], block_size=4)
    method.save(trained("gpt2", method), tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (config["peft_type"], config["oft_block_size"], config["use_cayley_neumann"]) == ("OFT", 4, False)
