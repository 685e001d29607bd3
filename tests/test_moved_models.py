"""What a method keeps beside the model follows the model to another dtype and device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_from_scratch.methods.adalora import AdaLoRA
from lora_from_scratch.methods.adapters import Adapter
from lora_from_scratch.methods.bitfit import BitFit
from lora_from_scratch.methods.boft import BOFT
from lora_from_scratch.methods.dora import DoRA
from lora_from_scratch.methods.fourierft import FourierFT
from lora_from_scratch.methods.full_finetuning import FullFineTuning
from lora_from_scratch.methods.galore import GaLore
from lora_from_scratch.methods.glora import GLoRA
from lora_from_scratch.methods.ia3 import IA3
from lora_from_scratch.methods.layernorm_tuning import LayerNormTuning
from lora_from_scratch.methods.llama_adapter import LlamaAdapter
from lora_from_scratch.methods.loftq import LoftQ
from lora_from_scratch.methods.long_lora import LongLoRA
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.lora_fa import LoRAFA
from lora_from_scratch.methods.lora_ga import LoRAGA
from lora_from_scratch.methods.lora_plus import LoRAPlus
from lora_from_scratch.methods.loreft import LoReFT
from lora_from_scratch.methods.lq_lora import LQLoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.mora import MoRA
from lora_from_scratch.methods.multilora import MultiLoRA
from lora_from_scratch.methods.nola import NOLA
from lora_from_scratch.methods.oft import OFT
from lora_from_scratch.methods.pez import PEZ
from lora_from_scratch.methods.pissa import PiSSA
from lora_from_scratch.methods.prefix_tuning import PrefixTuning
from lora_from_scratch.methods.prompt_tuning import PromptTuning
from lora_from_scratch.methods.qa_lora import QALoRA
from lora_from_scratch.methods.qlora import QLoRA
from lora_from_scratch.methods.randlora import RandLoRA
from lora_from_scratch.methods.registry import method_classes
from lora_from_scratch.methods.relora import ReLoRA
from lora_from_scratch.methods.remora import ReMoRA
from lora_from_scratch.methods.spafit import SPAFIT
from lora_from_scratch.methods.tied_lora import TiedLoRA
from lora_from_scratch.methods.vera import VeRA
from lora_from_scratch.quantization.nf4_linear import nf4_layers
from lora_from_scratch.support.linear_layers import weight_of
from tests.any_models import logits_of, model_of
from tests.helpers import tiny_model
from tests.test_method import assert_same

METHODS: dict[str, Method] = {
    "full": FullFineTuning(),
    "galore": GaLore(rank=2),
    "galore, and the rest": GaLore(rank=2, rest=True),
    "lora": LoRA(rank=2, targets="all-linear"),
    "lora on parts": LoRA(rank=2, targets=("c_attn.q", "c_attn.v")),
    "qlora": QLoRA(rank=2, targets=("c_attn",)),
    "qlora, doubly, of everything": QLoRA(rank=2, targets="all-linear", blocksize=32),
    "loftq": LoftQ(rank=2),
    "qa-lora": QALoRA(rank=2, group_size=5),
    "qa-lora, everything in two bits": QALoRA(rank=2, targets="all-linear", bits=2, group_size=8),
    "lq-lora": LQLoRA(rank=2, budget=5),
    "long-lora": LongLoRA(rank=2),
    "lora with parts": LoRA(rank=2, bias="all", modules_to_save=("ln_f",), trainable_token_indices=(1, 3)),
    "dora": DoRA(rank=2, targets="all-linear"),
    "lora-plus": LoRAPlus(rank=2),
    "lora-fa": LoRAFA(rank=2),
    "pissa": PiSSA(rank=2),
    "lora-ga": LoRAGA(rank=2),
    "vera": VeRA(rank=3),
    "tied-lora": TiedLoRA(rank=2),
    "nola": NOLA(rank=2, basis=5),
    "randlora": RandLoRA(rank=3, alpha=3),
    "fourierft": FourierFT(n_frequency=20),
    "adalora": AdaLoRA(rank=3, target_rank=2),
    "multilora": MultiLoRA(rank=2),
    "relora": ReLoRA(rank=2, targets="all-linear"),
    "remora": ReMoRA(rank=2),
    "mora": MoRA(rank=2),
    "glora": GLoRA(rank=2),
    "oft": OFT(block_size=4),
    "oft with one block": OFT(block_size=4, block_share=True),
    "boft": BOFT(block_size=4),
    "ia3": IA3(),
    "layernorm": LayerNormTuning(),
    "adapter": Adapter(width=4),
    "loreft": LoReFT(rank=2, share_weights=False),
    "direft": LoReFT(rank=2, variant="direft", positions="all"),
    "bitfit": BitFit(),
    "two biases": BitFit(variant="two"),
    "spafit": SPAFIT(frozen_layers=0, bias_layers=1, rank=2),
    "prompt": PromptTuning(2),
    "pez": PEZ(2),
    "prefix": PrefixTuning(2),
    "llama-adapter": LlamaAdapter(2, 1),
}
MOVES: dict[str, tuple[torch.dtype, Callable[[nn.Module], object]]] = {
    "to(bfloat16)": (torch.bfloat16, lambda model: model.to(torch.bfloat16)),
    "half": (torch.float16, lambda model: model.half()),
    "double": (torch.float64, lambda model: model.double()),
}
every_method = pytest.mark.parametrize("name", METHODS)
every_move = pytest.mark.parametrize("move", MOVES)
mergeable = pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.can_merge])


def adapted(method: Method, model: nn.Module) -> nn.Module:
    method.adapt(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()}


def ids() -> Tensor:
    return torch.tensor([[1, 5, 9, 2]])


def test_every_method_is_moved_here() -> None:
    assert set(method_classes()) == {method.name for method in METHODS.values()}


@every_move
@pytest.mark.parametrize("merged", [False, True])
@every_method
def test_a_model_that_was_moved_and_is_undone_is_the_base_moved_bit_for_bit(name: str, merged: bool, move: str) -> None:
    method, (dtype, moved) = METHODS[name], MOVES[move]
    if merged and not method.can_merge:
        pytest.skip("cannot be merged")
    model, base = adapted(method, tiny_model()), tiny_model()
    if merged:
        method.merge(model)
    moved(model)
    moved(base)
    method.undo(model)
    assert dtypes(model) == {dtype}
    assert_same(dict(model.named_parameters()), dict(base.named_parameters()))
    assert torch.equal(model(ids()), base(ids()))


@every_move
@mergeable
def test_unmerging_and_loading_after_a_move_give_what_a_move_without_merging_gives(name: str, move: str) -> None:
    method, (dtype, moved) = METHODS[name], MOVES[move]
    model, other = adapted(method, tiny_model()), adapted(method, tiny_model())
    state = method.state_dict(model)
    method.merge(model)
    moved(model)
    moved(other)
    assert dtypes(model) == {dtype}
    assert model(ids()).dtype == dtype
    method.unmerge(model)
    assert_same(model.state_dict(), other.state_dict())
    assert torch.equal(model(ids()), other(ids()))
    method.merge(model)
    assert dtypes(model) == {dtype}
    method.load_state_dict(model, state)
    assert dtypes(model) == {dtype}
    method.unmerge(model)
    assert torch.equal(model(ids()), other(ids()))


@every_move
@mergeable
def test_a_model_that_was_moved_merges_in_its_new_dtype(name: str, move: str) -> None:
    method, (dtype, moved) = METHODS[name], MOVES[move]
    model = adapted(method, tiny_model())
    moved(model)
    plain = method.merged_copy(model)
    assert dtypes(plain) == {dtype}
    assert plain(ids()).dtype == dtype


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("merged", [False, True])
def test_four_bit_layers_without_a_bias_follow_the_model_too(kind: str, merged: bool) -> None:
    method = QLoRA(rank=2, targets="all-linear")
    model: Any = adapted(method, model_of(kind))
    base = model_of(kind).bfloat16()
    if merged:
        method.merge(model)
    model.bfloat16()
    method.unmerge(model)
    for name, layer in nf4_layers(model).items():
        assert weight_of(layer.dense()).dtype == torch.bfloat16, name
    method.undo(model)
    assert dtypes(model) == dtypes(base)
    assert torch.equal(logits_of(model, kind), logits_of(base, kind))


@pytest.mark.parametrize("merged", [False, True])
@every_method
def test_what_is_kept_follows_the_model_to_another_device(name: str, merged: bool) -> None:
    """The meta device: everywhere, and a tensor that stayed behind is seen."""
    method = METHODS[name]
    if merged and not method.can_merge:
        pytest.skip("cannot be merged")
    model = adapted(method, tiny_model())
    if merged:
        method.merge(model)
    model.to("meta")
    method.unmerge(model)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert {layer.weight.device.type for layer in nf4_layers(model).values()} <= {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("merged", [False, True])
@every_method
def test_on_a_gpu_a_model_that_was_moved_and_is_undone_is_the_base(name: str, merged: bool) -> None:
    method = METHODS[name]
    if merged and not method.can_merge:
        pytest.skip("cannot be merged")
    model, base = adapted(method, tiny_model()), tiny_model().cuda()
    if merged:
        method.merge(model)
    model.cuda()
    method.undo(model)
    assert_same(dict(model.named_parameters()), dict(base.named_parameters()))
    assert torch.equal(model(ids().cuda()), base(ids().cuda()))
