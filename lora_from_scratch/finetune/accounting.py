"""What a training step costs in memory: predicted from the shapes, and measured.

Five things fill the memory (Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3, count them so):

    weights       4 bytes a parameter in fp32; 4.127 bits in QLoRA's 4-bit layers
    gradients     4 bytes for each *trained* parameter
    optimiser     8 bytes for each *trained* parameter: AdamW's m and v
    activations   what the forward pass keeps for the backward pass (`tape.py`): with the batch they grow
    transient     logits and loss: about 4 numbers for each token and each word of the vocabulary

A method that trains few parameters does away with gradients and optimiser; the weights stay, and so do most of the
activations. They are not all there at the same time: gradients come as activations go. The peak is the largest of
the moments of a step: the forward pass, the loss, the backward pass through each block, the embeddings, the update.

Hu et al. 2021, section 4.2, for GPT-3 175B with Adam: 1.2 TB of memory for full fine-tuning, 350 GB for LoRA.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_from_scratch.finetune.training import PRECISIONS, TrainingSettings, adamw, autocast
from lora_from_scratch.gpt2.activations import record, record_loss
from lora_from_scratch.gpt2.config import GPT2Config
from lora_from_scratch.gpt2.model import GPT2, Conv1D, next_token_loss
from lora_from_scratch.methods.lora import inject_lora
from lora_from_scratch.methods.method import Method, adaptation_of
from lora_from_scratch.methods.qlora import QLoRA
from lora_from_scratch.quantization.nf4 import NestedAbsmax
from lora_from_scratch.quantization.nf4_linear import NF4Linear, nf4_layers
from lora_from_scratch.quantization.quantized_tensor import NESTED_BLOCKSIZE, QuantizedTensor

UPDATE = "update"  # the moment of the optimiser's step


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes. Each part at its largest; as they are not all there at once, the total is less than the sum."""

    weights: int  # parameters and buffers, and what the method keeps of the base for `undo`
    gradients: int  # of the parameters, at the end of the backward pass
    optimizer: int
    activations: int  # at the end of the forward pass, without the logits
    transient: int  # logits, and what the loss and its derivative need beside them
    moments: Mapping[str, int]  # the most that lives at each moment, in the order of time

    @property
    def total(self) -> int:
        """The peak of the whole step."""
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        """When the peak is: "forward", "loss", "head", "block 5" (of the backward pass), "embeddings" or "update"."""
        return max(self.moments, key=lambda moment: self.moments[moment])


# --- The prediction ------------------------------------------------------------------------------------


def predicted_memory(
    config: GPT2Config,
    method: Method,
    batch_size: int,
    tokens: int,
    *,
    precision: str = "bf16",
    gradient_checkpointing: bool = False,
    padded: bool = False,
    device: str = "cpu",
) -> MemoryBudget:
    """What `method` will need on a GPT-2 of this shape. Nothing of the model's size is allocated.

    Args:
        batch_size, tokens: B texts of T tokens; each token but the first of a text counts in the loss.
        precision: "fp32", or "bf16" for autocast (weights, gradients and optimiser stay in fp32).
        padded: whether batches come with an attention mask.
        device: "cpu" or "cuda", whose kernels keep different things.

    Raises:
        ValueError: the method does not fit the shape, the text does not fit the context, or a number or the
            precision is not one that there is.
    """
    model = blank_model(config, method)
    kept = dense_bytes(config) if isinstance(method, QLoRA) and method.keep_base else 0
    options: dict[str, Any] = {"gradient_checkpointing": gradient_checkpointing, "padded": padded, "device": device}
    budget = memory_of(model, batch_size, tokens, precision=precision, **options)
    moments = {moment: held + kept for moment, held in budget.moments.items()}
    return replace(budget, weights=budget.weights + kept, moments=moments)


def memory_of(
    model: GPT2,
    batch_size: int,
    tokens: int,
    *,
    precision: str = "bf16",
    gradient_checkpointing: bool = False,
    padded: bool = False,
    device: str = "cpu",
) -> MemoryBudget:
    """`predicted_memory` for a model that is there and adapted already, on any device, "meta" included.

    Raises:
        ValueError: as `predicted_memory`; or nothing in the model is trained.
    """
    _check(model, batch_size, tokens, precision)
    weights = sum(storage.nbytes() for storage in _storages(held_tensors(model)))
    learning = trainable_memory(model)
    gradients, optimizer = learning["gradients"], learning["optimizer"]
    tape, logits = record(
        model,
        batch_size,
        tokens,
        autocast=precision == "bf16",
        padded=padded,
        checkpointing=gradient_checkpointing,
        cuda=device == "cuda",
    )
    activations = tape.kept_bytes()
    record_loss(tape, logits)
    moments = {"forward": tape.forward_peak - logits.nbytes}
    for where, held in tape.backward():
        moments[where] = max(held, moments.get(where, 0))
    transient = moments["loss"] - activations + logits.nbytes
    moments = {where: held + weights + optimizer + logits.nbytes for where, held in moments.items()}
    moments[UPDATE] = weights + gradients + optimizer + logits.nbytes  # the loop still holds the logits
    return MemoryBudget(weights, gradients, optimizer, activations, transient, moments)


def trainable_memory(model: nn.Module) -> dict[str, int]:
    """The bytes that training with `torch.optim.AdamW` needs because something is trained: none for what is frozen.

    A parameter with `requires_grad` has a gradient of its own shape and dtype, and in the optimiser m and v, both of
    its shape and dtype as well. Besides, the optimiser counts the steps of each *tensor* in one float32 number.
    A parameter that several modules share is one parameter. Weights and activations are not counted here.

    Returns:
        the bytes of "gradients" and "optimizer", under these names.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    return {"gradients": gradients, "optimizer": 2 * gradients + 4 * len(trained)}


def blank_model(config: GPT2Config, method: Method) -> GPT2:
    """A model of this shape, adapted, on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = GPT2(config)
    if isinstance(method, QLoRA):  # a weight without values cannot be quantised, but its size in 4 bits is known
        dense = {name: m for name, m in model.named_modules() if isinstance(m, Conv1D)}
        inject_lora(model, {name: blank_nf4(layer, method) for name, layer in dense.items()})
        method = replace(method, loftq_iterations=0)
    method.adapt(model)
    return model.train()


def blank_nf4(layer: Conv1D, method: QLoRA) -> NF4Linear:
    """What `NF4Linear.from_layer` makes, without values."""
    n = layer.weight.numel()
    blocks = -(-n // method.blocksize)
    absmax: Tensor | NestedAbsmax = torch.empty(blocks, device="meta")
    if method.double_quantization:
        codes = torch.empty(blocks, dtype=torch.uint8, device="meta")
        second = torch.empty(-(-blocks // NESTED_BLOCKSIZE), device="meta")
        absmax = NestedAbsmax(codes, second, torch.empty((), device="meta"))
    packed = torch.empty(-(-n // 2), 1, dtype=torch.uint8, device="meta")
    shape = torch.Size((layer.out_features, layer.in_features))
    quantized = QuantizedTensor(packed, absmax, method.quant_type, method.blocksize, shape, torch.float32)
    return NF4Linear(quantized, layer.bias)


def dense_bytes(config: GPT2Config) -> int:
    """The weights of the Conv1D of all blocks, in fp32: what QLoRA keeps for `undo`."""
    return 4 * config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * config.mlp_width)


def held_tensors(model: GPT2) -> list[Tensor]:
    """All that the model holds: its own, its 4-bit weights, and what the method remembers of the base."""
    tensors = [*model.parameters(), *model.buffers()]
    for layer in nf4_layers(model).values():
        absmax = layer.quantized.absmax
        tensors += [layer.quantized.packed, *(absmax if isinstance(absmax, NestedAbsmax) else [absmax])]
    record = adaptation_of(model)
    if record is not None:
        tensors += [*record.base.values(), *record.kept.values()]
    return tensors


def _check(model: GPT2, batch_size: int, tokens: int, precision: str) -> None:
    context = model.config.n_positions
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 2 <= tokens <= context:
        raise ValueError(f"tokens must be between 2 and {context} (the room for text), got {tokens}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing is trained: no parameter of the model has requires_grad=True; adapt the model first")


# --- The measurement -----------------------------------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that live, while it is entered.

    Every operation of PyTorch passes through here. The storage of what comes out is counted once, however many
    tensors share it, from now until PyTorch frees it; what autograd keeps is therefore counted as long as it is
    kept. Not counted: tensors from before, memory that a kernel takes and gives back within one operation, and what
    the allocator rounds up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in _storages(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class AllocatedMemory:
    """The same on a GPU, by PyTorch's own allocator; kernels' own memory is counted there."""

    def __enter__(self) -> AllocatedMemory:
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated() - self.before

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() - self.before

    @peak.setter
    def peak(self, value: int) -> None:
        torch.cuda.reset_peak_memory_stats()


def measured_memory(
    config: GPT2Config,
    method: Method,
    batch_size: int,
    tokens: int,
    *,
    precision: str = "bf16",
    gradient_checkpointing: bool = False,
    padded: bool = False,
    device: str = "cpu",
) -> MemoryBudget:
    """What `predicted_memory` predicts, counted in two training steps of a random model (`LiveMemory`).

    The second step counts: then the optimiser has its state. Its moments are "forward", "loss", "backward", "update".
    """
    memory = AllocatedMemory() if device == "cuda" else LiveMemory()
    with memory, torch.device(device):
        model = GPT2(config)
        method.adapt(model)
        _check(model, batch_size, tokens, precision)
        model.train().gradient_checkpointing = gradient_checkpointing
        weights = memory.now
        trained = method.trainable(model)
        optimizer = adamw(trained, TrainingSettings(steps=2, learning_rate=1e-4))
        ids = torch.randint(config.vocab_size, (batch_size, tokens))
        mask = torch.ones_like(ids) if padded else None
        batch = memory.now - weights
        _step(model, ids, mask, optimizer, memory, precision)
        optimizer.zero_grad()
        state = memory.now - weights - batch
        memory.peak = memory.now
        parts = _step(model, ids, mask, optimizer, memory, precision)
        gradients = sum(p.grad.nbytes for p in trained.values() if p.grad is not None)
        moments = {moment: peak - batch for moment, peak in parts["moments"].items()}
    return MemoryBudget(weights, gradients, state, parts["activations"], parts["transient"], moments)


def _step(
    model: GPT2,
    ids: Tensor,
    mask: Tensor | None,
    optimizer: torch.optim.Optimizer,
    memory: LiveMemory | AllocatedMemory,
    precision: str,
) -> dict[str, Any]:
    """Forward, backward, update, as the `Trainer` does them, with a look at the memory in between."""
    moments: dict[str, int] = {}

    def note(moment: str) -> None:
        moments[moment], memory.peak = memory.peak, memory.now

    before = memory.now
    with autocast(ids.device, precision):
        logits = model(ids, attention_mask=mask)
    after = memory.now
    note("forward")
    logits.register_hook(lambda gradient: note("loss"))  # the derivative has come as far as the logits
    next_token_loss(logits, ids).backward()
    note("backward")
    optimizer.step()
    note(UPDATE)
    activations = after - before - logits.nbytes
    return {"activations": activations, "transient": moments["loss"] - before - activations, "moments": moments}


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The memory of these tensors, each piece once."""
    return list({storage._cdata: storage for storage in (t.untyped_storage() for t in tensors)}.values())
