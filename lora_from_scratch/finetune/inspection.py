"""What a model consists of, and what a method would cost on it, without its weights.

The model is built from its configuration with fake tensors (`FakeTensorMode`), which have a shape, a dtype and a device
but no memory. PyTorch then runs a training step on them: it counts the matrix products as it would for a real one, and
shows which tensors it would keep for the backward pass. The sizes on disk are read from the headers of the files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lora_from_scratch.finetune.accounting import trainable_memory
from lora_from_scratch.finetune.training import autocast
from lora_from_scratch.gpt2.checkpoint import weight_files
from lora_from_scratch.gpt2.model import GPT2
from lora_from_scratch.methods.method import Method, adaptation_of
from lora_from_scratch.models.checkpoint import blank_model, find_model
from lora_from_scratch.models.transformers_model import TransformersModel
from lora_from_scratch.quantization.nf4 import NestedAbsmax
from lora_from_scratch.quantization.nf4_linear import nf4_layers
from lora_from_scratch.support.linear_layers import in_and_out, is_linear
from lora_from_scratch.support.wrapped import unwrapped

EVERYTHING_ELSE = "everything else"


@dataclass(frozen=True)
class LayerKind:
    """The linear layers of the same name and size in all blocks, or everything that is in no linear layer."""

    name: str  # with (n) for the number of a block
    count: int
    size: tuple[int, int] | None  # in, out
    parameters: int  # weights and biases of all of them; a tensor that is shared counts where it comes first
    trained: int  # by the method, in or at these layers


@dataclass(frozen=True)
class Cost:
    """Bytes and work of training with a method. Where the model is no language model, what needs a batch is None."""

    trained: int  # parameters
    saved_bytes: int  # of the tensors that are saved
    weights: int  # bytes of parameters, buffers and 4-bit codes during training
    gradients: int
    optimizer: int
    activations: int | None  # bytes kept from the forward pass for the backward pass, the logits included
    forward: int | None  # multiply-adds in matrix products
    step: int | None  # the same, forward and backward


@dataclass(frozen=True)
class Files:
    """The weight files of a model."""

    names: tuple[str, ...]
    bytes: int
    dtypes: dict[str, int]  # number of parameters of each dtype; empty if the files have no readable header


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found."""

    kind: str  # the class of the model
    parameters: int
    tokens: int  # of each text of a training step
    layers: list[LayerKind]
    base_forward: int | None  # multiply-adds of the model as it is
    costs: dict[str, Cost]  # by the name of the method, full fine-tuning first
    files: Files


def inspect_model(
    source: str | Path, methods: Iterable[Method], batch_size: int = 8, tokens: int = 128, precision: str = "bf16"
) -> Inspection:
    """Describe a model and the costs of methods on it, from its configuration and the headers of its files.

    Args:
        source: "bundled", "smollm2", a directory, or a GPT-2 on the hub.
        methods: the trained parameters of the last one are listed by layer.
        batch_size, tokens: of a training step; a text is no longer than the model's context.
        precision: "fp32", or "bf16" for autocast; parameters, gradients and optimiser are in fp32.

    Raises:
        OSError, ValueError: the model cannot be read, a method does not fit it, or a number is out of range.
    """
    if batch_size < 1 or tokens < 2:
        raise ValueError(f"batch_size must be at least 1 and tokens at least 2, got {batch_size} and {tokens}")
    with _without_values():
        plain = blank_model(source)
        inside = unwrapped(plain)
        if isinstance(plain, GPT2 | TransformersModel):
            tokens = min(tokens, plain.config.n_positions)
        parameters = sum(p.numel() for p in inside.parameters())
        base_forward, _ = _multiply_adds(plain, batch_size, tokens)
        costs: dict[str, Cost] = {}
        for method in methods:
            model = blank_model(source)
            method.adapt_blank(model)
            costs[method.name] = _cost(model, batch_size, tokens, precision)
    names = {} if adaptation_of(model) is None else dict(unwrapped(model).named_parameters())
    layers = layer_kinds(inside, {name: p for name, p in names.items() if p.requires_grad})
    return Inspection(type(inside).__name__, parameters, tokens, layers, base_forward, costs, read_headers(source))


def layer_kinds(model: nn.Module, trained: dict[str, nn.Parameter]) -> list[LayerKind]:
    """The linear layers of a plain model, those of all blocks together.

    Args:
        trained: the trained parameters by their names in the adapted model.
    """
    seen: set[int] = set()
    kinds: dict[tuple[str, tuple[int, int] | None], list[int]] = {}  # count, parameters, trained
    left = dict(trained)

    def add(name: str, size: tuple[int, int] | None, own: Iterable[nn.Parameter], learned: Iterable[Tensor]) -> None:
        new = {id(p): p.numel() for p in own if id(p) not in seen}
        seen.update(new)
        row = kinds.setdefault((name, size), [0, 0, 0])
        row[0] += 1
        row[1] += sum(new.values())
        row[2] += sum(p.numel() for p in learned)

    for name, layer in model.named_modules():
        if is_linear(layer):
            mine = [left.pop(full) for full in list(left) if full.startswith(f"{name}.")]
            add(re.sub(r"(?<![^.])\d+(?=\.|$)", "(n)", name), in_and_out(layer), layer.parameters(), mine)
    add(EVERYTHING_ELSE, None, model.parameters(), left.values())
    return [LayerKind(name, row[0], size, row[1], row[2]) for (name, size), row in kinds.items()]


def read_headers(source: str | Path) -> Files:
    """The names, the size and the dtypes of a model's weight files, of which only the headers are read.

    Raises:
        ValueError: a header is damaged.
    """
    found = find_model(source)
    files = [found.directory / found.gguf] if found.gguf else weight_files(found.directory)
    dtypes: Counter[str] = Counter()
    for file in files:
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    part = tensors.get_slice(name)
                    dtypes[part.get_dtype()] += math.prod(part.get_shape())
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or truncated: {error}") from None
    return Files(tuple(file.name for file in files), sum(file.stat().st_size for file in files), dict(dtypes))


# --- On fake tensors ------------------------------------------------------------------------------------------


@contextmanager
def _without_values() -> Iterator[None]:
    """Make every tensor a fake one.

    Two functions of PyTorch fail on fake tensors, and do nothing here: `nn.init.trunc_normal_` looks at values, to draw
    again what is too large, and `nn.Module.to` would only move modules to the CPU, where they are.
    """
    draw, move = nn.init._no_grad_trunc_normal_, nn.Module.to
    nn.init._no_grad_trunc_normal_ = lambda tensor, *rest, **more: tensor
    nn.Module.to = lambda module, *rest, **more: module  # type: ignore[method-assign, assignment]
    try:
        with FakeTensorMode():
            yield
    finally:
        nn.init._no_grad_trunc_normal_ = draw
        nn.Module.to = move  # type: ignore[method-assign]


def _cost(model: nn.Module, batch_size: int, tokens: int, precision: str) -> Cost:
    record = adaptation_of(model)
    assert record is not None
    method = record.method
    inside = unwrapped(model)
    saved = list(inside.parameters() if method.saves_model else method.to_adapter(inside)[1].values())
    memory = trainable_memory(inside)
    forward, step = _multiply_adds(model, batch_size, tokens)
    return Cost(
        trained=sum(p.numel() for p in method.trainable(model).values()),
        saved_bytes=sum(t.numel() * t.element_size() for t in saved),
        weights=_bytes(_weights(inside)),
        gradients=memory["gradients"],
        optimizer=memory["optimizer"],
        activations=_kept_for_backward(model, batch_size, tokens, precision),
        forward=forward,
        step=step,
    )


def _weights(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and 4-bit codes."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for layer in nf4_layers(model).values():
        absmax = layer.quantized.absmax
        tensors += [layer.quantized.packed, *(absmax if isinstance(absmax, NestedAbsmax) else [absmax])]
    return tensors


def _kept_for_backward(model: nn.Module, batch_size: int, tokens: int, precision: str) -> int | None:
    """The bytes that the forward pass keeps for the backward pass; None for a model that takes no token ids."""
    if not isinstance(model, GPT2 | TransformersModel):
        return None
    ids = torch.zeros(batch_size, tokens, dtype=torch.long)
    held = {t.untyped_storage()._cdata for t in [*_weights(model), ids]}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = tensor  # which also keeps the storage, so that its number is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast(ids.device, precision):
        logits = model.train()(ids)
    return _bytes([*kept.values(), logits])


def _multiply_adds(model: nn.Module, batch_size: int, tokens: int) -> tuple[int | None, int | None]:
    """Of the forward pass, and of the whole step; None for a model that takes no token ids.

    Attention is computed by its two matrix products, since PyTorch does not count its fused kernel for CPUs.
    """
    if not isinstance(model, GPT2 | TransformersModel):
        return None, None
    ids = torch.zeros(batch_size, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model.train()(ids)
        forward = counter.get_total_flops()
        if logits.requires_grad:
            logits.sum().backward()  # instead of a loss, which has no matrix products
    return forward // 2, counter.get_total_flops() // 2


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of these tensors, each once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
