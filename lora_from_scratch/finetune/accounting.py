"""The memory of a training step: predicted from the shapes, and measured.

It has five parts (following Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, section 3):

    weights       4 bytes per parameter in fp32; 4.127 bits in QLoRA's 4-bit layers
    gradients     4 bytes per *trained* parameter
    optimiser     8 bytes per *trained* parameter: AdamW's m and v
    activations   what the forward pass keeps for the backward pass (`tape.py`); grows with the batch
    transient     logits and loss: about 4 numbers per token and entry of the vocabulary

A method that trains few parameters saves most of the gradients and the optimiser's state; the weights and most of the
activations remain. The parts do not all exist at the same time: gradients are added while activations are freed. The
peak is the largest of several moments: the forward pass, the loss, the backward pass through each block and through
the embeddings, and the update.

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
from lora_from_scratch.gpt2.model import GPT2, next_token_loss
from lora_from_scratch.methods.method import Method, adaptation_of
from lora_from_scratch.quantization.nf4_linear import quantized_layers

UPDATE = "update"  # the moment of the optimiser's step


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of each part at its largest. They do not all exist at once, so the total is less than their sum."""

    weights: int  # parameters, buffers, and what the method keeps of the base model for `undo`
    gradients: int  # of the parameters, at the end of the backward pass
    optimizer: int
    activations: int  # at the end of the forward pass, without the logits
    transient: int  # logits, and what the loss and its derivative need in addition
    moments: Mapping[str, int]  # the peak at each moment, in chronological order

    @property
    def total(self) -> int:
        """The peak of the whole step."""
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        """The moment of the peak: "forward", "loss", "head", "block 5" (backward pass), "embeddings" or "update"."""
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
    """Predict the memory that `method` needs on a GPT-2 of this shape, without allocating a model.

    Args:
        batch_size, tokens: B texts of T tokens; every token except the first of a text counts in the loss.
        precision: "fp32", or "bf16" for autocast (weights, gradients and optimiser state stay in fp32).
        padded: whether batches come with an attention mask.
        device: "cpu" or "cuda", whose kernels keep different tensors.

    Raises:
        ValueError: the method does not fit the shape, the text does not fit the context, a number is out of range, or
            the precision is unknown.
    """
    model = method.blank_model(config).train()
    kept = method.bytes_for_undo(config)
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
    """`predicted_memory` for an existing, adapted model, on any device, "meta" included.

    Raises:
        ValueError: as for `predicted_memory`, or nothing in the model is trained.
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
    """The bytes of gradients and optimiser state when training with `torch.optim.AdamW`. Frozen parameters need none.

    A parameter with `requires_grad` has a gradient of its own shape and dtype, and m and v in the optimiser, both also
    of its shape and dtype. In addition, the optimiser counts the steps of each *tensor* in one float32 number. A
    parameter shared by several modules counts once. Weights and activations are not counted here.

    Returns:
        a dictionary with the bytes of "gradients" and "optimizer".
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    return {"gradients": gradients, "optimizer": 2 * gradients + 4 * len(trained)}


def held_tensors(model: GPT2) -> list[Tensor]:
    """All tensors that the model holds: its own, its quantised weights, and what the method keeps of the base model."""
    tensors = [*model.parameters(), *model.buffers()]
    for layer in quantized_layers(model).values():
        tensors += layer.quantized.tensors()
    record = adaptation_of(model)
    if record is not None:
        tensors += [*record.base.values(), *record.kept.values()]
    return tensors


def _check(model: GPT2, batch_size: int, tokens: int, precision: str) -> None:
    context = model.config.n_positions
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 2 <= tokens <= context:
        raise ValueError(f"tokens must be between 2 and {context} (the model's context), got {tokens}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing is trained: no parameter of the model has requires_grad=True; adapt the model first")


# --- The measurement -----------------------------------------------------------------------------------


class LiveMemory(TorchDispatchMode):
    """A context manager that counts the bytes of all live tensors.

    It intercepts every PyTorch operation. The storage of each result is counted once, however many tensors share it,
    until PyTorch frees it; tensors that autograd keeps are therefore counted as long as they are kept. Not counted:
    tensors created earlier, memory that a kernel allocates and frees within one operation, and the allocator's
    rounding.
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
    """The same on a GPU, using PyTorch's own allocator; it also counts the temporary memory of kernels."""

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
    """Measure what `predicted_memory` predicts, in two training steps of a random model (`LiveMemory`).

    The second step is reported, since the optimiser then has its state. The moments are "forward", "loss", "backward"
    and "update".
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
    """Forward, backward, update, as in the `Trainer`, with memory readings in between."""
    moments: dict[str, int] = {}

    def note(moment: str) -> None:
        moments[moment], memory.peak = memory.peak, memory.now

    before = memory.now
    with autocast(ids.device, precision):
        logits = model(ids, attention_mask=mask)
    after = memory.now
    note("forward")
    logits.register_hook(lambda gradient: note("loss"))  # called when the gradient of the logits is ready
    next_token_loss(logits, ids).backward()
    note("backward")
    optimizer.step()
    note(UPDATE)
    activations = after - before - logits.nbytes
    return {"activations": activations, "transient": moments["loss"] - before - activations, "moments": moments}


def _storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The storages of these tensors, each once."""
    return list({storage._cdata: storage for storage in (t.untyped_storage() for t in tensors)}.values())
