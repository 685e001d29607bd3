"""Training what is there already, and little of it: biases, groups of layers, a learning rate for each tensor.

- BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): freeze every matrix and train the biases, 0.08 % of GPT-2
  small. Half of them do nearly as well: those of the queries and of the middle of the MLP.
- SPAFIT (Arora and Wang 2024, arXiv:2405.00201): the first layers stay frozen, the next train their biases,
  the last their biases and LoRAs.
- Surgical fine-tuning (Lee et al. 2023, arXiv:2210.11466): train everything, each tensor as fast as its
  gradient is large beside its weights (Auto-RGN).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_from_scratch.gpt2.model import GPT2, Conv1D, next_token_loss
from lora_from_scratch.methods.lora import LoRA
from lora_from_scratch.methods.method import Method
from lora_from_scratch.methods.placement import find_targets

VARIANTS = ("all", "two")

# --- BitFit ------------------------------------------------------------------------------------------------


def select_biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every bias of a model by its full name, those of the LayerNorms included (Ben Zaken et al., section 3).

    A bias is a parameter that its module calls `bias`, so that its full name ends in `.bias`, or is `bias` for a
    module by itself. Nothing about the parameters changes, `requires_grad` included: choosing is not training.

    Returns:
        name -> the parameter itself, not a copy of it; in the order of `model.named_parameters()`.
    """
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}


class QueryBias(nn.Module):
    """GPT-2's `c_attn` with the queries' part of its bias learned by itself, as `bias_q` (d,).

    The bias of `c_attn` is (3 d,), `[q | k | v]`, in one tensor, and PyTorch trains a tensor as a whole. So the
    first third is copied out and learned; the tensor itself, with the parts of k and v, stays frozen in `base`.

    - `bias()`: the (3 d,) that the layer works with: `bias_q` for the queries, what `base` has for keys and values.
    - `forward(x)`: (..., d) to (..., 3 d), what `base` computes, with `bias()` for its bias. The weight of `base`, a
      `Conv1D`, is (d, 3 d).
    - `merge()`: `base.bias` gets the numbers of `bias()` and stays the same parameter, so that `base` alone computes
      what the layer does. The numbers as they were are kept in `_unmerged`. Merging twice is like merging once.
    - `unmerge()`: every bit of `base.bias` as it was before, and `_unmerged` is None again. Without a merge before it,
      it does nothing.

    Args:
        base: the `c_attn` that it stands for; frozen by whoever puts this layer into a model.
    """

    def __init__(self, base: Conv1D) -> None:
        super().__init__()
        self.base = base
        self.bias_q = nn.Parameter(base.bias.detach()[: base.out_features // 3].clone())  # (d,)
        self._unmerged: Tensor | None = None  # the bias as it was, while merged
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight.T, self.bias())  # (..., 3 d)

    def bias(self) -> Tensor:
        """(3 d,), `[q | k | v]`."""
        return torch.cat([self.bias_q, self.base.bias[len(self.bias_q) :]])

    @torch.no_grad()
    def merge(self) -> None:
        """Put what is learned into `base`, and keep what was there."""
        if self._unmerged is None:
            self._unmerged, self.base.bias.data = self.base.bias.data, self.bias()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back what was there."""
        if self._unmerged is not None:
            self.base.bias.data, self._unmerged = self._unmerged, None


@dataclass(frozen=True)
class BitFit(Method):
    """Train biases and nothing else.

    variant "all": every bias. "two": in each block b_q, the queries' third of `c_attn`'s bias, and b_m2, the
    bias of the MLP's first layer `c_fc`: the two that move most (Ben Zaken et al., section 4; m2 is the second
    matrix after the attention, m1 being the attention's own output).

    Raises:
        ValueError: there is no such variant.
    """

    variant: str = "all"

    name: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_BITFIT"  # PEFT has no such method
    can_merge: ClassVar[bool] = True  # a bias is trained where it is; only `bias_q` has to be put there

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")

    def _install(self, model: GPT2) -> None:
        if self.variant == "all":
            for bias in select_biases(model).values():
                bias.requires_grad_(True)
            return
        for block in model.transformer.h:
            block.mlp.c_fc.bias.requires_grad_(True)  # type: ignore[union-attr]
            block.attn.c_attn = QueryBias(block.attn.c_attn)  # type: ignore[arg-type,union-attr]

    def _uninstall(self, model: GPT2) -> None:
        for name, layer in _query_biases(model).items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base)

    def _merge(self, model: GPT2) -> None:
        for layer in _query_biases(model).values():
            layer.merge()

    def _unmerge(self, model: GPT2) -> None:
        for layer in _query_biases(model).values():
            layer.unmerge()


def _query_biases(model: nn.Module) -> dict[str, QueryBias]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QueryBias)}


# --- SPAFIT ------------------------------------------------------------------------------------------------


def stratify(n_layer: int, frozen_layers: int, bias_layers: int) -> tuple[range, range, range]:
    """Cut the layers 0 ... n_layer - 1 into three groups: frozen, biases only, LoRA and biases.

    What a layer near the input knows serves every task; what a layer near the output knows is the task's own
    (Arora and Wang 2024). So the further a layer is from the input, the more of it is trained.

    Args:
        n_layer: how many layers there are.
        frozen_layers: how many, from the input, stay frozen (the paper's N1); 0 is allowed.
        bias_layers: how many after these train their biases only (N2 - N1); 0 is allowed.

    Returns:
        The numbers of the layers of each group, counted from 0, in this order. All the rest is the third group.

    Raises:
        ValueError: a number is negative or not whole, or no layer is left for the third group.
    """
    for name, count in (("frozen_layers", frozen_layers), ("bias_layers", bias_layers)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"{name} must be a whole number of at least 0, got {count!r}")
    first, second = frozen_layers, frozen_layers + bias_layers
    if second >= n_layer:
        raise ValueError(
            f"frozen_layers and bias_layers together must be at most {n_layer - 1} (the model has {n_layer} layers, "
            f"and one at least gets LoRAs), got {frozen_layers} + {bias_layers}"
        )
    return range(first), range(first, second), range(second, n_layer)


@dataclass(frozen=True)
class SPAFIT(Method):
    """Three groups of layers, see `stratify`; the last gets LoRAs on its `targets` and trains all its biases.

    The embeddings and the last LayerNorm belong to no layer and stay frozen.

    Raises:
        ValueError: a hyperparameter out of its range, when it is made; or one that does not fit the model, in `adapt`.
    """

    frozen_layers: int = 1  # of the bundled model's 6
    bias_layers: int = 1
    rank: int = 8
    alpha: float = 16
    targets: Sequence[str] | str = ("c_attn", "attn.c_proj")  # the paper: the attention's matrices
    seed: int = 0  # of A's first values

    name: ClassVar[str] = "spafit"
    peft_type: ClassVar[str] = "LORA_FROM_SCRATCH_SPAFIT"  # PEFT has no such method
    can_merge: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", self._lora(self.targets).targets)
        stratify(self.frozen_layers + self.bias_layers + 1, self.frozen_layers, self.bias_layers)

    def _lora(self, targets: Sequence[str] | str) -> LoRA:
        """The LoRA on these targets; it refuses what is wrong with rank and alpha."""
        return LoRA(rank=self.rank, alpha=self.alpha, targets=targets, seed=self.seed)

    def _install(self, model: GPT2) -> None:
        _, biases_only, lora_and_biases = stratify(model.config.n_layer, self.frozen_layers, self.bias_layers)
        plan = find_targets(model, self.targets)
        inside = [f"transformer.h.{layer}." for layer in lora_and_biases]
        chosen = [
            ".".join(filter(None, (name, part)))
            for name, parts in plan.items()
            if name.startswith(tuple(inside))
            for part in parts or ("",)
        ]
        if not chosen:
            raise ValueError(
                f"none of the targets {self.targets!r} is in the layers {lora_and_biases.start} to "
                f"{lora_and_biases.stop - 1}, which get LoRAs; name a layer there or a name without a number"
            )
        self._lora(tuple(chosen))._install(model)
        for layer in (*biases_only, *lora_and_biases):
            for bias in select_biases(model.transformer.h[layer]).values():
                bias.requires_grad_(True)

    def _uninstall(self, model: GPT2) -> None:
        self._lora(self.targets)._uninstall(model)

    def _merge(self, model: GPT2) -> None:
        self._lora(self.targets)._merge(model)

    def _unmerge(self, model: GPT2) -> None:
        self._lora(self.targets)._unmerge(model)


# --- Surgical fine-tuning ----------------------------------------------------------------------------------


def relative_gradient_norms(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor, Tensor | None]]
) -> dict[str, float]:
    """How large the gradient g of each tensor p is beside the tensor: the mean of `||g|| / ||p||` over batches.

    That is Lee et al.'s RGN, with Euclidean norms of whole tensors; their code takes five batches. g is the gradient of
    `next_token_loss` on one batch: each batch has a quotient of its own, and these are averaged. Measured for what has
    `requires_grad`; no `.grad` and no weight changes. A tensor that the loss does not depend on has the gradient 0.

    Args:
        model: any module with `model(input_ids, attention_mask=...) -> logits` (B, T, V).
        batches: each input_ids (B, T), labels (B, T), attention_mask (B, T) or None, as in `finetune.training.Batch`.
            They can be gone through once.

    Returns:
        name -> number, for each parameter that has `requires_grad`.

    Raises:
        ValueError: no batch, nothing to train, or a tensor of zeros, beside which nothing is large or small.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("nothing to measure: no parameter of the model has requires_grad=True")
    sizes = {name: float(p.detach().norm()) for name, p in parameters.items()}
    for name, size in sizes.items():
        if size == 0:
            raise ValueError(
                f"{name} is all zeros, so its gradient has no relative size; set its requires_grad to False first"
            )
    sums, count = dict.fromkeys(parameters, 0.0), 0
    for input_ids, labels, attention_mask in batches:
        loss = next_token_loss(model(input_ids, attention_mask=attention_mask), labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            sums[name] += float(gradient.norm()) / sizes[name]
        count += 1
    if count == 0:
        raise ValueError("no batch to measure on; give at least one")
    return {name: total / count for name, total in sums.items()}


def auto_rgn_weights(norms: Mapping[str, float]) -> dict[str, float]:
    """The norms divided by the largest: for each tensor the share, 0 to 1, of the learning rate that it gets.

    Args:
        norms: name -> relative gradient norm; left as it is.

    Returns:
        name -> share, for the same names.

    Raises:
        ValueError: no norm is above zero, or one is not a number.
    """
    largest = max(norms.values(), default=0.0)
    wrong = {name: norm for name, norm in norms.items() if not 0 <= norm < float("inf")}
    if wrong or largest == 0:
        shown = ", ".join(f"{name}: {norm}" for name, norm in list((wrong or norms).items())[:3])
        raise ValueError(f"norms must be at least 0 and finite, and one above 0, got {shown or 'none'}")
    return {name: norm / largest for name, norm in norms.items()}


def surgical_parameter_groups(
    model: nn.Module, weights: Mapping[str, float], learning_rate: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, one for each tensor, with the learning rate `w * learning_rate`.

    Lee et al. measure again at the beginning of each epoch and make the optimiser anew.

    Args:
        weights: by the full names of parameters, from `auto_rgn_weights`; a tensor without one is not trained, so it
            gets no group.
        learning_rate: of a tensor of weight 1.
        weight_decay: on the matrices, whatever their weight; tensors with fewer than two axes get 0.

    Returns:
        One dictionary for each of the weights, in their order, with the keys "name" (the full name), "params" (a list
        with the parameter itself), "lr" and "weight_decay".

    Raises:
        ValueError: a name that is no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    for name in weights:
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name!r}; it has names like {next(iter(parameters))!r}")
    return [
        {
            "name": name,
            "params": [parameters[name]],
            "lr": weight * learning_rate,
            "weight_decay": weight_decay if parameters[name].ndim >= 2 else 0.0,
        }
        for name, weight in weights.items()
    ]
