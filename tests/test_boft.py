"""BOFT: the product of butterfly factors, what it leaves alone, and the same numbers as peft's."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_from_scratch.gpt2.checkpoint import load_model
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, Conv1D, next_token_loss
from lora_from_scratch.methods.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from lora_from_scratch.methods.boft import BOFT, BOFTLinear, butterfly
from lora_from_scratch.methods.oft import OFTLinear
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.support.linear_layers import weight_of
from tests.any_models import WIDTH, logits_of, model_of, weighted_mean
from tests.helpers import real_checkpoint
from tests.test_oft import cosines, rotation_of_the_paper, with_linear_layers

SHAPES = [(8, 2), (4, 3), (2, 4), (6, 1), (4, 1)]  # b and m, for 48 inputs


def layer_of(b: int, m: int, *, conv1d: bool = False, size: float = 0.5) -> Any:
    """With whatever might have been learned, in float64: 48 inputs, 7 outputs."""
    generator = torch.Generator().manual_seed(0)
    base: nn.Module = Conv1D(48, 7) if conv1d else nn.Linear(48, 7)
    layer = BOFTLinear(base, b, m).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return layer


# --- The formula -----------------------------------------------------------------------------------------


def factor_of_the_paper(D: Tensor, b: int, i: int) -> Tensor:
    """B_i = P D P^T entry by entry, i from 1: block j of D acts on two segments that are 2^(i - 1) segments apart."""
    half, distance = b // 2, 2 ** (i - 1)
    lower = (
        [s for s in range(len(D) // half) if s % (2 * distance) < distance] if i > 1 else range(0, len(D) // half, 2)
    )
    places = [
        [place for s in (first, first + distance) for place in range(s * half, (s + 1) * half)] for first in lower
    ]
    B = torch.zeros_like(D)
    for block, where in enumerate(places):
        inside = slice(block * b, (block + 1) * b)
        B[torch.tensor(where)[:, None], torch.tensor(where)] = D[inside, inside]
    return B


def whole_rotation(layer: Any) -> Tensor:
    """R (in, in) = B_m ... B_2 B_1."""
    R = torch.eye(48, dtype=torch.float64)
    for i, entries in enumerate(layer.boft_R.detach(), start=1):
        D = rotation_of_the_paper(entries, 48, layer.block_size)
        R = (factor_of_the_paper(D, layer.block_size, i) if layer.factors > 1 else D) @ R
    return R


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(("b", "m"), SHAPES)
def test_each_neuron_is_turned_by_the_product_of_the_paper_and_rescaled(b: int, m: int, conv1d: bool) -> None:
    layer = layer_of(b, m, conv1d=conv1d)
    W, R, s = weight_of(layer.base).detach(), whole_rotation(layer), layer.boft_s.detach()
    changed = torch.stack([length * (R @ neuron) for length, neuron in zip(s, W, strict=True)])
    x = torch.randn(2, 3, 48, dtype=torch.float64)
    expected = x @ changed.T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(weight_of(layer.base), changed)
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(weight_of(layer.base), W)


def test_a_factor_joins_segments_at_its_distance() -> None:
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).expand(4, 2, 2)  # of the two numbers in each block
    x = torch.arange(8.0)
    assert butterfly(x, swap, 1).tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    assert butterfly(x, swap, 2).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert butterfly(x, swap, 4).tolist() == [4, 5, 6, 7, 0, 1, 2, 3]


@pytest.mark.parametrize(("b", "m"), SHAPES)
def test_r_is_orthogonal_and_each_input_meets_as_many_others_as_the_product_allows(b: int, m: int) -> None:
    layer = layer_of(b, m, size=1.0)
    R = layer.turn(torch.eye(48, dtype=torch.float64)).T.detach()  # of the unit vectors, one a row
    torch.testing.assert_close(R, whole_rotation(layer))
    torch.testing.assert_close(R.T @ R, torch.eye(48, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.turn(layer.turn(R), back=True), R)
    assert set((R.abs() > 1e-9).sum(dim=1).tolist()) == {b * 2 ** (m - 1)}


@pytest.mark.parametrize(("b", "m"), SHAPES)
def test_the_angles_between_neurons_do_not_change_and_without_the_lengths_nor_do_singular_values(
    b: int, m: int
) -> None:
    layer = layer_of(b, m, size=1.0)
    layer.boft_s.data.abs_()
    W = weight_of(layer.base).detach().clone()
    layer.merge()
    changed = weight_of(layer.base).detach()
    assert float((changed - W).norm() / W.norm()) > 0.5
    torch.testing.assert_close(cosines(changed), cosines(W))
    torch.testing.assert_close(changed.norm(dim=1), W.norm(dim=1) * layer.boft_s.detach().flatten())
    torch.testing.assert_close(torch.linalg.svdvals(changed / layer.boft_s.detach()), torch.linalg.svdvals(W))


def test_with_one_factor_it_is_oft() -> None:
    boft = layer_of(6, 1)
    oft: Any = OFTLinear(boft.base, 6).double()
    with torch.no_grad():
        oft.oft_R.copy_(boft.boft_R[0])
        boft.boft_s.fill_(1)
    x = torch.randn(5, 48, dtype=torch.float64)
    torch.testing.assert_close(boft(x), oft(x))


# --- Sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("b", "m"), [(4, 2), (2, 3), (8, 1)])
def test_the_number_of_trained_parameters_is_that_of_the_formula(b: int, m: int) -> None:
    model, method = model_of("gpt2"), BOFT(targets=("c_attn",), block_size=b, factors=m)
    method.adapt(model)
    count = sum(p.numel() for p in method.trainable(model).values())
    assert count == 2 * (m * (b - 1) * WIDTH // 2 + 3 * WIDTH)  # two layers


def test_the_bundled_model_has_89_088_of_them() -> None:
    config = GPT2Config.from_json(real_checkpoint() / "config.json")
    model, method = GPT2(config), BOFT()
    method.adapt(model)
    d, layers = config.n_embd, config.n_layer
    count = sum(p.numel() for p in method.trainable(model).values())
    assert count == layers * (7 * 7 * d + 9 * d) == 89_088


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 1}, "block_size must be a whole number of at least 2, got 1"),
        ({"factors": 0}, "factors must be a whole number of at least 1, got 0"),
        ({"factors": True}, "factors must be a whole number"),
    ],
)
def test_bad_hyperparameters_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BOFT(**fields)


@pytest.mark.parametrize(("b", "m"), [(5, 1), (16, 2), (3, 2)])
def test_what_does_not_fit_a_layer_is_refused_and_the_model_stays_as_it_was(b: int, m: int) -> None:
    model = model_of("mlp")
    with pytest.raises(ValueError, match=f"^0: block_size {b} and {m} factors do not fit 12 inputs"):
        BOFT(targets=("0",), block_size=b, factors=m).adapt(model)
    assert all(p.requires_grad for p in model.parameters())


# --- peft ------------------------------------------------------------------------------------------------


class BlockDiagonal:
    """In place of peft's CUDA code, without which it uses one factor: blocks (m, k, b, b) to (m, k b, k b)."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*each) for each in blocks])]

    @staticmethod
    def backward(gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        b = blocks.shape[-1]
        places = [slice(j * b, (j + 1) * b) for j in range(blocks.shape[1])]
        return [torch.stack([gradient[:, place, place] for place in places], dim=1)]


@pytest.fixture
def peft(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: BlockDiagonal)
    return module


def shift(model: Any, size: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=size)


def gradients_of_peft(theirs: Any) -> dict[str, Tensor]:
    """By our names: of a number above the diagonal, which moves the one below it too, twice peft's."""
    found = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".default")
            gradient = parameter.grad
            if name.endswith("boft_R"):
                row, column = torch.triu_indices(gradient.shape[-2], gradient.shape[-1], offset=1)
                gradient = 2 * gradient[..., row, column]
            found[name] = gradient
    return found


def assert_same_gradients(method: BOFT, model: Any, theirs: Any) -> None:
    expected = gradients_of_peft(theirs)
    assert expected.keys() == method.trainable(model).keys()
    for name, parameter in method.trainable(model).items():
        assert expected[name].any()
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "targets"), [("llama", ("q_proj", "down_proj")), ("vit", ("q_proj", "fc1"))])
@pytest.mark.parametrize(("b", "m"), [(4, 2), (2, 3), (8, 1)])
def test_logits_and_gradients_equal_pefts_and_adapters_travel_both_ways(
    kind: str, targets: tuple[str, ...], b: int, m: int, peft: Any, tmp_path: Path
) -> None:
    method, model = BOFT(targets=targets, block_size=b, factors=m), model_of(kind)
    method.adapt(model)
    shift(model)
    method.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(model_of(kind), str(tmp_path / "ours"), is_trainable=True).eval()
    assert not torch.allclose(logits_of(model, kind), logits_of(model_of(kind), kind), atol=1e-2)
    for each in (model, theirs):
        weighted_mean(logits_of(each, kind)).backward()
    torch.testing.assert_close(logits_of(model, kind), logits_of(theirs, kind), atol=1e-5, rtol=1e-5)
    assert_same_gradients(method, model, theirs)

    fields = {"target_modules": list(targets), "boft_block_size": b, "boft_n_butterfly_factor": m}
    theirs = peft.get_peft_model(model_of(kind), peft.BOFTConfig(**fields)).eval()
    shift(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    back = model_of(kind)
    read = load_adapter(back, tmp_path / "theirs")
    assert isinstance(read, BOFT)
    assert (read.block_size, read.factors) == (b, m)
    for each in (back, theirs):
        weighted_mean(logits_of(each, kind)).backward()
    torch.testing.assert_close(logits_of(back, kind), logits_of(theirs, kind), atol=1e-5, rtol=1e-5)
    assert_same_gradients(read, back, theirs)


@pytest.mark.filterwarnings("ignore")
def test_on_the_bundled_gpt2_it_is_pefts_on_a_gpt2_of_linear_layers(peft: Any, tmp_path: Path) -> None:
    base = load_model(real_checkpoint()).double()
    model, method = copy.deepcopy(base), BOFT(targets=("c_attn",))
    method.adapt(model)
    shift(model, 0.03)
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.copy_(parameter.float())  # which is what peft reads
    method.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(with_linear_layers(base), str(tmp_path), is_trainable=True).double().eval()
    tokens = torch.randint(0, base.config.vocab_size, (2, 10), generator=torch.Generator().manual_seed(1))
    logits, output = model(tokens), theirs(tokens, labels=tokens)
    assert float((logits - base(tokens)).abs().max()) > 0.1
    torch.testing.assert_close(logits, output.logits, atol=1e-5, rtol=0)
    next_token_loss(logits, tokens).backward()
    output.loss.backward()
    assert_same_gradients(method, model, theirs)


def test_peft_refuses_the_conv1d_of_gpt2(peft: Any) -> None:
    with pytest.raises(TypeError, match="Conv1D"):
        peft.get_peft_model(model_of("gpt2"), peft.BOFTConfig(target_modules=["c_attn"], boft_block_size=4))


@pytest.mark.filterwarnings("ignore")
def test_without_its_cuda_code_peft_has_one_factor_whatever_is_asked_for_and_that_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    config = peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4, boft_n_butterfly_factor=2)
    theirs = peft.get_peft_model(model_of("llama"), config).eval()
    shift(theirs)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["boft_n_butterfly_factor"] == 2
    back = model_of("llama")
    read = load_adapter(back, tmp_path)
    assert isinstance(read, BOFT)
    assert read.factors == 1
    torch.testing.assert_close(logits_of(back, "llama"), logits_of(theirs, "llama"), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_number_of_blocks_is_read_as_the_size_that_it_makes(peft: Any, tmp_path: Path) -> None:
    fields = {"boft_block_num": 4, "boft_block_size": 0, "boft_n_butterfly_factor": 2}
    theirs = peft.get_peft_model(model_of("llama"), peft.BOFTConfig(target_modules=["q_proj", "up_proj"], **fields))
    shift(theirs)
    theirs.eval().save_pretrained(tmp_path)
    back = model_of("llama")
    read = load_adapter(back, tmp_path)
    assert isinstance(read, BOFT)
    assert read.block_size == 4
    torch.testing.assert_close(logits_of(back, "llama"), logits_of(theirs, "llama"), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boft_dropout": 0.1}, "boft_dropout=0.1, which is not supported"),
        ({"bias": "boft_only"}, "bias='boft_only', which is not supported"),
        ({"boft_block_size": 0, "boft_block_num": 4}, "boft_block_num=4, which makes blocks of 4, 6 in layers"),
    ],
)
def test_what_is_not_exactly_ours_is_refused_by_name(
    fields: dict[str, Any], message: str, peft: Any, tmp_path: Path
) -> None:
    config = peft.BOFTConfig(target_modules=["q_proj", "down_proj"], **fields)
    peft.get_peft_model(model_of("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model_of("llama"), tmp_path)
    assert "\n" not in str(error.value)


def test_the_file_holds_skew_symmetric_matrices_as_peft_wants_them(tmp_path: Path) -> None:
    model, method = model_of("gpt2"), BOFT(targets=("c_attn",), block_size=4)
    method.adapt(model)
    shift(model)
    method.save(model, tmp_path)
    for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items():
        if name.endswith("boft_R"):
            assert math.prod(tensor.shape) == 2 * WIDTH * 4
            assert tensor.any()
            assert torch.equal(tensor, -tensor.mT)
