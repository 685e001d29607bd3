"""A model that is compiled or wrapped, before or after it is adapted, stands for the model inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_from_scratch.methods.adapters import Adapter
from lora_from_scratch.methods.bitfit import BitFit
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method, adaptation_of
from lora_from_scratch.methods.prefix_tuning import PrefixTuning
from lora_from_scratch.methods.qlora import QLoRA
from lora_from_scratch.methods.registry import load_adapter
from tests.helpers import tiny_model
from tests.test_method import assert_same, snapshot


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model, backend="eager")  # what is tested is the wrapper and its guards, not the compiler
    assert isinstance(wrapped, nn.Module)
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compile": compiled,
    "both": lambda model: nn.DataParallel(compiled(model)),
}
METHODS: dict[str, Method] = {
    "lora": LoRA(rank=2),
    "qlora": QLoRA(rank=2),
    "adapter": Adapter(width=4),
    "two biases": BitFit(variant="two"),
    "prefix": PrefixTuning(2),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ids() -> Tensor:
    return torch.tensor([[1, 5, 9, 2]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(ids())
        return output


def change(method: Method, model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in method.trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))


def plain(method: Method) -> nn.Module:
    model = tiny_model()
    method.adapt(model)
    change(method, model)
    return model


@pytest.mark.parametrize(
    ("name", "wrapper"), [*((name, "DataParallel") for name in METHODS), ("lora", "compile"), ("adapter", "both")]
)
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_names_files_and_undoing_are_those_of_the_model_inside(
    name: str, wrapper: str, wrapped_first: bool, tmp_path: Path
) -> None:
    method, inside, expected = METHODS[name], tiny_model(), plain(METHODS[name])
    if wrapped_first:
        model = WRAPPERS[wrapper](inside)
        logits(model)  # now it is compiled, if it ever is
        method.adapt(model)
    else:
        method.adapt(inside)
        model = WRAPPERS[wrapper](inside)
    change(method, model)
    assert adaptation_of(model) is adaptation_of(inside)
    assert_same(method.state_dict(model), method.state_dict(expected))
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)
    method.save(model, tmp_path / "wrapped")
    method.save(expected, tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "wrapped" / file.name).read_bytes() == file.read_bytes()
    if method.can_merge:
        before = logits(model)
        assert type(method.merged_copy(model)) is type(inside)
        method.merge(model)
        torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
        method.unmerge(model)
    method.load_state_dict(model, method.state_dict(expected))
    method.undo(model)
    assert_same(snapshot(inside), snapshot(tiny_model()))
    torch.testing.assert_close(logits(model), logits(tiny_model()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wrapper", ["DataParallel", "both"])
def test_an_adapter_is_loaded_into_a_wrapped_model(wrapper: str, tmp_path: Path) -> None:
    method, model = LoRA(rank=2), WRAPPERS[wrapper](tiny_model())
    expected = plain(method)
    method.save(expected, tmp_path)
    assert load_adapter(model, tmp_path) == method
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qlora", "two biases"])
def test_blocks_that_are_compiled_after_adapting_change_no_name(name: str, tmp_path: Path) -> None:
    method, model, expected = METHODS[name], plain(METHODS[name]), plain(METHODS[name])
    blocks = model.get_submodule("transformer.h")
    assert isinstance(blocks, nn.ModuleList)
    for i, block in enumerate(blocks):
        blocks[i] = compiled(block)
    assert_same(method.state_dict(model), method.state_dict(expected))
    method.save(model, tmp_path / "compiled")
    method.save(expected, tmp_path / "plain")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "compiled" / file.name).read_bytes() == file.read_bytes()
    before = logits(model)
    method.merge(model)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=1e-4)
    method.undo(model)
    torch.testing.assert_close(logits(model), logits(tiny_model()), atol=1e-5, rtol=1e-5)


def test_a_model_with_compiled_blocks_is_refused_in_one_line() -> None:
    model = tiny_model()
    model.transformer.h[1] = compiled(model.transformer.h[1])
    with pytest.raises(
        ValueError, match=r"transformer\.h\.1 is compiled or wrapped \(OptimizedModule\); adapt the model first"
    ):
        LoRA(rank=2).adapt(model)
    assert adaptation_of(model) is None
