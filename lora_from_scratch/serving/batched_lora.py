"""Many LoRAs in one batch: one base model serves many tasks at once, with a different adapter for each row.

The base is the same for every row, so its product is computed once for the whole batch. Only the thin matrices differ:

    y_i = W x_i + b + s_k B_k A_k x_i        where k is the adapter of row i

(Punica, Chen et al. 2023, arXiv:2310.18547; S-LoRA, Sheng et al. 2023, arXiv:2311.03285). Applying one adapter at a
time, each to its own rows, needs many small products. Here there are two larger ones, whatever the number of adapters:

    h   = x [A_1; ...; A_K]^T                 shrink: every row by every A, (n, T, K r)
    h_i = 0 except in the r columns of k      a mask: each row keeps only the result of its own A
    y   = y + h [s_1 B_1, ..., s_K B_K]^T     expand: the other B are multiplied by zeros

This is K times the arithmetic of one LoRA, which is still small compared with W, and no A or B is copied per row.

If all rows need the same adapter there is a cheaper way: `switch_task` adds it to the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_from_scratch.gpt2.model import GPT2, Conv1D
from lora_from_scratch.methods.fast_product import add_product
from lora_from_scratch.methods.lora import LoRA, delta_weight, inject_lora, lora_layers
from lora_from_scratch.methods.method import adaptation_of
from lora_from_scratch.methods.registry import load_adapter
from lora_from_scratch.support.linear_layers import in_and_out

NO_ADAPTER = -1  # the index of a row that uses the base model alone

Factors = dict[str, tuple[Tensor, Tensor]]  # one LoRA: layer name -> A (r, in) and s B (out, r)

# --- The arithmetic ------------------------------------------------------------------------------------


def batched_lora(x: Tensor, A_stack: Tensor, B_stack: Tensor, scaling: float | Tensor, adapter_index: Tensor) -> Tensor:
    """The adapters' output: row i of the batch uses adapter `adapter_index[i]`, `s x_i A[idx_i]^T B[idx_i]^T`.

    It is to be added to the base layer's output for the same `x`.

    Args:
        x: (n, T, in).
        A_stack: (K, r, in), the A of K adapters.
        B_stack: (K, out, r), the B of K adapters.
        scaling: one number, or (K,), one for each adapter.
        adapter_index: (n,) integers from 0 to K - 1; -1: nothing is added to this row.

    Returns:
        (n, T, out).
    """
    adapters, rank, _ = A_stack.shape
    if isinstance(scaling, Tensor):
        scaling = scaling[:, None, None]  # (K, 1, 1)
    A_T = A_stack.flatten(0, 1).T  # (in, K r)
    B_T = (scaling * B_stack).mT.flatten(0, 1)  # (K r, out)
    owner = torch.arange(adapters, device=x.device).repeat_interleave(rank)  # (K r,)
    return shrink(x, A_T, owner, adapter_index) @ B_T


def shrink(x: Tensor, A_T: Tensor, owner: Tensor, adapter_index: Tensor) -> Tensor:
    """Multiply every row of the batch by every A, then keep only the result of its own A: the rest is set to zero.

    Example: adapter 0 has rank 1 and adapter 1 has rank 2, so R = 3 and `owner` is (0, 1, 1). In a row whose adapter is
    1, the first number is zero, for each of its T tokens, and the other two are the result of its A.

    Args:
        x: (n, T, in): n rows of T tokens.
        A_T: (in, R), the A of all adapters, transposed, side by side. R is the sum of their ranks, which may differ.
        owner: (R,), the index of the adapter that each column belongs to.
        adapter_index: (n,), the index of each row's adapter; -1: no adapter, and the whole row is zero.

    Returns:
        (n, T, R).
    """
    own = adapter_index[:, None] == owner  # (n, R)
    return (x @ A_T) * own[:, None, :]


# --- The layer -----------------------------------------------------------------------------------------


class BatchedLoRALinear(nn.Module):
    """A linear layer with many LoRAs; `adapter_index` selects the adapter of each row. For inference.

    Args:
        base: the layer, kept unchanged.
        adapters: for each adapter A (r, in) and s B (out, r), or None if it does not change this layer. Their ranks
            may differ.
    """

    A_T: Tensor  # (in, R). Transposed: multiplying a few rows is a third faster than with A and B themselves
    B_T: Tensor  # (R, out)
    owner: Tensor  # (R,)

    def __init__(self, base: nn.Module, adapters: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        super().__init__()
        self.base = base
        self.adapter_index: Tensor | None = None  # (n,); None: only the base
        present = [(number, *factors) for number, factors in enumerate(adapters) if factors is not None]
        owner = [number for number, A, _ in present for _ in range(len(A))]
        self.register_buffer("A_T", torch.cat([A.T for _, A, _ in present], dim=1), persistent=False)
        self.register_buffer("B_T", torch.cat([B.T for _, _, B in present]), persistent=False)
        self.register_buffer("owner", torch.tensor(owner, device=self.A_T.device), persistent=False)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)  # (n, T, out)
        if self.adapter_index is None:
            return y
        if len(x) != len(self.adapter_index):
            raise ValueError(f"the batch must have {len(self.adapter_index)} rows, one per name, got {len(x)}")
        return add_product(y, shrink(x, self.A_T, self.owner, self.adapter_index), self.B_T.T, 1.0)


# --- A whole model -------------------------------------------------------------------------------------


def lora_factors(model: GPT2) -> Factors:
    """Copies of A and s B of the model's LoRA."""
    copies = {}
    for name, layer in lora_layers(model).items():
        A, B = layer.factors()
        copies[name] = (A.detach().clone(), (layer.scaling * B).detach())
    return copies


def read_lora(model: GPT2, directory: str | Path) -> Factors:
    """Read A and s B from an adapter directory, ours or PEFT's. `model` is left unchanged.

    Raises:
        FileNotFoundError, ValueError: as for `load_adapter`, or the adapter is of another method.
    """
    method = load_adapter(model, directory)
    factors = lora_factors(model)
    method.undo(model)
    if type(method) is not LoRA:
        raise ValueError(f"{directory} must contain a LoRA, got an adapter of the method {method.name}")
    return factors


@torch.no_grad()
def switch_task(model: nn.Module, old: Factors, new: Factors) -> None:
    """Replace the LoRA that is merged into a model's weights with another one: W - s B A + s' B' A', in place.

    "When we need to switch to another downstream task, we can recover W0 by subtracting BA and then adding a different
    B'A'" (Hu et al. 2021, section 4.1). This recovers W0 up to rounding; to recover it exactly, keep a copy of W0.

    The old and the new LoRA may have different ranks and be on different layers. Only the weights of these layers
    change, and they remain the same parameters. The sum is formed in at least float32 and rounded once, to the weight's
    dtype.

    Args:
        model: its layers are `nn.Linear`, or `Conv1D` with a weight (in, out).
        old: what is merged now: layer name -> A (r, in) and s B (out, r). {}: nothing, the base model.
        new: what to merge instead. {}: nothing.

    Raises:
        ValueError: the model does not have one of the layers, or it has another shape, as `check_fit` reports. Nothing
            is changed in this case.
    """
    modules = dict(model.named_modules())
    check_fit("old", old, modules)
    check_fit("new", new, modules)
    for name in {**old, **new}:
        layer = modules[name]
        weight = layer.get_parameter("weight")
        total = weight.float()
        for sign, factors in ((-1, old), (1, new)):
            if name in factors:
                A, B = factors[name]  # B includes s
                change = delta_weight(A.float(), B.float(), sign)  # (out, in)
                total = total + (change.T if isinstance(layer, Conv1D) else change)
        weight.copy_(total)


class ServedAdapters:
    """Several LoRAs on one model, in place:

        served = ServedAdapters(model, {"king": read_lora(model, "runs/king"), "fox": read_lora(model, "runs/fox")})
        with served.rows(["king", "fox", None, "king"]):  # one name per row; None: the base model
            logits = model(input_ids)  # (4, T, V)
        served.remove()

    Outside of `rows` the model behaves like the base model. (In `generate`, finished texts leave the batch: do not pass
    `eos_id` inside `rows`.)

    Args:
        model: a model that is not adapted by any method.
        adapters: the adapters by name.

    Raises:
        ValueError: there are no adapters, the model is already adapted, or an adapter belongs to another model. The
            model is then left unchanged.
    """

    def __init__(self, model: GPT2, adapters: Mapping[str, Factors]) -> None:
        record = adaptation_of(model)
        if record is not None:
            raise ValueError(f"the model is already adapted by {record.method}; undo that first")
        if not adapters:
            raise ValueError("adapters must name at least one LoRA, got none")
        self.model, self.names = model, tuple(adapters)
        modules = dict(model.named_modules())
        for name, factors in adapters.items():
            check_fit(name, factors, modules)
        layers = dict.fromkeys(layer for factors in adapters.values() for layer in factors)
        self.layers = {
            layer: BatchedLoRALinear(modules[layer], [factors.get(layer) for factors in adapters.values()])
            for layer in layers
        }
        inject_lora(model, self.layers)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of every batch uses the adapter `names[i]`; None: the base model.

        Raises:
            ValueError: there is no adapter of one of these names.
        """
        unknown = [name for name in names if name is not None and name not in self.names]
        if unknown:
            raise ValueError(f"there is no adapter {unknown[0]!r}; there are {', '.join(self.names)}")
        numbers = [NO_ADAPTER if name is None else self.names.index(name) for name in names]
        index = torch.tensor(numbers, device=self.model.transformer.wte.weight.device)
        self._set_index(index)
        try:
            yield
        finally:
            self._set_index(None)

    def remove(self) -> None:
        """Restore the base model, with the same module objects. Idempotent."""
        inject_lora(self.model, {name: layer.base for name, layer in self.layers.items()})
        self.layers = {}

    def _set_index(self, index: Tensor | None) -> None:
        for layer in self.layers.values():
            layer.adapter_index = index


def check_fit(adapter: str, factors: Factors, modules: Mapping[str, nn.Module]) -> None:
    """Check that every layer of a LoRA exists among these modules, with the right shape.

    Args:
        adapter: the name of the LoRA in the error message.
        factors: full name of the layer -> A (r, in) and B (out, r).
        modules: the modules by full name.

    Raises:
        ValueError: a layer does not exist or has another shape; the message names the adapter, the layer and the sizes.
    """
    for layer, (A, B) in factors.items():
        if layer not in modules:
            raise ValueError(f"the adapter {adapter!r} is for a layer {layer}, which this model does not have")
        inputs, outputs = in_and_out(modules[layer])
        if (A.shape[1], B.shape[0]) != (inputs, outputs):
            raise ValueError(
                f"the adapter {adapter!r} is for a {layer} with {A.shape[1]} inputs and {B.shape[0]} outputs, but this "
                f"model's has {inputs} and {outputs}"
            )
